"""One CUDA graph of a decode: the memory that it reads and writes, its capture and its replays.

A graph holds addresses, so everything that it reads and writes stays where it was at capture:
inputs are copied in, results are copied out.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .host_memory import CurrentStream, host_memory
from .plan import DecodePlan
from .recommendations import PackedResults
from .tracing import traced

NO_ITEM = -(2**63)  # below every item id: fills exclusions up, and keeps them ascending

# One capture at a time in this process: it begins by waiting for a device and by emptying the cache
# of all of them, both illegal during another.
_capturing = threading.Lock()


class StaticInputs(Protocol):
    """What a graph reads, at addresses that stay."""

    def decode(self, plan: DecodePlan) -> PackedResults:
        """One decode of all rows."""


Inputs = TypeVar("Inputs", bound=StaticInputs)


class StaticExclusion:
    """Up to max_excluded item ids of each of `size` requests, where the operators want them.

    ids int64 [size * max_excluded] ascending inside a request, offsets int64 [size + 1]; both None
    where nothing may be excluded
    """

    def __init__(self, size: int, max_excluded: int, device: torch.device) -> None:
        self.ids = self.offsets = None
        if max_excluded:
            shape = (size * max_excluded,)
            self.ids = torch.full(shape, NO_ITEM, dtype=torch.int64, device=device)
            self.offsets = max_excluded * torch.arange(size + 1, device=device)
        self._excludes = False

    def load(self, table: Tensor | None) -> None:
        """Puts in int64 [B, max_excluded] of the first requests (None: nothing is excluded); what
        the further ones exclude does not matter."""
        if self.ids is None:
            return
        if table is not None:
            self._excludes = True
            self.ids[: table.numel()].copy_(table.view(-1), non_blocking=True)
        elif self._excludes:
            self.ids.fill_(NO_ITEM)
            self._excludes = False


class CapturedGraph(Generic[Inputs]):
    """A decode with `plan` of the inputs that `make_inputs` makes.

    plan  keeps weights and catalogue, whose addresses the graph holds
    done  an event after the last use of the static memory
    """

    @traced("graphs.capture")
    def __init__(self, plan: DecodePlan, make_inputs: Callable[[DecodePlan], Inputs]) -> None:
        self.plan = plan
        self.device = plan.packed.device
        self._current = CurrentStream(self.device)
        # Tensors made in a caller's inference mode could not be written to outside of it.
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            self.done = torch.cuda.Event()
            self._graph = torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), _capturing:
                self._inputs = make_inputs(plan)
                self._inputs.decode(plan)  # loads and sets up kernels, which a capture must not
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._results = self._inputs.decode(plan)
                self._graph.replay()  # so that no request pays for the upload to the GPU
                self.done.record(side)

    @traced("graphs.replay")
    def run(self, load: Callable[[Inputs], None], out: Tensor | None = None) -> PackedResults:
        """Lets `load` fill the inputs, replays, and copies the results into `out`, which may be
        host memory that a later Mark tells to be ready, or into memory of their own.

        One thread at a time. Every step names its device itself, whichever is current.
        """
        stream = self._current.get()
        stream.wait_event(self.done)
        try:
            load(self._inputs)
            self._graph.replay()
            if out is None:
                out = self._results.memory.clone()
            else:
                out.copy_(self._results.memory, non_blocking=True)
            return dataclasses.replace(self._results, memory=out)
        finally:
            self.done.record(stream)  # even if the last step failed, the others may be under way


def exclusion_table(
    flat: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    width: int,
    device: torch.device,
) -> Tensor:
    """Ragged ids -> int64 [B, width] in host memory for `device`, ascending, filled up with
    NO_ITEM; no length above width."""
    table = host_memory((len(lengths), width), torch.int64, device)
    array = table.numpy()
    array.fill(NO_ITEM)
    array[np.arange(width) < lengths[:, None]] = flat
    array.sort(axis=1)
    return table
