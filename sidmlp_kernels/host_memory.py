"""Host memory that a GPU copies from and to while the host goes on.

A copy between a GPU and ordinary memory waits for its end; between a GPU and page-locked ("pinned")
memory it is only enqueued. torch keeps freed pinned memory for the next that asks, and hands it out
again only after the copies that it took part in have ended.
"""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor

logger = logging.getLogger("sidmlp_kernels")

# What CUDA says when it cannot lock memory: cudaErrorMemoryAllocation, cudaErrorOperatingSystem and
# cudaErrorNotSupported. Anything else, a failed kernel's error too, is not about this memory.
NO_LOCKED_MEMORY = ("out of memory", "OS call failed", "operation not supported")

_warning = threading.Lock()
_warned = False


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor on the CPU to copy to or from `device`; pinned for a GPU.

    Where the system has no memory to lock (a container's limit, say) the tensor is an ordinary one,
    copies are right but wait, and a warning is logged once. Other errors of the GPU are raised.
    """
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if not any(words in _first_line(error) for words in NO_LOCKED_MEMORY):
            raise
        _warn(error)
        return torch.empty(shape, dtype=dtype)


class CurrentStream:
    """The current stream of a GPU; its object is made anew only after another was current, which
    takes as long as a launch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._last: tuple[int, torch.cuda.Stream] | None = None

    def get(self) -> torch.cuda.Stream:
        """As torch.cuda.current_stream(device), in any thread."""
        raw = torch._C._cuda_getCurrentRawStream(self._index)
        last = self._last
        if last is None or last[0] != raw:
            last = self._last = (raw, torch.cuda.current_stream(self._device))
        return last[1]


class Mark:
    """A place in the current stream of `device`, for the host to wait until work got there.

    On the CPU, where every call has ended when it returns, there is nothing to wait for. A wait
    keeps the processor busy, so that it ends within microseconds of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event, self._stream = torch.cuda.Event(), CurrentStream(device)

    def record(self) -> None:
        """Behind all that is enqueued now."""
        if self._event is not None:
            self._event.record(self._stream.get())

    def wait(self) -> None:
        """Until what was enqueued before the last `record` has ended."""
        if self._event is not None:
            self._event.synchronize()


def _warn(error: RuntimeError) -> None:
    global _warned
    with _warning:
        first, _warned = not _warned, True
    if first:
        logger.warning(
            "no page-locked memory (%s): copies to and from the GPU wait for their end; raise the "
            "limit of locked memory (ulimit -l) or that of the container",
            _first_line(error),
        )


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n", 1)[0]
