"""What both encoders do with rows of tokens: list them, read embeddings, norm, multiply.

A program holds ROWS rows of [.., DP] in registers, where DP is D padded with zeros to a power of
two. Rows past a request's last are zeros and are never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .product import dot_onto


@triton.jit
def array(base, offset, dtype: tl.constexpr):
    """An array of the workspace that begins `offset` bytes behind `base`."""
    return (base + offset).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def list_tokens(
    ids,  # int64 [tokens] of the request
    mask,  # bool [tokens]
    tokens,
    vocab_size,
    num_roles,
    role,  # whose tokens are listed; -1: all
    first,  # of the list that is stored
    listed,  # int32: positions of tokens number first .. first + ROWS - 1
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Lists the valid tokens of a role by position; (how many there are, whether the request has a
    valid id outside the vocabulary). Role of token t: (t - 1) mod num_roles, but num_roles - 1 of
    the last valid token."""
    lane = tl.arange(0, TOKENS)
    last = -1
    bad = 0
    for base in range(0, tokens, TOKENS):
        token = base + lane
        valid = tl.load(mask + token, mask=token < tokens, other=0) != 0
        number = tl.load(ids + token, mask=valid, other=0)
        unknown = valid & ((number < 0) | (number >= vocab_size))
        bad = tl.maximum(bad, tl.max(unknown.to(tl.int32), 0))
        last = tl.maximum(last, tl.max(tl.where(valid, token, -1), 0))
    count = 0
    for base in range(0, tokens, TOKENS):
        token = base + lane
        keep = tl.load(mask + token, mask=token < tokens, other=0) != 0
        if role >= 0:
            own = (token + num_roles - 1) % num_roles == role
            ends = token == last
            keep = keep & tl.where(ends, role == num_roles - 1, own)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        inside = keep & (place >= first) & (place < first + ROWS)
        tl.store(listed + place, token, mask=inside)
        count += tl.sum(keep.to(tl.int32), 0)
    return count, bad


@triton.jit
def clear_masked(
    states, mask, tokens, first, dim, ROWS: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """States of masked tokens among first .. first + ROWS - 1 <- 0."""
    token = first + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    dropped = (token < tokens) & (tl.load(mask + token, mask=token < tokens, other=1) == 0)
    at = token[:, None].to(tl.int64) * dim + column[None, :]
    nothing = tl.zeros([ROWS, DP], states.dtype.element_ty)
    tl.store(states + at, nothing, mask=dropped[:, None] & (column[None, :] < dim))


@triton.jit
def store_states(states, token, live, x, dim, DP: tl.constexpr):
    """states[token] <- x, rounded."""
    column = tl.arange(0, DP)
    at = token[:, None].to(tl.int64) * dim + column[None, :]
    inside = live[:, None] & (column[None, :] < dim)
    tl.store(states + at, x.to(states.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(x, dim, eps, gain, DP: tl.constexpr):
    """gain * x / sqrt(mean(x^2) + eps); gain float32 [DP]."""
    mean = tl.sum(x * x, 1) / dim
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    return x * scale[:, None] * tl.load(gain + tl.arange(0, DP))[None, :]


@triton.jit
def rows_times(
    a,  # [R, DP] in the dtype of the weights
    a_at,  # pointers [R, 1] to the same rows in memory, which are read where INNER < DP
    live,  # [R]
    w,  # [DP, ..], to the first of N columns
    w_stride,
    start,  # a zero, see dot_onto
    R: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    INNER: tl.constexpr,
):
    """float32 [R, N]: rows times N columns of a matrix."""
    column = tl.arange(0, N)
    k = tl.arange(0, INNER)
    total = tl.zeros([R, N], tl.float32)
    if INNER == DP:
        b = tl.load(w + k[:, None] * w_stride + column[None, :])
        total = dot_onto(total, a, b, start)
    else:
        for k0 in range(0, DP, INNER):
            part = tl.load(a_at + k0 + k[None, :], mask=live[:, None], other=0.0)
            b = tl.load(w + (k0 + k)[:, None] * w_stride + column[None, :])
            total = dot_onto(total, part, b, start)
    return total


@triton.jit
def keep_rows(rows, at, live, DP: tl.constexpr, INNER: tl.constexpr):
    """Writes rows [R, DP] where rows_times reads them again; then, and before, a barrier."""
    if INNER < DP:
        tl.debug_barrier()
        tl.store(at + tl.arange(0, DP)[None, :], rows, mask=live[:, None])
        tl.debug_barrier()
