"""CUDA graphs of a few batch sizes, kept for a model's present catalogue and captured again after
it changes."""

from __future__ import annotations

import abc
import bisect
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic

import numpy as np
import torch
from torch import Tensor

from .captured_graph import CapturedGraph, Inputs, exclusion_table
from .decode_arguments import excluded_ids
from .plan import DecodePlan
from .serving_state import ServingState, Settings
from .spec import check_int

if TYPE_CHECKING:
    from .served_model import ServedModel

# All decoders of one GPU share a lock: some versions of torch refuse to replay a graph while
# another thread captures one on that GPU, since both advance its random number generator.
_locks: dict[torch.device, threading.Lock] = {}


class GraphsBySize(abc.ABC, Generic[Inputs]):
    """Graphs of one kind of inputs, with fixed settings, for batches of up to batch_sizes[-1].

    Any number of threads and streams may use one. A lock makes [wait for the event of the last
    user, copy in, replay, copy out, record the event] one uninterrupted sequence on the caller's
    stream, and so the sequences of one batch size, whose static buffers nobody else touches, run on
    the GPU one after the other in the order of the lock. Each batch size has buffers, scratch and
    an event of its own, hence different sizes on different streams may overlap.

    After `swap`, `set_available` or a change of the catalogue's stock, the next call of each batch
    size captures again, unless `refresh` did so ahead. Replaced graphs, and the catalogue that they
    read, are dropped by a later call that finds their last replay ended; nothing waits for that.

    A capture waits for the GPU, empties torch's cache of free memory, and lets the calls of other
    decoders on that GPU wait. Other threads may use the GPU meanwhile, but for random numbers,
    graphs of their own and torch.cuda.synchronize (synchronising a stream or an event is fine).
    """

    def __init__(
        self,
        model: ServedModel,
        settings: Settings,
        batch_sizes: Sequence[int],
        tokens: int | None,
        max_excluded: int,
    ) -> None:
        self._graphs: dict[int, CapturedGraph[Inputs]] = {}  # by batch size, all of self._state
        self._retired: list[CapturedGraph[Inputs]] = []
        self._state: ServingState | None = None
        # Of the three above, and of everything that is enqueued.
        self._lock = _locks.setdefault(model.device, threading.Lock())
        self._model, self._settings = model, settings
        self.batch_sizes = _checked_batch_sizes(batch_sizes)
        if tokens is None:
            tokens = model.tokens.max_length
        self.tokens = check_int(tokens, "tokens", low=0)
        self.max_excluded = check_int(max_excluded, "max_excluded", low=0)

    def __del__(self) -> None:
        # The allocator would hand out again what replays under way still read and write.
        for graph in (*self._graphs.values(), *self._retired):
            graph.done.synchronize()

    def refresh(self) -> None:
        """Captures what the present catalogue lacks; requests may come in between."""
        for size in self.batch_sizes:
            with self._lock:
                self._graph(size)

    @abc.abstractmethod
    def _make_inputs(self, plan: DecodePlan, size: int) -> Inputs:
        """The inputs of a graph of this batch size."""

    def _size_for(self, batch: int) -> int:
        """The smallest batch size that holds `batch`, which is at most the largest."""
        return self.batch_sizes[bisect.bisect_left(self.batch_sizes, batch)]

    def _graph(self, size: int) -> CapturedGraph[Inputs]:
        """The graph for this batch size and the model's present state; the caller holds the lock.

        The state is read under the lock: whoever read an older one and came later would capture
        that again.
        """
        state = self._model._current()
        if state is not self._state:
            self._retired += self._graphs.values()
            self._graphs, self._state = {}, state
        if self._retired:
            self._retired = [old for old in self._retired if not old.done.query()]
        graph = self._graphs.get(size)
        if graph is None:
            plan = state.plans.get(self._settings)
            graph = CapturedGraph(plan, lambda plan: self._make_inputs(plan, size))
            self._graphs[size] = graph
        return graph

    def _exclusion(self, exclude: object, batch: int) -> Tensor | None:
        """Ids ascending inside each request int64 [B, max_excluded], in host memory for the model's
        device; None: nothing."""
        found = excluded_ids(exclude, batch)
        if found is None:
            return None
        flat, lengths = found
        longest = int(lengths.argmax())
        if lengths[longest] > self.max_excluded:
            raise ValueError(
                f"exclude[{longest}]: expected at most max_excluded={self.max_excluded} item ids, "
                f"as captured, got {lengths[longest]}; capture with a larger max_excluded, or call "
                "the model itself"
            )
        return exclusion_table(flat, lengths, self.max_excluded, self._model.device)


def _checked_batch_sizes(batch_sizes: object) -> tuple[int, ...]:
    """Ascending, each once; ValueError unless they are positive integers, at least one."""
    sizes = list(batch_sizes) if isinstance(batch_sizes, (Sequence, np.ndarray, Tensor)) else []
    if not sizes or isinstance(batch_sizes, (str, bytes)):
        raise ValueError(
            f"batch_sizes: expected a sequence of at least one batch size, got {batch_sizes!r}; "
            "pass the sizes to capture, such as (1, 8, 32)"
        )
    checked = [check_int(size, f"batch_sizes[{i}]", low=1) for i, size in enumerate(sizes)]
    return tuple(sorted(set(checked)))
