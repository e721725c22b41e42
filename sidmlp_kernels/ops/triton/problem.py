"""Operator arguments, checked: every size, dtype, shape and device, with the words of
csrc/torch/problem.cpp, which does this for the CPU and CUDA operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from sidmlp_kernels.packing import CODE_ROWS, LANE
from sidmlp_kernels.spec import MAX_LEVELS

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 1 << 20
MAX_BLOCKS = 64
MAX_CODES = 32767
MAX_NUM_BEAMS = 1 << 16


def fail(message: str) -> NoReturn:
    """RuntimeError, as operators of every backend raise."""
    raise RuntimeError(message)


def padded(n: int) -> int:
    """n rounded up to a multiple of 16."""
    return -(-n // LANE) * LANE


def check_size(value: int, low: int, high: int, name: str) -> int:
    """`value` if it is in low..high."""
    if not low <= value <= high:
        fail(f"{name}: expected {low}..{high}, got {value}")
    return value


def check_tensor(
    tensor: Tensor, name: str, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> Tensor:
    """`tensor` if it has this dtype, shape and device, and is contiguous."""
    if tensor.device != device:
        fail(f"{name}: expected on the device of the call's first tensor, got {tensor.device}")
    if tensor.dtype != dtype:
        fail(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        fail(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        fail(f"{name}: expected a contiguous tensor")
    return tensor


def check_aligned(tensors: Sequence[Tensor], name: str) -> None:
    """Kernels load 16 bytes of a row at a time."""
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            fail(
                f"{name}: expected tensors aligned to 16 bytes, got a view at an odd offset; pass "
                "a clone of it"
            )


@dataclass(frozen=True)
class Sizes:
    """[L, D, heads, head_dim, F, H, blocks, C_1 .. C_L] by name."""

    num_levels: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    hidden_dim: int
    num_blocks: int
    num_codes: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Sizes:
        """From an operator's `sizes`."""
        if len(sizes) < 8:
            fail(f"sizes: expected at least 8 numbers, got {len(sizes)}")
        levels = check_size(sizes[0], 1, MAX_LEVELS, "number of levels")
        if len(sizes) != 7 + levels:
            fail(f"sizes: expected {7 + levels} numbers for {levels} levels, got {len(sizes)}")
        return cls(
            levels,
            check_size(sizes[1], 1, MAX_WIDTH, "dim"),
            check_size(sizes[2], 1, MAX_WIDTH, "num_heads"),
            check_size(sizes[3], 1, MAX_WIDTH, "head_dim"),
            check_size(sizes[4], 1, MAX_WIDTH, "ffn_dim"),
            check_size(sizes[5], 1, MAX_WIDTH, "hidden_dim"),
            check_size(sizes[6], 1, MAX_BLOCKS, "blocks per head"),
            tuple(check_size(c, 1, MAX_CODES, "codes of a level") for c in sizes[7:]),
        )


