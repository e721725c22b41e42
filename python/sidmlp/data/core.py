"""Which events of a raw data set are kept: first occurrences of a pair, and the k-core."""

from __future__ import annotations

import numpy as np


def first_of_each_pair(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """True for the earliest event of every (user, item), bool [events].

    users, items: int64 [events], >= 0; times: float64 [events]. Of equally early events the one
    given first is kept.
    """
    pairs = users * (int(items.max(initial=-1)) + 1) + items
    order = np.lexsort((times, pairs))  # stable: equal pairs and times keep their order
    ordered = pairs[order]
    first = np.ones(ordered.size, dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    keep = np.zeros(ordered.size, dtype=bool)
    keep[order[first]] = True
    return keep


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """True for the events of the k-core, bool [events].

    users, items: int64 [events], >= 0. The k-core is the largest set of events in which every user
    and every item occurs at least k times; it may be empty. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k}; 1 keeps every event")
    keep = np.ones(users.size, dtype=bool)
    while True:
        # Dropping a user may leave an item with too few events, and the other way round.
        of_user = np.bincount(users[keep], minlength=int(users.max(initial=-1)) + 1)
        of_item = np.bincount(items[keep], minlength=int(items.max(initial=-1)) + 1)
        still = keep & (of_user[users] >= k) & (of_item[items] >= k)
        if still.sum() == keep.sum():
            return keep
        keep = still
