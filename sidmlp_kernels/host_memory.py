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

_warning = threading.Lock()
_warned = False


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor on the CPU to copy to or from `device`; pinned for a GPU.

    Where the system has no memory to lock (a container's limit, say) the tensor is an ordinary one,
    copies are right but wait, and a warning is logged once.
    """
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _warn(error)
        return torch.empty(shape, dtype=dtype)


class Mark:
    """A place in the current stream of `device`, for the host to wait until work got there.

    On the CPU, where every call has ended when it returns, there is nothing to wait for. A wait
    keeps the processor busy, so that it ends within microseconds of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Behind all that is enqueued now."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

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
            str(error).split("\n", 1)[0],
        )
