"""Which CUDA streams read tensors that a model owns."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def note_stream(tensors: Iterable[Tensor], device: torch.device, seen: set[int]) -> None:
    """Tells torch's allocator that the current stream of `device` reads `tensors`, once for each
    stream that is not in `seen`: what is freed must not be handed out again while a kernel on
    another stream still reads it.

    Not in compiled code (torch.compile), which cannot call the allocator: whoever compiles a call
    and runs it on a side stream synchronises that stream before the tensors go.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    raw = torch._C._cuda_getCurrentRawStream(device.index)
    if raw in seen or torch.cuda.is_current_stream_capturing():
        return  # whoever captures a graph keeps what it reads as long as the graph
    stream = torch.cuda.current_stream(device)
    for tensor in tensors:
        tensor.record_stream(stream)
    seen.add(raw)
