"""SID-MLP++'s encoder (sidmlp_kernels/mlp_encoder.py has the equations): layers + 1 launches.

    embed   lists a request's valid tokens by role, x = embedding + position
    layer   m = mean of x, x <- x + MLP_r([x; m]); in the last one the states

A program takes ROWS valid tokens of one role of one request, and each token passes through its own
role's MLP only. Every program of a request computes the mean itself, from the x of the layer
before; x has two places, since programs of one launch still read a layer's while others write the
next one's. The half of the first Linear that reads the mean is computed once for the program's
rows. Hidden rows lie in a program's slice of the workspace between the two Linears, float32, for
LayerNorm needs all of a row; programs are few enough for the caches and take tile after tile. x,
LayerNorm and sums are float32; what a product reads is rounded to the dtype of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import gelu, layer_norm
from .encoder_rows import (
    array,
    clear_masked,
    keep_rows,
    list_tokens,
    rows_times,
    store_states,
)
from .product import dot_onto, zero_of

MEAN_ROWS = tl.constexpr(16)  # copies of the mean, the rows of a tile

# Numbers of the workspace's arrays, in the order of encoder_bound.py.
COUNTS = tl.constexpr(0)  # int32 [requests, R], -1 for one with an unknown id
LISTED = tl.constexpr(1)  # int32 [requests, R, tokens]: positions of a role's tokens
X = tl.constexpr(2)  # float32 [requests, tokens, DP], by position
NEXT_X = tl.constexpr(3)
HIDDEN_ROWS = tl.constexpr(4)  # float32 [programs, ROWS, Hp]
LOW = tl.constexpr(5)  # [programs, ROWS + 1, DP] in the dtype of the weights, where INNER < DP


@triton.jit
def mlp_embed_kernel(
    ids,
    mask,
    states,  # [batch, tokens, D]
    embedding,
    embedding_positions,
    first_request,  # of this launch
    tokens,
    blocks,  # programs of a role
    workspace,
    offsets,
    vocab_size,
    num_roles,
    dim,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """Valid tokens by role, and their embeddings."""
    role_number = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * ROWS
    own = role_number // num_roles
    role = role_number % num_roles
    request = tl.cast(first_request + own, tl.int64)
    base = tl.cast(own, tl.int64) * tokens
    listed = array(workspace, offsets[LISTED], tl.int32) + tl.cast(role_number, tl.int64) * tokens
    ids += request * tokens
    mask += request * tokens
    states += request * tokens * dim

    count, bad = list_tokens(
        ids, mask, tokens, vocab_size, num_roles, role, first, listed, TOKENS, ROWS
    )  # fmt: skip
    if first == 0:
        shown = tl.where(bad == 0, count, -1)
        tl.store(array(workspace, offsets[COUNTS], tl.int32) + role_number, shown)
    share = role * blocks * ROWS + first  # of the request's masked tokens
    for begin in range(share, tokens, num_roles * blocks * ROWS):
        clear_masked(states, mask, tokens, begin, dim, ROWS, DP)
    tl.debug_barrier()
    if first < count:
        row = first + tl.arange(0, ROWS)
        live = row < count
        token = tl.load(listed + row, mask=live, other=0)
        if bad != 0:
            nan = tl.full([ROWS, DP], float("nan"), tl.float32)
            store_states(states, token, live, nan, dim, DP)
        else:
            column = tl.arange(0, DP)
            number = tl.load(ids + token, mask=live, other=0)
            inside = live[:, None]
            at = number[:, None] * DP + column[None, :]
            x = tl.load(embedding + at, mask=inside, other=0.0).to(tl.float32)
            at = token[:, None] * DP + column[None, :]
            x += tl.load(embedding_positions + at, mask=inside, other=0.0).to(tl.float32)
            out = array(workspace, offsets[NEXT_X], tl.float32)
            tl.store(out + (base + token[:, None]) * DP + column[None, :], x, mask=inside)


@triton.jit
def mean_of(
    x,  # float32 [tokens, DP] of the request
    counts,  # int32 [R]
    listed,  # int32 [R, tokens]
    tokens,
    num_roles,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """Mean over the request's valid tokens, [DP]; role by role, whatever the padding."""
    column = tl.arange(0, DP)
    total = tl.zeros([ROWS, DP], tl.float32)
    every = 0
    for role in range(num_roles):
        count = tl.load(counts + role)
        every += count
        for begin in range(0, count, ROWS):
            row = begin + tl.arange(0, ROWS)
            live = row < count
            token = tl.load(listed + role * tokens + row, mask=live, other=0)
            at = token[:, None].to(tl.int64) * DP + column[None, :]
            total += tl.load(x + at, mask=live[:, None], other=0.0)
    return tl.sum(total, 0) / every


