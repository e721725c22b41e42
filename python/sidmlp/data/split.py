"""Leave-last-out: a user's last item tests, the one before it validates, the rest trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .interactions import Interactions


@dataclass(frozen=True)
class Examples:
    """Pairs (history, next item) as positions in one flat sequence array; nothing is copied.

    items: int64 [interactions], the flat sequences; users, starts, targets: int64 [n]. Example e,
    of user ``users[e]``, has the history ``items[starts[e]:targets[e]]``, oldest first, and the
    target ``items[targets[e]]``.
    """

    items: np.ndarray
    users: np.ndarray
    starts: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return int(self.targets.size)

    def history(self, example: int, max_items: int | None = None) -> np.ndarray:
        """Dense item indices before the target, oldest first; the newest ``max_items`` if given."""
        start, end = int(self.starts[example]), int(self.targets[example])
        if max_items is not None:
            start = max(start, end - max_items)
        return self.items[start:end]

    def target_items(self) -> np.ndarray:
        """Dense index of every target, int64 [n]."""
        return self.items[self.targets]

    def take(self, index: np.ndarray) -> Examples:
        """The examples at ``index``, in that order."""
        return Examples(self.items, self.users[index], self.starts[index], self.targets[index])


@dataclass(frozen=True)
class Split:
    """Training, validation and test examples of one data set.

    train_end: int64 [users], the flat position after each user's last training interaction.
    """

    train: Examples
    validation: Examples
    test: Examples
    train_end: np.ndarray


def leave_last_out(data: Interactions) -> Split:
    """Splits every user's sequence by position.

    Of a sequence of n >= 3 items the last is the test target and the one before it the validation
    target; items 0..n-3 are training, where each but the first is a target of what precedes it.
    Shorter sequences are training whole. No training example touches a held-out position.
    """
    begins, ends = data.offsets[:-1], data.offsets[1:]
    held_out = (ends - begins) >= 3
    train_end = np.where(held_out, ends - 2, ends)
    positions = np.arange(data.items.size, dtype=np.int64)
    user = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    is_target = (positions > begins[user]) & (positions < train_end[user])
    targets = positions[is_target]
    testers = np.flatnonzero(held_out)
    return Split(
        train=Examples(data.items, user[targets], begins[user[targets]], targets),
        validation=Examples(data.items, testers, begins[testers], ends[testers] - 2),
        test=Examples(data.items, testers, begins[testers], ends[testers] - 1),
        train_end=train_end,
    )


def training_counts(data: Interactions, split: Split) -> np.ndarray:
    """How often each item occurs in the training part, int64 [num_items]: its popularity."""
    keep = training_mask(data, split)
    return np.bincount(data.items[keep], minlength=data.num_items)


def training_mask(data: Interactions, split: Split) -> np.ndarray:
    """True for the interactions that training may read, bool [interactions]."""
    user = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    return np.arange(data.items.size) < split.train_end[user]
