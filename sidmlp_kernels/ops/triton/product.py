"""y [rows, columns] = x [rows, inner] w (+ bias): the matrix product that every stage is made of.

One program computes all of it, tile by tile; the loop over (column tile, inner tile) is one loop so
that weights of the next tile are on their way while this one is multiplied. Operands have the
dtype of the weights (tensor cores for half precision; float32 stays float32, no tf32), sums are
float32, inner tiles in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import padded


@triton.jit
def zero_of(vector):
    """0.0, which the compiler does not know to be: it makes one sum of a + dot(x, y, 0)."""
    return tl.load(vector) * 0.0


@triton.jit
def dot_onto(total, a, b, start):
    """total + a b in float32. Of float32 operands each tile is summed by itself, from `start`, a
    zero: one long running sum loses four times more."""
    if a.dtype == tl.float32:
        return total + tl.dot(a, b, tl.zeros_like(total) + start, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit(noinline=True)
def product(
    x,  # [rows, inner], rows x_stride apart, in the dtype of the weights
    x_stride,
    rows,
    w,  # [inner, columns], or with ROW_PER_COLUMN [columns, inner]; rows w_stride apart
    w_stride,
    inner,
    columns,
    bias,  # float32 [columns]; without HAS_BIAS any finite vector
    y,  # [rows, columns], rows y_stride apart; rounded to its dtype
    y_stride,
    low,  # with HAS_LOW a second result like y, in the dtype of the weights
    M: tl.constexpr,  # rows of a tile, at least `rows`
    N: tl.constexpr,  # columns of a tile
    K: tl.constexpr,  # inner elements of a tile
    STAGES: tl.constexpr,
    ROW_PER_COLUMN: tl.constexpr = False,
    X_IS_PADDED: tl.constexpr = False,  # zeros follow each row up to a multiple of 16
    EVEN: tl.constexpr = False,  # N divides columns and K inner
    HAS_BIAS: tl.constexpr = True,
    RELU: tl.constexpr = False,
    HAS_LOW: tl.constexpr = False,
):
    dtype = w.dtype.element_ty
    inner_end = padded(inner) if X_IS_PADDED else inner
    row = tl.arange(0, M)
    k = tl.arange(0, K)
    n = tl.arange(0, N)
    live = row[:, None] < rows
    a_at = row[:, None] * x_stride + k[None, :]
    if ROW_PER_COLUMN:
        b_at = n[:, None] * w_stride + k[None, :]
    else:
        b_at = k[:, None] * w_stride + n[None, :]
    y_at = row[:, None] * y_stride + n[None, :]
    zero = tl.zeros([M, N], tl.float32)
    start = zero_of(bias)
    total = zero
    k0 = 0
    n0 = 0
    for _ in tl.range(0, tl.cdiv(columns, N) * tl.cdiv(inner, K), num_stages=STAGES):
        if EVEN:
            a = tl.load(x + k0 + a_at, mask=live, other=0.0)
        else:
            inside = k[None, :] + k0 < inner_end
            a = tl.load(x + k0 + a_at, mask=live & inside, other=0.0)
        if ROW_PER_COLUMN:
            tile = w + tl.cast(n0, tl.int64) * w_stride + k0
            if EVEN:
                b = tl.load(tile + b_at)
            else:
                real = (n[:, None] + n0 < columns) & (k[None, :] + k0 < inner_end)
                b = tl.load(tile + b_at, mask=real, other=0.0)
            b = b.trans()
        else:
            tile = w + tl.cast(k0, tl.int64) * w_stride + n0
            if EVEN:
                b = tl.load(tile + b_at)
            else:
                real = (k[:, None] + k0 < inner) & (n[None, :] + n0 < columns)
                b = tl.load(tile + b_at, mask=real, other=0.0)
        if HAS_BIAS:  # loaded ahead like the tiles, though used by the last inner tile alone
            if EVEN:
                c = tl.load(bias + n0 + n)
            else:
                c = tl.load(bias + n0 + n, mask=n0 + n < columns, other=0.0)
        total = dot_onto(total, a, b, start)
        k0 += K
        last = k0 >= inner
        if last:
            out = total
            if HAS_BIAS:
                out += c[None, :]
            if RELU:
                out = tl.where(out < 0.0, 0.0, out)  # max would drop a NaN
            real_y = live
            if not EVEN:
                real_y = live & (n[None, :] + n0 < columns)
            tl.store(y + n0 + y_at, out.to(y.dtype.element_ty), mask=real_y)
            if HAS_LOW:
                tl.store(low + n0 + y_at, out.to(dtype), mask=real_y)
            total = zero
        n0 = tl.where(last, n0 + N, n0)
        k0 = tl.where(last, 0, k0)