@triton.jit
def mlp_layer_kernel(
    states,
    norm,
    token_weight,
    mean_weight,
    vectors,
    out_weight,
    out_bias,
    first_request,
    roles,  # requests times roles
    tokens,
    blocks,
    workspace,
    offsets,
    num_roles,
    dim,
    hidden_dim,
    width,  # the hidden width, padded
    last,  # whether there is no next layer
    eps,
    FITTED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    DP: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One layer, tile after tile of a request's tokens of one role."""
    kind: tl.constexpr = token_weight.dtype.element_ty
    slice_number = tl.cast(tl.program_id(0), tl.int64)
    hidden = array(workspace, offsets[HIDDEN_ROWS], tl.float32) + slice_number * ROWS * width
    low = array(workspace, offsets[LOW], kind) + slice_number * (ROWS + 1) * DP
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    c = tl.arange(0, HIDDEN)
    hidden_at = hidden + lane[:, None] * width + c[None, :]
    low_at = low + lane[:, None] * DP
    mean_lane = tl.arange(0, MEAN_ROWS)
    mean_live = mean_lane >= 0
    mean_at = low + ROWS * DP + mean_lane[:, None] * 0  # one row in memory
    start = zero_of(norm)
    for item in range(tl.program_id(0), roles * blocks, tl.num_programs(0)):
        role_number = item // blocks
        first = (item % blocks) * ROWS
        own = role_number // num_roles
        role = role_number % num_roles
        count = tl.load(array(workspace, offsets[COUNTS], tl.int32) + role_number)
        if first < count:
            base = tl.cast(own, tl.int64) * tokens
            counts = array(workspace, offsets[COUNTS], tl.int32) + own * num_roles
            listed = array(workspace, offsets[LISTED], tl.int32) + base * num_roles
            x_of = array(workspace, offsets[X], tl.float32) + base * DP
            row = first + lane
            live = row < count
            token = tl.load(listed + role * tokens + row, mask=live, other=0)
            at = token[:, None].to(tl.int64) * DP + column[None, :]

            mean = mean_of(x_of, counts, listed, tokens, num_roles, ROWS, DP)
            means = tl.broadcast_to(mean[None, :], [MEAN_ROWS, DP]).to(kind)
            x = tl.load(x_of + at, mask=live[:, None], other=0.0)
            x_low = x.to(kind)
            if INNER < DP:
                tl.debug_barrier()
                tl.store(low + ROWS * DP + column, mean.to(kind))
            keep_rows(x_low, low_at, live, DP, INNER)

            # z, with the mean and the sum of squared differences of what is there so far
            big = tl.cast(role, tl.int64) * width
            own_token, own_mean = token_weight + big * DP, mean_weight + big * DP
            own_vectors = vectors + big * 3
            average = tl.zeros([ROWS], tl.float32)
            spread = tl.zeros([ROWS], tl.float32)
            tl.debug_barrier()  # hidden rows of the tile before have been read
            for c0 in tl.range(0, hidden_dim, HIDDEN, num_stages=STAGES):
                z = rows_times(
                    x_low, low_at, live, own_token + c0, width, start, ROWS, HIDDEN, DP, INNER
                )  # fmt: skip
                shared = rows_times(
                    means, mean_at, mean_live, own_mean + c0, width, start, MEAN_ROWS, HIDDEN, DP,
                    INNER,
                )  # fmt: skip
                shared = tl.sum(tl.where(mean_lane[:, None] == 0, shared, 0.0), 0)
                z += (shared + tl.load(own_vectors + c0 + c))[None, :]
                tl.store(hidden_at + c0, z)
                real = (c0 + c < hidden_dim)[None, :]
                size = tl.minimum(hidden_dim - c0, HIDDEN).to(tl.float32)
                part = tl.sum(tl.where(real, z, 0.0), 1) / size
                apart = tl.where(real, z - part[:, None], 0.0)
                known = tl.cast(c0, tl.float32)
                step = part - average
                average += step * (size / (known + size))
                spread += tl.sum(apart * apart, 1) + step * step * (known * size / (known + size))
            scale = 1.0 / tl.sqrt_rn(spread / hidden_dim + eps)
            tl.debug_barrier()

            x += tl.load(out_bias + role * DP + column)[None, :]
            own_out = out_weight + big * DP
            for c0 in tl.range(0, hidden_dim, HIDDEN, num_stages=STAGES):
                z = tl.load(hidden_at + c0)
                gain = tl.load(own_vectors + width + c0 + c)
                shift = tl.load(own_vectors + 2 * width + c0 + c)
                z = (z - average[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
                b = tl.load(own_out + (c0 + c)[:, None] * DP + column[None, :])
                x = dot_onto(x, gelu(z, FITTED).to(kind), b, start)
            if last != 0:
                request = tl.cast(first_request + own, tl.int64)
                gain, shift = tl.load(norm + column), tl.load(norm + DP + column)
                y = layer_norm(x, column, dim, eps, gain, shift)
                store_states(states + request * tokens * dim, token, live, y, dim, DP)
            else:
                out = array(workspace, offsets[NEXT_X], tl.float32) + base * DP
                tl.store(out + at, x, mask=live[:, None])
