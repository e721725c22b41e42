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
