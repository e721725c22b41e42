"""Checks of what callers hand to a decode; the usual call pays a few comparisons."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batching import Int64Array, describe, flatten_ids
from .host_memory import host_memory

Exclusion = tuple[Tensor | None, Tensor | None]
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_type(value: object, name: str, kind: type) -> None:
    """ValueError unless `value` is a `kind`, one of the package's classes."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{name}: expected a {kind.__name__}, got {type(value).__name__}; "
            f"make one, see help(sidmlp_kernels.{kind.__name__})"
        )


def check_states(states: Tensor, mask: Tensor, dim: int, device: torch.device) -> None:
    """ValueError unless states are [B, T, dim] and mask bool [B, T], both on `device`."""
    if (
        isinstance(states, Tensor)
        and isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and states.dtype in STATE_DTYPES
        and states.shape == (*mask.shape, dim)
        and mask.ndim == 2
        and states.device == device
        and mask.device == device
    ):
        return  # the usual call must not pay for finding the words of an error
    check_tensor(states, "encoder_states", STATE_DTYPES, ("batch", "tokens", dim), device)
    check_tensor(mask, "mask", (torch.bool,), tuple(states.shape[:2]), device)


def check_tensor(
    tensor: object,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    device: torch.device,
) -> None:
    """ValueError unless `tensor` has this dtype, shape (a name is any size) and device."""
    if isinstance(tensor, Tensor) and tensor.ndim == len(shape):
        sizes = zip(shape, tensor.shape, strict=True)
        fits = all(isinstance(wanted, str) or wanted == got for wanted, got in sizes)
        if fits and tensor.dtype in dtypes and tensor.device == device:
            return
    kinds = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
        f"{name}: expected a {kinds} tensor [{', '.join(map(str, shape))}] on {device}, "
        f"got {describe(tensor)}; convert it with .to() or correct its shape"
    )


def check_device(batch: Tensor, device: torch.device) -> None:
    """ValueError unless a Batch's ids are on the model's device."""
    if batch.device != device:
        raise ValueError(
            f"batch: expected tensors on {device}, got {batch.device}; use batch.to(model.device)"
        )


def excluded_ids(exclude: object, batch: int) -> tuple[Int64Array, Int64Array] | None:
    """All ids in order int64 [N] and how many are each request's int64 [B]; None: no id at all.

    Raises ValueError unless there is one sequence of integers, or None, for each request.
    """
    if exclude is None:
        return None
    flat, lengths = flatten_ids(exclude, "exclude", none_is_empty=True)
    if len(lengths) != batch:
        raise ValueError(
            f"exclude: expected one sequence of item ids (or None) per request, {batch}, got "
            f"{len(lengths)}; pass [[], ..] for requests that exclude nothing"
        )
    return (flat, lengths) if flat.size else None


def exclusion_tensors(exclude: object, batch: int, device: torch.device) -> Exclusion:
    """Ids ascending inside each request int64 [N], offsets int64 [B + 1], on `device`."""
    found = excluded_ids(exclude, batch)
    if found is None:
        return None, None
    flat, lengths = found
    begin = 2 * (batch // 2 + 1)  # of the ids in one piece of memory, 16 bytes aligned
    memory = host_memory((begin + len(flat),), torch.int64, device)
    array: npt.NDArray[np.int64] = memory.numpy()
    offsets, ids = array[: batch + 1], array[begin:]
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1:])
    ids[:] = flat
    for first, end in itertools.pairwise(offsets.tolist()):
        ids[first:end].sort()  # ten times faster than one lexsort over the batch
    memory = memory.to(device, non_blocking=True)
    return memory[begin:], memory[: batch + 1]
