"""Context readout of a group of requests: encoder states -> context vectors.

    p = mean of valid x_t                      q = W_p p + b_p
    r_h = W_k,h^T W_q,h q / sqrt(d)            s_ht = r_h . x_t over valid t
    y_h = sum_t softmax_t(s_h)_t x_t           a = sum_h W_o,h W_v,h y_h
    u = LN(q + a)                              ctx = LN(u + W_2 relu(W_1 u + b_1) + b_2)

Attention is absorbed (sidmlp_kernels/packing.py): keys and values are never formed. Valid tokens
are listed first, so a result does not depend on where padding stands and masked states are never
read. Products are shared by the group (up to 16 requests are the rows of one tile); pooling and
attention go request by request. Between steps vectors lie in scratch memory, rounded to the dtype
of the weights where a product reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import GROUP_ROWS, layer_norm, load_vector, padded
from .product import dot_onto, product, zero_of


@triton.jit
def list_valid(mask, tokens, valid, TOKENS: tl.constexpr):
    """valid <- the ascending t with mask[t]; returns how many."""
    count = 0
    for base in range(0, tokens, TOKENS):
        token = base + tl.arange(0, TOKENS)
        keep = tl.load(mask + token, mask=token < tokens, other=0) != 0
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(valid + place, token, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    return count


@triton.jit
def mean_state(
    states, valid, count, dim, out, start,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [Dp] <- mean of the valid states, zero without any.

    A product with ones: unlike a reduction's, its order does not depend on how loads are laid out,
    and so not on the address of the states.
    """
    scale = tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)
    for first in range(0, padded(dim), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([GROUP_ROWS, COLUMNS], tl.float32)
        for base in range(0, count, TOKENS):
            place = base + tl.arange(0, TOKENS)
            token = tl.load(valid + place, mask=place < count, other=0)
            inside = (place[:, None] < count) & (column[None, :] < dim)
            at = token[:, None].to(tl.int64) * dim + column[None, :]
            x = tl.load(states + at, mask=inside, other=0.0)
            if EXACT:
                x = x.to(tl.float32)
            total = dot_onto(total, tl.full([GROUP_ROWS, TOKENS], 1.0, x.dtype), x, start)
        one = tl.where(tl.arange(0, GROUP_ROWS)[:, None] == 0, total, 0.0)  # rows are all alike
        mean = tl.sum(one, 0) * scale
        tl.store(out + column, mean.to(out.dtype.element_ty), mask=column < padded(dim))


@triton.jit
def attention_scores(
    states, valid, count, dim, rows, row_stride, num_heads, weights, weight_stride, start,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """weights[h][t] <- r_h . x_t."""
    head = tl.arange(0, GROUP_ROWS)
    for first_head in range(0, num_heads, GROUP_ROWS):
        h = first_head + head
        for base in range(0, count, TOKENS):
            place = base + tl.arange(0, TOKENS)
            token = tl.load(valid + place, mask=place < count, other=0)
            score = tl.zeros([GROUP_ROWS, TOKENS], tl.float32)
            for first in range(0, dim, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                r = tl.load(
                    rows + h[:, None] * row_stride + column[None, :],
                    mask=(h[:, None] < num_heads) & (column[None, :] < dim),
                    other=0.0,
                )
                x = tl.load(
                    states + token[:, None].to(tl.int64) * dim + column[None, :],
                    mask=(place[:, None] < count) & (column[None, :] < dim),
                    other=0.0,
                )
                if EXACT:
                    x = x.to(tl.float32)
                score = dot_onto(score, r.to(x.dtype), x.trans(), start)
            tl.store(
                weights + h[:, None] * weight_stride + place[None, :],
                score,
                mask=(h[:, None] < num_heads) & (place[None, :] < count),
            )


@triton.jit
def attention_softmax(count, num_heads, weights, weight_stride, TOKENS: tl.constexpr):
    """weights[h] <- softmax(weights[h]) over `count` tokens."""
    head = tl.arange(0, GROUP_ROWS)
    for first_head in range(0, num_heads, GROUP_ROWS):
        h = first_head + head
        row = weights + h[:, None] * weight_stride
        top = tl.full([GROUP_ROWS, TOKENS], float("-inf"), tl.float32)
        for base in range(0, count, TOKENS):
            place = base + tl.arange(0, TOKENS)
            inside = (h[:, None] < num_heads) & (place[None, :] < count)
            x = tl.load(row + place[None, :], mask=inside, other=float("-inf"))
            top = tl.maximum(top, x)
        largest = tl.max(top, 1)
        largest = tl.where(h < num_heads, largest, 0.0)[:, None]
        terms = tl.zeros([GROUP_ROWS, TOKENS], tl.float32)
        for base in range(0, count, TOKENS):
            place = base + tl.arange(0, TOKENS)
            inside = (h[:, None] < num_heads) & (place[None, :] < count)
            x = tl.load(row + place[None, :], mask=inside, other=float("-inf"))
            terms += tl.where(inside, tl.exp(x - largest), 0.0)
        scale = 1.0 / tl.sum(terms, 1)[:, None]
        for base in range(0, count, TOKENS):
            place = base + tl.arange(0, TOKENS)
            inside = (h[:, None] < num_heads) & (place[None, :] < count)
            x = tl.load(row + place[None, :], mask=inside, other=float("-inf"))
            tl.store(row + place[None, :], tl.exp(x - largest) * scale, mask=inside)


@triton.jit
def attention_pool(
    states, valid, count, dim, weights, weight_stride, num_heads, out, start,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [heads, D] (rows D apart) <- y_h, zero without any valid state."""
    head = tl.arange(0, GROUP_ROWS)
    for first_head in range(0, num_heads, GROUP_ROWS):
        h = first_head + head
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            pooled = tl.zeros([GROUP_ROWS, COLUMNS], tl.float32)
            for base in range(0, count, TOKENS):
                place = base + tl.arange(0, TOKENS)
                token = tl.load(valid + place, mask=place < count, other=0)
                p = tl.load(
                    weights + h[:, None] * weight_stride + place[None, :],
                    mask=(h[:, None] < num_heads) & (place[None, :] < count),
                    other=0.0,
                )
                x = tl.load(
                    states + token[:, None].to(tl.int64) * dim + column[None, :],
                    mask=(place[:, None] < count) & (column[None, :] < dim),
                    other=0.0,
                )
                if EXACT:
                    x = x.to(tl.float32)
                pooled = dot_onto(pooled, p.to(x.dtype), x, start)
            tl.store(
                out + h[:, None] * dim + column[None, :],
                pooled.to(out.dtype.element_ty),
                mask=(h[:, None] < num_heads) & (column[None, :] < dim),
            )


@triton.jit
def add_and_norm(
    a, b, rows, stride, dim, eps, gain, shift, out, low, COLUMNS: tl.constexpr
):  # fmt: skip
    """out and low <- LN(a + b), row by row, each rounded to its dtype."""
    column = tl.arange(0, COLUMNS)
    gains = load_vector(gain, column, False, dim)
    shifts = load_vector(shift, column, False, dim)
    for row in range(rows):
        at = row * stride + column[None, :]
        inside = column[None, :] < stride
        z = tl.load(a + at, mask=inside, other=0.0) + tl.load(b + at, mask=inside, other=0.0)
        y = layer_norm(z, column, dim, eps, gains, shifts)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        tl.store(low + at, y.to(low.dtype.element_ty), mask=inside)


@triton.jit
def context_readout(
    states,  # [batch, tokens, D]
    mask,  # bool [batch, tokens]
    tokens,
    request,  # the group's first
    rows,  # requests of the group
    readout,  # the nine arrays of PackedWeights.readout
    sizes,  # (dim, num_heads, head_dim, ffn_dim)
    eps,
    scratch,  # see kernels.readout_arrays
    context,  # [rows, Dp], float32 or the dtype of the weights
    FACTORED: tl.constexpr,
    TOKENS: tl.constexpr,
    POOL: tl.constexpr,  # columns of a tile of states
    DIM_COLUMNS: tl.constexpr,  # at least Dp
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,  # attention in float32 arithmetic
    EVEN: tl.constexpr,  # N and K divide the sizes of every product
):
    """context <- readout of `rows` requests. Ends with a barrier."""
    query_weight, vectors, score_in, score_out, value_in, value_out, ffn_in, ffn_bias, ffn_out = (
        readout
    )
    dim, num_heads, head_dim, ffn_dim = sizes
    (
        valid, counts, mean, query, query_low, head_rows, folded, weights, pooled, added, u, u_low,
        hidden,
    ) = scratch  # fmt: skip
    dim_pad, head_pad, ffn_pad = padded(dim), padded(head_dim), padded(ffn_dim)
    token_pad = padded(tokens)
    start = zero_of(vectors)

    for row in range(rows):
        at = tl.cast(request + row, tl.int64)
        count = list_valid(mask + at * tokens, tokens, valid + row * token_pad, TOKENS)
        tl.store(counts + row, count)
    tl.debug_barrier()
    for row in range(rows):
        x = states + tl.cast(request + row, tl.int64) * tokens * dim
        count = tl.load(counts + row)
        mean_state(
            x, valid + row * token_pad, count, dim, mean + row * dim_pad, start, TOKENS, POOL, EXACT
        )
    tl.debug_barrier()
    product(
        mean, dim_pad, rows, query_weight, dim_pad, dim, dim_pad, vectors, query, dim_pad,
        query_low, GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, EVEN=EVEN, HAS_LOW=True,
    )  # fmt: skip
    tl.debug_barrier()

    # r_h [rows, heads, Dp]
    width = num_heads * dim_pad
    if FACTORED:
        inner = num_heads * head_pad
        product(
            query_low, dim_pad, rows, score_in, inner, dim, inner, vectors, folded, inner, folded,
            GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, HAS_BIAS=False,
        )  # fmt: skip
        tl.debug_barrier()
        for head in range(num_heads):
            product(
                folded + head * head_pad, inner, rows, score_out + head * head_dim * dim_pad,
                dim_pad, head_dim, dim_pad, vectors, head_rows + head * dim_pad, width, head_rows,
                GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, HAS_BIAS=False,
            )  # fmt: skip
    else:
        product(
            query_low, dim_pad, rows, score_out, width, dim, width, vectors, head_rows, width,
            head_rows, GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, EVEN=EVEN, HAS_BIAS=False,
        )  # fmt: skip
    tl.debug_barrier()

    # y_h, in rows of heads * D
    for row in range(rows):
        x = states + tl.cast(request + row, tl.int64) * tokens * dim
        listed = valid + row * token_pad
        count = tl.load(counts + row)
        attention_scores(
            x, listed, count, dim, head_rows + row * width, dim_pad, num_heads, weights,
            token_pad, start, TOKENS, POOL, EXACT,
        )  # fmt: skip
        tl.debug_barrier()
        attention_softmax(count, num_heads, weights, token_pad, TOKENS)
        tl.debug_barrier()
        attention_pool(
            x, listed, count, dim, weights, token_pad, num_heads,
            pooled + row * num_heads * dim, start, TOKENS, POOL, EXACT,
        )  # fmt: skip
        tl.debug_barrier()

    # a
    if FACTORED:
        inner = num_heads * head_pad
        attention_dim = num_heads * head_dim
        for head in range(num_heads):
            product(
                pooled + head * dim, num_heads * dim, rows, value_in + head * head_pad, inner,
                dim, head_dim, vectors, folded + head * head_dim, inner, folded,
                GROUP_ROWS, N, K, STAGES, HAS_BIAS=False,
            )  # fmt: skip
        tl.debug_barrier()
        product(
            folded, inner, rows, value_out, dim_pad, attention_dim, dim_pad, vectors, added,
            dim_pad, added, GROUP_ROWS, N, K, STAGES, HAS_BIAS=False,
        )  # fmt: skip
    else:
        product(
            pooled, num_heads * dim, rows, value_in, dim_pad, num_heads * dim, dim_pad, vectors,
            added, dim_pad, added, GROUP_ROWS, N, K, STAGES, EVEN=EVEN, HAS_BIAS=False,
        )  # fmt: skip
    tl.debug_barrier()
    add_and_norm(
        query, added, rows, dim_pad, dim, eps, vectors + dim_pad, vectors + 2 * dim_pad, u, u_low,
        DIM_COLUMNS,
    )  # fmt: skip
    tl.debug_barrier()

    product(
        u_low, dim_pad, rows, ffn_in, ffn_pad, dim, ffn_pad, ffn_bias, hidden, ffn_pad, hidden,
        GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, EVEN=EVEN, RELU=True,
    )  # fmt: skip
    tl.debug_barrier()
    product(
        hidden, ffn_pad, rows, ffn_out, dim_pad, ffn_dim, dim_pad, vectors + 3 * dim_pad, added,
        dim_pad, added, GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True, EVEN=EVEN,
    )  # fmt: skip
    tl.debug_barrier()
    add_and_norm(
        u, added, rows, dim_pad, dim, eps, vectors + 4 * dim_pad, vectors + 5 * dim_pad, context,
        context, DIM_COLUMNS,
    )  # fmt: skip
    tl.debug_barrier()
