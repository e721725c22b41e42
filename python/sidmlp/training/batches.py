"""An epoch's examples cut into batches: of any length, or of few lengths and one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .execution import Execution


@dataclass(frozen=True)
class Batch:
    """Examples of one step.

    index: int64 [B], -1 where a batch of fixed size has no example; count: how many are real;
    longest: no example is longer (0 where lengths are unknown).
    """

    index: np.ndarray
    count: int
    longest: int


def length_edges(lengths: np.ndarray) -> list[int]:
    """At most four lengths that batches are padded to: the largest one and its halves."""
    longest = int(lengths.max(initial=1))
    return sorted({-(-longest // part) for part in (8, 4, 2, 1)})


def batches_of(
    order: np.ndarray,
    batch_size: int,
    lengths: np.ndarray | None,
    execution: Execution,
    rng: np.random.Generator,
) -> list[Batch]:
    """The examples of ``order``, int64 [n], in batches; lengths: of all examples.

    Where shapes must be few, examples of similar length share a batch, and what is left of one
    length fills up the next, so that at most one batch of the epoch is not full.
    """
    if not execution.static:
        runs = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [
            Batch(run, len(run), 0 if lengths is None else int(lengths[run].max())) for run in runs
        ]
    if lengths is None:
        return _full_batches(order, batch_size, 0, last=True)[0]
    edges = length_edges(lengths)
    group = np.searchsorted(edges, lengths[order])
    found: list[Batch] = []
    left = order[:0]
    for number, edge in enumerate(edges):
        waiting = np.concatenate([left, order[group == number]])
        full, left = _full_batches(waiting, batch_size, edge, last=number == len(edges) - 1)
        found += full
    return [found[i] for i in rng.permutation(len(found))]


def _full_batches(
    order: np.ndarray, size: int, longest: int, last: bool
) -> tuple[list[Batch], np.ndarray]:
    """Batches of ``size``, and the examples left over; the last batch is filled up with -1."""
    end = len(order) // size * size
    found = [Batch(order[i : i + size], size, longest) for i in range(0, end, size)]
    left = order[end:]
    if last and len(left):
        index = np.concatenate([left, np.full(size - len(left), -1, dtype=order.dtype)])
        found.append(Batch(index, len(left), longest))
        left = left[:0]
    return found, left
