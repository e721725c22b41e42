"""T5's encoder (sidmlp_kernels/encoder.py has the equations): layers + 1 launches.

    embed   lists a request's valid tokens, x = embed(ids), then queries, keys and values of layer 0
    layer   attention, output product, feed-forward; then queries, keys and values of the next
            layer, or the states

A program takes ROWS valid tokens of one request, so that padding costs nothing but programs that
end at once. A row needs other rows' keys and values only, which is why a launch goes from one
attention to the next: the launch is the barrier. Between launches the residual (float32), queries,
keys and values lie in a workspace, which stays in the caches for all but large batches; keys and
values have two places, since programs of one launch still read a layer's while others write the
next one's. Attention takes KEYS keys at a time with a running maximum, so histories may be of any
length. The residual, norms, softmax and sums are float32; what a product reads is rounded to the
dtype of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import gelu
from .encoder_rows import (
    array,
    clear_masked,
    keep_rows,
    list_tokens,
    rms_norm,
    rows_times,
    store_states,
)
from .product import dot_onto, zero_of

# Numbers of the workspace's arrays, in the order of encoder_bound.py.
COUNTS = tl.constexpr(0)  # int32 [requests], -1 for one with an unknown id
POSITIONS = tl.constexpr(1)  # int32 [requests, tokens]
RESIDUAL = tl.constexpr(2)  # float32 [requests, tokens, DP]; the rest in the dtype of the weights
NORMED = tl.constexpr(3)  # [requests, tokens, DP], where INNER < DP
QUERY = tl.constexpr(4)  # [requests, tokens, A]; what attention found takes the query's place
KEY = tl.constexpr(5)  # [requests, tokens, A]
VALUE = tl.constexpr(6)
NEXT_KEY = tl.constexpr(7)
NEXT_VALUE = tl.constexpr(8)


@triton.jit
def gelu_tanh(x):
    """T5 v1.1's: x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def project(
    normed, normed_at, live, weight, width, out_at, start,
    ROWS: tl.constexpr, DP: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of queries, keys or values; out_at: pointers [ROWS, 1]."""
    column = tl.arange(0, COLUMNS)
    for c in tl.range(0, width, COLUMNS, num_stages=STAGES):
        y = rows_times(
            normed, normed_at, live, weight + c, width, start, ROWS, COLUMNS, DP, INNER
        )  # fmt: skip
        tl.store(out_at + c + column[None, :], y.to(weight.dtype.element_ty), mask=live[:, None])


@triton.jit
def t5_embed_kernel(
    ids,
    mask,
    states,  # [batch, tokens, D]
    embedding,
    norms,
    query,
    key,
    value,
    first_request,  # of this launch
    tokens,
    blocks,  # programs of a request
    workspace,
    offsets,
    vocab_size,
    dim,
    width,  # A
    eps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Valid tokens, embeddings, and what the first attention reads."""
    own = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * ROWS
    request = tl.cast(first_request + own, tl.int64)
    base = tl.cast(own, tl.int64) * tokens
    kind: tl.constexpr = embedding.dtype.element_ty
    positions = array(workspace, offsets[POSITIONS], tl.int32) + base
    ids += request * tokens
    mask += request * tokens
    states += request * tokens * dim

    count, bad = list_tokens(
        ids, mask, tokens, vocab_size, 1, -1, first, positions, TOKENS, ROWS
    )  # fmt: skip
    clear_masked(states, mask, tokens, first, dim, ROWS, DP)
    if first == 0:
        shown = tl.where(bad == 0, count, -1)
        tl.store(array(workspace, offsets[COUNTS], tl.int32) + own, shown)
    tl.debug_barrier()
    if first < count:
        row = first + tl.arange(0, ROWS)
        live = row < count
        token = tl.load(positions + row, mask=live, other=0)
        if bad != 0:
            nan = tl.full([ROWS, DP], float("nan"), tl.float32)
            store_states(states, token, live, nan, dim, DP)
        else:
            number = tl.load(ids + token, mask=live, other=0)
            column = tl.arange(0, DP)
            x = tl.load(
                embedding + number[:, None] * DP + column[None, :], mask=live[:, None], other=0.0
            ).to(tl.float32)
            place = base + row[:, None]
            residual = array(workspace, offsets[RESIDUAL], tl.float32)
            tl.store(residual + place * DP + column[None, :], x, mask=live[:, None])
            normed = rms_norm(x, dim, eps, norms, DP).to(kind)
            normed_at = array(workspace, offsets[NORMED], kind) + place * DP
            keep_rows(normed, normed_at, live, DP, INNER)
            start = zero_of(norms)
            at = place * width
            project(
                normed, normed_at, live, query, width, array(workspace, offsets[QUERY], kind) + at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip
            project(
                normed, normed_at, live, key, width, array(workspace, offsets[NEXT_KEY], kind) + at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip
            project(
                normed, normed_at, live, value, width,
                array(workspace, offsets[NEXT_VALUE], kind) + at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip


@triton.jit
def attend(
    head,
    query_at,  # pointers [ROWS, 1] to queries; what is found takes their place
    keys,  # of the request: [tokens, A]
    values,
    positions,
    position,  # [ROWS]
    live,
    count,
    width,
    position_bias,
    bias_tokens,
    start,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the rows, one head."""
    d = tl.arange(0, HEAD)
    j = tl.arange(0, KEYS)
    query_at = query_at + head * HEAD + d[None, :]
    q = tl.load(query_at, mask=live[:, None], other=0.0)
    tl.debug_barrier()  # before results take the place of queries
    bias = position_bias + tl.cast(head, tl.int64) * (2 * bias_tokens - 1) + bias_tokens - 1
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD], tl.float32)
    for j0 in tl.range(0, count, KEYS, num_stages=STAGES):
        inside = j0 + j < count
        at = tl.cast(j0 + j, tl.int64)[:, None] * width + head * HEAD + d[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        other = tl.load(positions + j0 + j, mask=inside, other=0)
        offset = other[None, :] - position[:, None]
        offset = tl.minimum(tl.maximum(offset, 1 - bias_tokens), bias_tokens - 1)
        score = dot_onto(tl.load(bias + offset), q, k.trans(), start)
        score = tl.where(inside[None, :], score, float("-inf"))
        larger = tl.maximum(top, tl.max(score, 1))
        kept = tl.exp(top - larger)
        share = tl.exp(score - larger[:, None])
        total = total * kept + tl.sum(share, 1)
        mixed = dot_onto(mixed * kept[:, None], share.to(v.dtype), v, start)
        top = larger
    mixed = mixed / total[:, None]
    tl.store(query_at, mixed.to(q.dtype), mask=live[:, None])


@triton.jit
def t5_layer_kernel(
    states,
    norms,  # float32: of the attention that is over, this feed-forward, the next attention
    position_bias,
    output,
    ffn_in,
    ffn_up,
    ffn_out,
    query,  # of the next layer; any tensors in the last one
    key,
    value,
    first_request,
    tokens,
    blocks,
    workspace,
    offsets,
    dim,
    num_heads,
    width,  # A
    ffn_dim,  # padded
    bias_tokens,
    last,  # whether there is no next layer
    eps,
    ACTIVATION: tl.constexpr,  # relu, gelu, gated-relu, gated-gelu: 0 .. 3
    FITTED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    DP: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One layer from its attention on, then what the next attention reads, or the states."""
    own = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * ROWS
    count = tl.load(array(workspace, offsets[COUNTS], tl.int32) + own)
    if first < count:
        kind: tl.constexpr = output.dtype.element_ty
        base = tl.cast(own, tl.int64) * tokens
        positions = array(workspace, offsets[POSITIONS], tl.int32) + base
        row = first + tl.arange(0, ROWS)
        live = row < count
        column = tl.arange(0, DP)
        token = tl.load(positions + row, mask=live, other=0)
        place = base + row[:, None]
        at = place * width
        query_at = array(workspace, offsets[QUERY], kind) + at
        start = zero_of(norms)
        for head in range(num_heads):
            attend(
                head, query_at, array(workspace, offsets[KEY], kind) + base * width,
                array(workspace, offsets[VALUE], kind) + base * width, positions, token, live,
                count, width, position_bias, bias_tokens, start, ROWS, KEYS, HEAD, STAGES,
            )  # fmt: skip
        tl.debug_barrier()

        residual_at = array(workspace, offsets[RESIDUAL], tl.float32) + place * DP + column[None, :]
        x = tl.load(residual_at, mask=live[:, None], other=0.0)
        k = tl.arange(0, COLUMNS)
        for k0 in tl.range(0, width, COLUMNS, num_stages=STAGES):
            a = tl.load(query_at + k0 + k[None, :], mask=live[:, None], other=0.0)
            b = tl.load(output + (k0 + k)[:, None] * DP + column[None, :])
            x = dot_onto(x, a, b, start)

        normed = rms_norm(x, dim, eps, norms, DP).to(kind)
        normed_at = array(workspace, offsets[NORMED], kind) + place * DP
        keep_rows(normed, normed_at, live, DP, INNER)
        f = tl.arange(0, HIDDEN)
        for c in tl.range(0, ffn_dim, HIDDEN, num_stages=STAGES):
            y = rows_times(
                normed, normed_at, live, ffn_in + c, ffn_dim, start, ROWS, HIDDEN, DP, INNER
            )  # fmt: skip
            if ACTIVATION == 0 or ACTIVATION == 2:
                y = tl.where(y < 0.0, 0.0, y)  # max would drop a NaN
            elif ACTIVATION == 1:
                y = gelu(y, FITTED)
            else:
                y = gelu_tanh(y)
            if ACTIVATION >= 2:
                y *= rows_times(
                    normed, normed_at, live, ffn_up + c, ffn_dim, start, ROWS, HIDDEN, DP, INNER
                )  # fmt: skip
            b = tl.load(ffn_out + (c + f)[:, None] * DP + column[None, :])
            x = dot_onto(x, y.to(kind), b, start)

        x_normed = rms_norm(x, dim, eps, norms + DP, DP)
        if last != 0:
            request = tl.cast(first_request + own, tl.int64)
            store_states(states + request * tokens * dim, token, live, x_normed, dim, DP)
        else:
            tl.store(residual_at, x, mask=live[:, None])
            normed = x_normed.to(kind)
            keep_rows(normed, normed_at, live, DP, INNER)
            tl.debug_barrier()  # results of attention have been read
            project(
                normed, normed_at, live, query, width, query_at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip
            project(
                normed, normed_at, live, key, width, array(workspace, offsets[NEXT_KEY], kind) + at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip
            project(
                normed, normed_at, live, value, width,
                array(workspace, offsets[NEXT_VALUE], kind) + at,
                start, ROWS, DP, INNER, COLUMNS, STAGES,
            )  # fmt: skip
