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
def product(
    x,  # [rows, inner], rows x_stride apart
    x_stride,
    rows,
    w,  # [inner, columns], or with ROW_PER_COLUMN [columns, inner]; rows w_stride apart
    w_stride,
    inner,
    columns,
    bias,  # float32 [columns]
    y,  # float32 [rows, columns], rows y_stride apart
    y_stride,
    M: tl.constexpr,  # rows of a tile, at least `rows`
    N: tl.constexpr,  # columns of a tile
    K: tl.constexpr,  # inner elements of a tile
    STAGES: tl.constexpr,
    ROW_PER_COLUMN: tl.constexpr = False,
    X_IS_PADDED: tl.constexpr = False,  # zeros follow each row up to a multiple of 16
    HAS_BIAS: tl.constexpr = True,
    RELU: tl.constexpr = False,
):
    dtype = w.dtype.element_ty
    inner_tiles = tl.cdiv(inner, K)
    inner_end = padded(inner) if X_IS_PADDED else inner
    row = tl.arange(0, M)
    zero = tl.zeros([M, N], tl.float32)
    total = zero
    for tile in tl.range(0, tl.cdiv(columns, N) * inner_tiles, num_stages=STAGES):
        k = tile % inner_tiles * K + tl.arange(0, K)
        n = tile // inner_tiles * N + tl.arange(0, N)
        a = tl.load(
            x + row[:, None] * x_stride + k[None, :],
            mask=(row[:, None] < rows) & (k[None, :] < inner_end),
            other=0.0,
        ).to(dtype)
        if ROW_PER_COLUMN:
            b = tl.load(
                w + n[:, None] * w_stride + k[None, :],
                mask=(n[:, None] < columns) & (k[None, :] < inner_end),
                other=0.0,
            ).trans()
        else:
            b = tl.load(
                w + k[:, None] * w_stride + n[None, :],
                mask=(k[:, None] < inner) & (n[None, :] < columns),
                other=0.0,
            )
        total = tl.dot(a, b, total, input_precision="ieee")
        if tile % inner_tiles == inner_tiles - 1:
            out = total
            if HAS_BIAS:
                out += tl.load(bias + n, mask=n < columns, other=0.0)[None, :]
            if RELU:
                out = tl.where(out < 0.0, 0.0, out)  # max would drop a NaN
            tl.store(
                y + row[:, None] * y_stride + n[None, :],
                out,
                mask=(row[:, None] < rows) & (n[None, :] < columns),
            )
            total = zero