def weight_dtype(tensor: Tensor, name: str) -> torch.dtype:
    """The dtype of weights or states, if kernels read it."""
    if tensor.dtype not in WEIGHT_DTYPES:
        fail(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    return tensor.dtype


def check_count(tensors: Sequence[Tensor], expected: int, name: str) -> None:
    """Raises unless there are `expected` tensors."""
    if len(tensors) != expected:
        fail(f"{name}: expected {expected} tensors, got {len(tensors)}")


def check_readout(s: Sizes, tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Checks `PackedWeights.readout`; whether attention is in the factored form."""
    check_count(tensors, 9, "readout")
    dtype = weight_dtype(tensors[0], "readout.query_weight")
    dim_pad, head_pad, ffn_pad = padded(s.dim), padded(s.head_dim), padded(s.ffn_dim)
    attention = s.num_heads * s.head_dim
    factored = tensors[2].numel() > 0
    shapes: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {
        "query_weight": (0, dtype, (s.dim, dim_pad)),
        "vectors": (1, torch.float32, (6, dim_pad)),
        "ffn_in": (6, dtype, (s.dim, ffn_pad)),
        "ffn_in_bias": (7, torch.float32, (ffn_pad,)),
        "ffn_out": (8, dtype, (s.ffn_dim, dim_pad)),
    }
    if factored:
        shapes["score_in"] = (2, dtype, (s.dim, s.num_heads * head_pad))
        shapes["score_out"] = (3, dtype, (attention, dim_pad))
        shapes["value_in"] = (4, dtype, (s.dim, s.num_heads * head_pad))
        shapes["value_out"] = (5, dtype, (attention, dim_pad))
    else:
        shapes["score_out"] = (3, dtype, (s.dim, s.num_heads * dim_pad))
        shapes["value_in"] = (4, dtype, (s.num_heads * s.dim, dim_pad))
    for name, (index, kind, shape) in shapes.items():
        check_tensor(tensors[index], f"readout.{name}", kind, shape, device)
    check_aligned(tensors, "readout")
    return factored


def check_heads(s: Sizes, tensors: Sequence[Tensor], device: torch.device) -> torch.dtype:
    """Checks `PackedWeights.heads`; their dtype."""
    check_count(tensors, 2 + 5 * s.num_levels, "heads")
    dtype = weight_dtype(tensors[0], "heads.context_weight")
    stride = padded(s.hidden_dim)
    width = s.num_levels * stride
    check_tensor(tensors[0], "heads.context_weight", dtype, (s.dim, width), device)
    check_tensor(tensors[1], "heads.context_bias", torch.float32, (width,), device)
    prefix_rows = 0
    for level, codes in enumerate(s.num_codes):
        own, at = tensors[2 + 5 * level : 7 + 5 * level], f"heads.{level}."
        check_tensor(own[0], at + "vectors", torch.float32, (3 * s.num_blocks - 1, stride), device)
        check_tensor(own[1], at + "prefix_table", dtype, (prefix_rows, stride), device)
        blocks = (s.num_blocks - 1, s.hidden_dim, stride)
        check_tensor(own[2], at + "block_weight", dtype, blocks, device)
        rows = codes + -codes % CODE_ROWS
        check_tensor(own[3], at + "out_weight", dtype, (rows, stride), device)
        check_tensor(own[4], at + "out_bias", torch.float32, (codes,), device)
        prefix_rows += codes
    check_aligned(tensors, "heads")
    return dtype


def check_catalogue(s: Sizes, tensors: Sequence[Tensor], device: torch.device) -> list[int]:
    """Checks trie tensors (sidmlp_kernels.trie); the number of nodes of each level."""
    check_count(tensors, 2 * s.num_levels + 3, "catalogue")
    parents, nodes = 1, []
    for level in range(s.num_levels):
        at = f"catalogue level {level + 1} "
        count = tensors[2 * level + 1].numel()
        if not 1 <= count < 2**31:
            fail(f"{at}codes: expected 1..2147483647 nodes, got {count}")
        begin = tensors[2 * level]
        check_tensor(begin, at + "child_begin", torch.int32, (parents + 1,), device)
        check_tensor(tensors[2 * level + 1], at + "codes", torch.int16, (count,), device)
        nodes.append(count)
        parents = count
    leaf_begin, item_ids, available = tensors[2 * s.num_levels :]
    items = item_ids.numel()
    check_tensor(leaf_begin, "catalogue leaf_begin", torch.int32, (parents + 1,), device)
    check_tensor(item_ids, "catalogue leaf_item_ids", torch.int64, (items,), device)
    check_tensor(available, "catalogue leaf_available", torch.uint8, (items,), device)
    return nodes


@dataclass(frozen=True)
class Settings:
    """k, num_beams, .. of a decode, checked; numbers as float32 has them."""

    k: int
    num_beams: int
    codebook: bool
    temperatures: tuple[float, ...]
    level_weights: tuple[float, ...]
    level_modes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        s: Sizes,
        k: int,
        num_beams: int,
        codebook: bool,
        temperatures: Sequence[float],
        level_weights: Sequence[float],
        level_modes: Sequence[int],
    ) -> Settings:
        """From an operator's arguments."""
        check_size(num_beams, 1, MAX_NUM_BEAMS, "num_beams")
        check_size(k, 1, num_beams, "k (at most num_beams)")
        given = {
            "temperatures": temperatures,
            "level_weights": level_weights,
            "level_modes": level_modes,
        }
        for name, values in given.items():
            if len(values) != s.num_levels:
                fail(f"{name}: expected {s.num_levels} numbers, got {len(values)}")
        single = torch.tensor([list(temperatures), list(level_weights)], dtype=torch.float64)
        t, w = (tuple(row) for row in single.float().tolist())
        if not all(math.isfinite(x) and x > 0 for x in t):
            fail(
                "temperatures: expected finite numbers above 0 (in float32), got "
                f"{list(temperatures)}"
            )
        if not all(math.isfinite(x) for x in w):
            fail(f"level_weights: expected finite numbers, got {list(level_weights)}")
        if any(mode not in (0, 1) for mode in level_modes):
            fail(f"level_modes: expected 0 (sparse) or 1 (dense), got {list(level_modes)}")
        return cls(k, num_beams, codebook, t, w, tuple(level_modes))


def check_launches(launches: int) -> None:
    """Raises for a decode in two launches, which the CUDA backend alone has."""
    if launches != 1:
        fail(f"launches: expected 1 on Triton, got {launches}")


def check_place(first: Tensor, name: str, device: torch.device) -> None:
    """Raises unless the call's first tensor is where the weights are."""
    if first.device != device:
        kind = "a CUDA tensor" if device.type == "cuda" else "a tensor"
        fail(
            f"{name}: expected {kind} on {device} as the other arguments, got one on {first.device}"
        )


def check_states(s: Sizes, states: Tensor, mask: Tensor, device: torch.device) -> None:
    """Raises unless states are [B, T, D] and the mask bool [B, T]."""
    check_place(states, "states", device)
    if states.dim() != 3:
        fail(f"states: expected [batch, tokens, dim], got {list(states.shape)}")
    batch, tokens = states.shape[:2]
    if tokens > MAX_WIDTH:
        fail(f"states: expected at most {MAX_WIDTH} tokens, got {tokens}")
    dtype = weight_dtype(states, "states")
    check_tensor(states, "states", dtype, (batch, tokens, s.dim), device)
    check_tensor(mask, "mask", torch.bool, (batch, tokens), device)


def check_context(s: Sizes, context: Tensor, device: torch.device) -> None:
    """Raises unless contexts are float32 [B, D]."""
    check_place(context, "context", device)
    if context.dim() != 2:
        fail(f"context: expected [batch, dim], got {list(context.shape)}")
    check_tensor(context, "context", torch.float32, (context.shape[0], s.dim), device)


def check_exclusion(
    ids: Tensor | None, offsets: Tensor | None, batch: int, device: torch.device
) -> None:
    """Raises unless both are None or ids int64 [n] and offsets int64 [batch + 1]."""
    if (ids is None) != (offsets is None):
        fail("exclude_ids and exclude_offsets: expected both or neither, got one of them")
    if ids is None or offsets is None:
        return
    if ids.numel() >= 2**31:
        fail(f"exclude_ids: expected fewer than 2147483648 ids, got {ids.numel()}")
    check_tensor(ids, "exclude_ids", torch.int64, (ids.numel(),), device)
    check_tensor(offsets, "exclude_offsets", torch.int64, (batch + 1,), device)
