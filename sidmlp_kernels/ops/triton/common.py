"""What every kernel here shares: constants, choosing among levels, GELU, LayerNorm, finiteness.

Rounding contract (batch invariance): the shape of every tile, and with it the order of every sum,
depends on model, settings, catalogue and GPU. A batch changes only how many rows are real.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_ROWS = tl.constexpr(16)  # rows of a tile that several requests share; 16 = one mma tile
LARGEST = tl.constexpr(3.402823466e38)  # of finite float32 numbers


@triton.jit
def at_level(values, level):
    """values[level] of a tuple of scalars or pointers, for a level known at run time."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
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
    if FITTED:  # coefficients times -log2(e)
        u = x * x
        p = -3.2289869e-06
        p = p * u + 8.8238107e-05
        p = p * u + 3.6027472e-04
        p = p * u - 1.0522668e-01
        p = p * u - 2.3020453e00
        return x / (1.0 + tl.exp2(x * p))
    else:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def load_vector(vector, column, FULL: tl.constexpr, width):
    """A padded float32 vector; FULL: it has as many elements as there are columns."""
    if FULL:
        return tl.load(vector + column)
    return tl.load(vector + column, mask=column < width, other=0.0)


@triton.jit
def layer_norm(z, column, width, eps, gain, shift, FULL: tl.constexpr = False):
    """LayerNorm of each row of z [R, N] over its first `width` columns; padding comes out zero.

    gain, shift: float32 [N], zero from `width` on, as z is. FULL: width is N.
    """
    mean = tl.sum(z, 1) / width
    centred = z - mean[:, None]
    if not FULL:
        centred = tl.where(column[None, :] < width, centred, 0.0)
    variance = tl.sum(centred * centred, 1) / width
    scale = 1.0 / tl.sqrt_rn(variance + eps)
    return centred * scale[:, None] * gain[None, :] + shift[None, :]
