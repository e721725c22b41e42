"""The heads: h = GELU(LN(W_1 [ctx; e(c_1); ..] + b_1)), further blocks h <- GELU(LN(W h + b)).

The first layer is a context part, computed once per request for every head, plus one gathered row
of the prefix tables per earlier code. Rows of h lie in scratch memory in the dtype of the weights,
where `product` and the dot products of sparse levels read them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import gelu, layer_norm, load_vector, padded
from .product import product


@triton.jit
def code_of(words, level: tl.constexpr):
    """Code number `level` of prefixes packed 16 bits a code into two int64 words."""
    return (words[level // 4] >> (16 * (level % 4))) & 0xFFFF


@triton.jit(noinline=True)
def further_blocks(
    hidden,
    z,  # float32 scratch [rows, Hp]
    rows,
    width,
    block_weight,
    vectors,
    num_blocks,
    eps,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    FITTED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Blocks 1.. on `rows` rows of hidden, in place. Begins after a barrier and ends with one."""
    stride = padded(width)
    column = tl.arange(0, COLUMNS)
    for block in range(1, num_blocks):
        bias = vectors + (3 * block - 1) * stride
        weight = block_weight + tl.cast(block - 1, tl.int64) * width * stride
        product(
            hidden, stride, rows, weight, stride, width, stride, bias, z, stride, z,
            M, N, K, STAGES, X_IS_PADDED=True,
        )  # fmt: skip
        gain = load_vector(bias + stride, column, FULL, width)
        shift = load_vector(bias + 2 * stride, column, FULL, width)
        tl.debug_barrier()
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row[:, None] < rows) & (column[None, :] < stride)
            at = row[:, None] * stride + column[None, :]
            x = tl.load(z + at, mask=inside, other=0.0)
            x = gelu(layer_norm(x, column, width, eps, gain, shift, FULL), FITTED)
            tl.store(hidden + at, x.to(hidden.dtype.element_ty), mask=inside)
        tl.debug_barrier()


@triton.jit(noinline=True)
def hidden_rows(
    first_layer,  # float32 [.., Hp], context parts; rows first_stride apart unless SHARED
    first_stride,
    words,  # pair of pointers to int64 [rows]: prefixes, see code_of
    level,  # codes of a prefix
    rows,
    width,
    prefix_table,
    num_codes,
    vectors,
    eps,
    hidden,  # [rows, Hp]
    ROWS: tl.constexpr,  # rows of a tile
    COLUMNS: tl.constexpr,  # at least Hp
    FITTED: tl.constexpr,
    FULL: tl.constexpr,  # width is COLUMNS
    SHARED: tl.constexpr,  # one context part for all rows
    PREFIXED: tl.constexpr,  # there are earlier codes
):
    """hidden <- the first block of a head on `rows` prefixes. The caller sets the barriers."""
    stride = padded(width)
    column = tl.arange(0, COLUMNS)
    gain = load_vector(vectors, column, FULL, width)
    shift = load_vector(vectors + stride, column, FULL, width)
    if SHARED:
        context_part = load_vector(first_layer, column, FULL, width)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < rows
        inside = live[:, None]
        if not FULL:
            inside = inside & (column[None, :] < stride)
        if SHARED:
            z = tl.broadcast_to(context_part[None, :], [ROWS, COLUMNS])
        else:
            at = row[:, None] * first_stride + column[None, :]
            z = tl.load(first_layer + at, mask=inside, other=0.0)
        if PREFIXED:
            low = tl.load(words[0] + row, mask=live, other=0)
            high = tl.load(words[1] + row, mask=live & (level > 4), other=0)
            offset = 0
            for i in tl.static_range(len(num_codes) - 1):
                if i < level:
                    table_row = offset + code_of((low, high), i)
                    entry = prefix_table + table_row[:, None] * stride + column[None, :]
                    z += tl.load(entry, mask=inside, other=0.0).to(tl.float32)
                offset += num_codes[i]
        x = gelu(layer_norm(z, column, width, eps, gain, shift, FULL), FITTED)
        tl.store(
            hidden + row[:, None] * stride + column[None, :],
            x.to(hidden.dtype.element_ty),
            mask=inside,
        )
