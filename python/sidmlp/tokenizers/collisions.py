"""Items that share all codes: how many there are, and the level that tells them apart.

The extra level is a counter, as in TIGER (Rajput et al. 2023, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Collisions:
    """How many items share codes: items in groups, groups, the largest."""

    items: int
    groups: int
    largest: int

    def __str__(self) -> str:
        return f"{self.items} items in {self.groups} groups share an id (largest {self.largest})"


def count_collisions(codes: np.ndarray) -> Collisions:
    """The items of ``codes`` int64 [N, levels] whose rows are equal to another's."""
    return _collisions(np.unique(codes, axis=0, return_counts=True)[1])


def deduplicate(codes: np.ndarray, max_codes: int = 256) -> tuple[np.ndarray, Collisions]:
    """Appends the level that makes every row unique: a counter over equal rows, in item order.

    codes: int64 [N, l]. Returns ([N, l + 1], what collided). Raises ValueError when a group is
    larger than ``max_codes``.
    """
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)  # numpy 2.0 alone returns it two-dimensional
    collisions = _collisions(sizes)
    if collisions.largest > max_codes:
        raise ValueError(
            f"{collisions.largest} items share all codes but the extra level has room for "
            f"{max_codes}; use more codes or levels, or better item vectors"
        )
    order = np.argsort(group, kind="stable")
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    counter = np.empty(len(codes), dtype=np.int64)
    counter[order] = np.arange(len(codes)) - first[group[order]]
    return np.concatenate([codes, counter[:, None]], axis=1), collisions


def _collisions(sizes: np.ndarray) -> Collisions:
    shared = sizes[sizes > 1]
    return Collisions(int(shared.sum()), int(shared.size), int(sizes.max(initial=0)))
