"""What every kernel here shares: constants, choosing among levels, GELU, LayerNorm, finiteness.

Rounding contract (batch invariance): the shape of every tile, and with it the order of every sum,
depends on the sizes of the model alone. A batch changes only how many rows of a tile are real.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LEVELS = tl.constexpr(8)
GROUP_ROWS = tl.constexpr(16)  # rows of a tile that several requests share; 16 = one mma tile
LARGEST = tl.constexpr(3.402823466e38)  # of finite float32 numbers


@triton.jit
def at_level(values, level):
    """values[level] of a tuple of MAX_LEVELS scalars or pointers, for a level known at run time."""
    found = values[0]
    for i in tl.static_range(1, MAX_LEVELS):
        found = tl.where(level == i, values[i], found)
    return found


@triton.jit
def padded(n):
    """n rounded up to the 16 elements of a padded row (csrc/sidmlp/views.h)."""
    return (n + 15) // 16 * 16


@triton.jit
def is_finite(x):
    return tl.abs(x) <= LARGEST  # false for NaN


@triton.jit
def gelu(x, FITTED: tl.constexpr):
    """x Phi(x). FITTED: Phi as the sigmoid of an odd polynomial, off by at most 3.1e-6 in x Phi(x);
    a least-squares fit reweighted towards the largest error, over [-5.5, 5.5]."""
    if FITTED:
        u = x * x
        p = 2.2381632526218138e-06
        p = p * u - 6.116199321856644e-05
        p = p * u - 0.00024972336947447227
        p = p * u + 0.07293758207250922
        p = p * u + 1.5956562719565928
        return x / (1.0 + tl.exp2(x * p * -1.4426950408889634))
    else:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def layer_norm(z, column, width, eps, gain, shift):
    """LayerNorm of each row of z [R, N] over its first `width` columns; padding comes out zero.

    gain, shift: pointers to float32 vectors padded with zeros; z is zero from `width` on.
    """
    inside = column[None, :] < width
    mean = tl.sum(z, 1) / width
    centred = tl.where(inside, z - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    scale = 1.0 / tl.sqrt_rn(variance + eps)
    g = tl.load(gain + column, mask=column < width, other=0.0)
    s = tl.load(shift + column, mask=column < width, other=0.0)
    return centred * scale[:, None] * g[None, :] + s[None, :]
