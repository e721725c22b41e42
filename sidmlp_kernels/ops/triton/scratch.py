"""Where the scratch arrays of one program lie in its slice of the workspace, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

from sidmlp_kernels.ops.triton.problem import Sizes, padded

ALIGNMENT = 256  # of every array and slice

# Numbers of the arrays, in the order of `layout_of`.
VALID = tl.constexpr(0)
COUNTS = tl.constexpr(1)
MEAN = tl.constexpr(2)
QUERY = tl.constexpr(3)
QUERY_LOW = tl.constexpr(4)
HEAD_ROWS = tl.constexpr(5)
FOLDED = tl.constexpr(6)
WEIGHTS = tl.constexpr(7)
POOLED = tl.constexpr(8)
ADDED = tl.constexpr(9)
SUM = tl.constexpr(10)
SUM_LOW = tl.constexpr(11)
FFN = tl.constexpr(12)
CONTEXT = tl.constexpr(13)
FIRST = tl.constexpr(14)
ROOT_LOGITS = tl.constexpr(15)
HIDDEN = tl.constexpr(16)
NEXT = tl.constexpr(17)
WORDS_LOW = tl.constexpr(18)
WORDS_HIGH = tl.constexpr(19)
PAIR_ROW = tl.constexpr(20)
PAIR_CODE = tl.constexpr(21)
LOGITS = tl.constexpr(22)
KEYS = tl.constexpr(23)
NUM_ARRAYS = 24


@dataclass(frozen=True)
class Layout:
    """offsets of the arrays in a slice, and the slice's size, in bytes."""

    offsets: tuple[int, ...]
    slice_bytes: int


def layout_of(
    s: Sizes,
    *,
    group: int,
    tokens: int | None,
    rows: int,
    chunk: int,
) -> Layout:
    """Scratch of one program.

    group   requests that it takes together
    tokens  T of the encoder states; None without a readout
    rows    of hidden vectors
    chunk   beams that are expanded together; 0 without a beam search
    """
    dim, hidden, ffn = padded(s.dim), padded(s.hidden_dim), padded(s.ffn_dim)
    heads, token_pad = s.num_heads, padded(tokens or 0)
    in_readout = group if tokens is not None else 0
    widest = max(s.num_codes)
    candidates = chunk * widest
    sizes = (  # bytes; 4 stands for float32 and for the weights, whatever their dtype
        4 * in_readout * token_pad,
        4 * in_readout,
        4 * in_readout * dim,
        4 * in_readout * dim,
        4 * in_readout * dim,
        4 * in_readout * heads * dim,
        4 * in_readout * heads * padded(s.head_dim),
        4 * (heads if in_readout else 0) * token_pad,
        4 * in_readout * heads * s.dim,
        4 * in_readout * dim,
        4 * in_readout * dim,
        4 * in_readout * dim,
        4 * in_readout * ffn,
        4 * group * dim,
        4 * group * s.num_levels * hidden if rows else 0,
        4 * group * s.num_codes[0] if rows else 0,
        4 * rows * hidden,
        4 * rows * hidden if s.num_blocks > 1 else 0,
        8 * rows,
        8 * rows,
        4 * candidates,
        4 * candidates,
        4 * candidates,
        8 * candidates,
    )
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(offsets), max(end, ALIGNMENT))
