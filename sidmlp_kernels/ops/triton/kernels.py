"""The kernels that are launched: one per operator, a program takes group after group of requests.

beam_decode_kernel  context or encoder states -> items, all levels
context_readout_kernel  encoder states -> context vectors
level_logits_kernel  context vectors and prefixes -> logits of one level

A group is up to 16 requests whose first products (readout, context part of every head's first
layer, logits of level 1) share weights as the rows of one tile; the beam search then goes request
by request. How large groups are never changes a bit. Everything a program needs between steps lies
in registers or in its own slice of a workspace, so programs never wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import scratch as at
from .beam import advance, bar_leaves, child_keys, root_keys, select
from .common import GROUP_ROWS, at_level, padded
from .heads import further_blocks, hidden_rows
from .items import excluded_range, write_result
from .product import product
from .readout import context_readout
from .selection import BAD_KEY, NO_KEY


@triton.jit
def array(base, offsets, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """Scratch array NUMBER of a slice (scratch.py)."""
    return (base + offsets[NUMBER]).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def readout_arrays(base, offsets, weight_type: tl.constexpr):
    """Scratch of context_readout; what products read has the dtype of the weights."""
    return (
        array(base, offsets, at.VALID, tl.int32),
        array(base, offsets, at.COUNTS, tl.int32),
        array(base, offsets, at.MEAN, weight_type),
        array(base, offsets, at.QUERY, tl.float32),
        array(base, offsets, at.QUERY_LOW, weight_type),
        array(base, offsets, at.HEAD_ROWS, tl.float32),
        array(base, offsets, at.FOLDED, weight_type),
        array(base, offsets, at.WEIGHTS, tl.float32),
        array(base, offsets, at.POOLED, weight_type),
        array(base, offsets, at.ADDED, tl.float32),
        array(base, offsets, at.SUM, tl.float32),
        array(base, offsets, at.SUM_LOW, weight_type),
        array(base, offsets, at.FFN, weight_type),
    )


@triton.jit
def beam_decode_kernel(
    context,  # float32 [batch, D], unless FROM_STATES
    states,
    mask,
    tokens,
    readout,
    context_weight,
    context_bias,
    vectors,
    prefix_table,
    block_weight,
    out_weight,
    out_bias,
    child_begin,
    codes,
    leaf_begin,
    item_ids,
    available,
    excluded,
    excluded_offsets,
    num_excluded,
    items,
    scores,
    result_codes,
    counts,
    batch,
    group,  # requests of a group, 1..16
    workspace,
    slice_bytes,
    offsets,
    sizes,  # (L, D, heads, head_dim, F, H, blocks)
    num_codes,
    dense,
    temperatures,
    level_weights,
    eps,
    k,
    num_beams,
    codebook,
    FROM_STATES: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_READOUT: tl.constexpr,
    FITTED: tl.constexpr,
    FULL: tl.constexpr,
    FURTHER: tl.constexpr,
    EVEN_CONTEXT: tl.constexpr,
    EVEN_ROOT: tl.constexpr,
    EVEN_DENSE: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BEAMS: tl.constexpr,
    CHUNK: tl.constexpr,
    FANOUT: tl.constexpr,
    NARROW: tl.constexpr,
    SELECT: tl.constexpr,
    FEW: tl.constexpr,
    PAIRS: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    POOL: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    M_DENSE: tl.constexpr,
    N_DENSE: tl.constexpr,
    K_DENSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All levels of the beam search for every request, from contexts or from encoder states."""
    _, dim, num_heads, head_dim, ffn_dim, width, num_blocks = sizes
    dim_pad, stride = padded(dim), padded(width)
    base = workspace + tl.cast(tl.program_id(0), tl.int64) * slice_bytes
    weight_type: tl.constexpr = context_weight.dtype.element_ty
    first_layer = array(base, offsets, at.FIRST, tl.float32)
    root_logits = array(base, offsets, at.ROOT_LOGITS, tl.float32)
    hidden = array(base, offsets, at.HIDDEN, weight_type)
    z = array(base, offsets, at.NEXT, tl.float32)
    own_context = array(base, offsets, at.CONTEXT, weight_type)
    words_low = array(base, offsets, at.WORDS_LOW, tl.int64)
    words_high = array(base, offsets, at.WORDS_HIGH, tl.int64)
    pair_row = array(base, offsets, at.PAIR_ROW, tl.int32)
    pair_code = array(base, offsets, at.PAIR_CODE, tl.int32)
    logits = array(base, offsets, at.LOGITS, tl.float32)
    keys = array(base, offsets, at.KEYS, tl.int64)
    first_stride = NUM_LEVELS * stride
    column = tl.arange(0, DIM_COLUMNS)

    for request in range(tl.program_id(0) * group, batch, tl.num_programs(0) * group):
        rows = tl.minimum(group, batch - request)
        tl.debug_barrier()  # the group before has been read
        if FROM_STATES:
            context_readout(
                states, mask, tokens, request, rows, readout, (dim, num_heads, head_dim, ffn_dim),
                eps, readout_arrays(base, offsets, weight_type), own_context,
                FACTORED, TOKENS, POOL, DIM_COLUMNS, N, K, STAGES, EXACT, EVEN_READOUT,
            )  # fmt: skip
        else:
            for row in range(rows):
                x = tl.load(
                    context + tl.cast(request + row, tl.int64) * dim + column,
                    mask=column < dim,
                    other=0.0,
                )
                tl.store(
                    own_context + row * dim_pad + column, x.to(weight_type), mask=column < dim_pad
                )
            tl.debug_barrier()

        # The first layers' context parts, then level 1's logits, for the whole group.
        product(
            own_context, dim_pad, rows, context_weight, first_stride, dim, first_stride,
            context_bias, first_layer, first_stride, first_layer, GROUP_ROWS, N, K, STAGES,
            X_IS_PADDED=True, EVEN=EVEN_CONTEXT,
        )  # fmt: skip
        tl.debug_barrier()
        hidden_rows(
            first_layer, first_stride, (words_low, words_high), 0, rows, width, prefix_table[0],
            num_codes, vectors[0], eps, hidden, ROWS, COLUMNS, FITTED, FULL, False, False,
        )  # fmt: skip
        tl.debug_barrier()
        if FURTHER:
            further_blocks(
                hidden, z, rows, width, block_weight[0], vectors[0], num_blocks, eps,
                GROUP_ROWS, ROWS, COLUMNS, N, K, STAGES, FITTED, FULL,
            )  # fmt: skip
        product(
            hidden, stride, rows, out_weight[0], stride, width, num_codes[0], out_bias[0],
            root_logits, num_codes[0], root_logits, GROUP_ROWS, N, K, STAGES,
            ROW_PER_COLUMN=True, X_IS_PADDED=True, EVEN=EVEN_ROOT,
        )  # fmt: skip
        tl.debug_barrier()

        for row in range(rows):
            excluded_begin = tl.zeros([], tl.int64)
            excluded_end = excluded_begin
            if num_excluded > 0:
                excluded_begin, excluded_end = excluded_range(
                    excluded_offsets, num_excluded, request + row
                )
            leaves = (leaf_begin, item_ids, available, excluded, excluded_begin, excluded_end)
            zero = tl.zeros([BEAMS], tl.int64)
            beams = (tl.zeros([BEAMS], tl.float32), tl.zeros([BEAMS], tl.int32), zero, zero)
            count = 1
            broken = 0
            for level in range(NUM_LEVELS):
                trie = (at_level(child_begin, level), at_level(codes, level))
                scale = 1.0 / at_level(temperatures, level)
                weight = at_level(level_weights, level)
                best = tl.full([BEAMS], NO_KEY, tl.int64)
                for chunk in range(0, count, CHUNK):
                    if level == 0:
                        num_keys = root_keys(
                            root_logits + row * num_codes[0], num_codes[0], *trie, scale, weight,
                            keys, FEW,
                        )  # fmt: skip
                    else:
                        num_keys = child_keys(
                            level, chunk, beams, count,
                            first_layer + row * first_stride + level * stride,
                            (words_low, words_high, pair_row, pair_code, hidden, z, logits, keys),
                            (
                                at_level(vectors, level),
                                at_level(prefix_table, level),
                                at_level(block_weight, level),
                                at_level(out_weight, level),
                                at_level(out_bias, level),
                            ),
                            trie,
                            num_codes,
                            (
                                scale, weight, at_level(dense, level), codebook, eps, width,
                                num_blocks,
                            ),
                            BEAMS, CHUNK, FANOUT, NARROW, ROWS, COLUMNS, PAIRS, PART,
                            M_DENSE, N_DENSE, K_DENSE, STAGES, FITTED, FULL, FURTHER, EVEN_DENSE,
                        )  # fmt: skip
                    tl.debug_barrier()
                    if level == NUM_LEVELS - 1:
                        bar_leaves(keys, num_keys, beams[1], trie[0], leaves, FEW)
                        tl.debug_barrier()
                    best = select(best, keys, num_keys, BEAMS, SELECT, FEW)
                broken |= (tl.max(best, 0) == BAD_KEY).to(tl.int32)
                beams, count = advance(best, beams, level, num_beams, *trie, BEAMS)
            count = tl.where(broken == 0, count, 0)
            score, leaf, low, high = beams
            write_result(
                leaf, score, (low, high), count, request + row, k, *leaves,
                items, scores, result_codes, counts, NUM_LEVELS, BEAMS,
            )  # fmt: skip
            tl.debug_barrier()  # the keys have been read


@triton.jit
def context_readout_kernel(
    states,
    mask,
    tokens,
    readout,
    context,  # float32 [batch, D]
    batch,
    group,
    workspace,
    slice_bytes,
    offsets,
    sizes,
    eps,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_READOUT: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    POOL: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Context vectors of every request."""
    _, dim, num_heads, head_dim, ffn_dim, _, _ = sizes
    weight_type: tl.constexpr = readout[0].dtype.element_ty
    base = workspace + tl.cast(tl.program_id(0), tl.int64) * slice_bytes
    own_context = array(base, offsets, at.CONTEXT, tl.float32)
    column = tl.arange(0, DIM_COLUMNS)
    for request in range(tl.program_id(0) * group, batch, tl.num_programs(0) * group):
        rows = tl.minimum(group, batch - request)
        tl.debug_barrier()
        context_readout(
            states, mask, tokens, request, rows, readout, (dim, num_heads, head_dim, ffn_dim),
            eps, readout_arrays(base, offsets, weight_type), own_context,
            FACTORED, TOKENS, POOL, DIM_COLUMNS, N, K, STAGES, EXACT, EVEN_READOUT,
        )  # fmt: skip
        for row in range(rows):
            inside = column < dim
            x = tl.load(own_context + row * padded(dim) + column, mask=inside)
            tl.store(context + tl.cast(request + row, tl.int64) * dim + column, x, mask=inside)


@triton.jit
def level_logits_kernel(
    context,  # float32 [batch, D]
    prefix_codes,  # int32 [batch, level]
    level,
    context_weight,  # of this level's head: [D, Hp], rows weight_stride apart
    weight_stride,
    context_bias,
    vectors,
    prefix_table,
    block_weight,
    out_weight,
    out_bias,
    logits,  # float32 [batch, C]
    batch,
    group,
    workspace,
    slice_bytes,
    offsets,
    sizes,
    num_codes,
    eps,
    FITTED: tl.constexpr,
    FULL: tl.constexpr,
    FURTHER: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits of one level after given prefixes; NaN for a prefix with a code that is none."""
    _, dim, _, _, _, width, num_blocks = sizes
    dim_pad, stride = padded(dim), padded(width)
    base = workspace + tl.cast(tl.program_id(0), tl.int64) * slice_bytes
    weight_type: tl.constexpr = context_weight.dtype.element_ty
    first_layer = array(base, offsets, at.FIRST, tl.float32)
    hidden = array(base, offsets, at.HIDDEN, weight_type)
    z = array(base, offsets, at.NEXT, tl.float32)
    words_low = array(base, offsets, at.WORDS_LOW, tl.int64)
    words_high = array(base, offsets, at.WORDS_HIGH, tl.int64)
    own_context = array(base, offsets, at.CONTEXT, weight_type)
    every_code = at_level(num_codes, level)
    place = tl.arange(0, GROUP_ROWS)
    column = tl.arange(0, DIM_COLUMNS)
    for request in range(tl.program_id(0) * group, batch, tl.num_programs(0) * group):
        rows = tl.minimum(group, batch - request)
        tl.debug_barrier()
        live = place < rows
        low = tl.zeros([GROUP_ROWS], tl.int64)
        high = tl.zeros([GROUP_ROWS], tl.int64)
        broken = place < 0
        for i in range(level):
            code = tl.load(prefix_codes + (request + place) * level + i, mask=live, other=0)
            real = (code >= 0) & (code < at_level(num_codes, i))
            broken |= real == 0
            part = tl.where(real, code, 0).to(tl.int64) << (16 * (i % 4))
            low |= tl.where(i < 4, part, 0)
            high |= tl.where(i < 4, 0, part)
        tl.store(words_low + place, low, mask=live)
        tl.store(words_high + place, high, mask=live)
        for row in range(rows):
            x = tl.load(
                context + tl.cast(request + row, tl.int64) * dim + column,
                mask=column < dim,
                other=0.0,
            )
            tl.store(own_context + row * dim_pad + column, x.to(weight_type), mask=column < dim_pad)
        tl.debug_barrier()
        product(
            own_context, dim_pad, rows, context_weight, weight_stride, dim, stride, context_bias,
            first_layer, stride, first_layer, GROUP_ROWS, N, K, STAGES, X_IS_PADDED=True,
        )  # fmt: skip
        tl.debug_barrier()
        hidden_rows(
            first_layer, stride, (words_low, words_high), level, rows, width, prefix_table,
            num_codes, vectors, eps, hidden, ROWS, COLUMNS, FITTED, FULL, False, True,
        )  # fmt: skip
        tl.debug_barrier()
        if FURTHER:
            further_blocks(
                hidden, z, rows, width, block_weight, vectors, num_blocks, eps,
                GROUP_ROWS, ROWS, COLUMNS, N, K, STAGES, FITTED, FULL,
            )  # fmt: skip
        out = logits + tl.cast(request, tl.int64) * every_code
        product(
            hidden, stride, rows, out_weight, stride, width, every_code, out_bias, out,
            every_code, out, GROUP_ROWS, N, K, STAGES, ROW_PER_COLUMN=True, X_IS_PADDED=True,
        )  # fmt: skip
        tl.debug_barrier()
        for base_code in range(0, every_code, N):
            code = base_code + tl.arange(0, N)
            nan = tl.full([GROUP_ROWS, N], float("nan"), tl.float32)
            mask = (live & broken)[:, None] & (code[None, :] < every_code)
            tl.store(out + place[:, None] * every_code + code[None, :], nan, mask=mask)
