"""Beam search of one request: beams, scores and nodes stay in registers between levels.

A level (2..L) takes its beams in chunks of CHUNK ranks:

  1  look up children; a beam needs a head unless it has an only child ("children" mode), whose
     log-probability is 0. Beams that need one are listed in scratch memory, with their prefixes.
  2  hidden rows of the listed beams (heads.py)
  3  logits: a dense level multiplies the rows with every code's weights (`product`); a sparse one
     takes a dot product per listed (beam, child) pair
  4  softmax statistics per beam, then one key per child, in scratch memory
  5  the best keys (selection.py); after all chunks they become the beams of the next level

Level 1 has one beam, the root, whose logits the whole group of requests has computed together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import at_level, is_finite, LARGEST, padded
from .heads import further_blocks, hidden_rows
from .items import leaf_allowed
from .product import product
from .selection import NO_KEY, key_ordinal, key_rank, key_score, make_key, merged


@triton.jit
def candidate_keys(score, rank, ordinal, wanted):
    """Keys of candidates, NO_KEY where not wanted; and whether every wanted score is finite."""
    fine = is_finite(score)
    bad = tl.max((wanted & (fine == 0)).to(tl.int32))
    key = make_key(score, rank, ordinal)
    return tl.where(wanted & fine, key, NO_KEY), bad


@triton.jit
def root_candidates(
    logits,  # float32 [C_1]
    num_codes,
    child_begin,
    codes,
    temperature,
    weight,
    leaves,  # (leaf_begin, item_ids, available, excluded, its begin, its end)
    is_last,
    BEAMS: tl.constexpr,
    SELECT: tl.constexpr,
):
    """The BEAMS best children of the root, and whether something was not finite."""
    lane = tl.arange(0, SELECT)
    largest = tl.full([SELECT], float("-inf"), tl.float32)
    bad = 0
    for base in range(0, num_codes, SELECT):
        inside = base + lane < num_codes
        x = tl.load(logits + base + lane, mask=inside, other=0.0) / temperature
        bad |= tl.max((inside & (is_finite(x) == 0)).to(tl.int32))
        largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
    top = tl.max(largest, 0)
    terms = tl.zeros([SELECT], tl.float32)
    for base in range(0, num_codes, SELECT):
        inside = base + lane < num_codes
        x = tl.load(logits + base + lane, mask=inside, other=0.0) / temperature
        terms += tl.where(inside, tl.exp(x - top), 0.0)
    log_total = tl.log(tl.sum(terms, 0))

    first = tl.load(child_begin)
    children = tl.load(child_begin + 1) - first
    best = tl.full([BEAMS], NO_KEY, tl.int64)
    for base in range(0, children, SELECT):
        ordinal = base + lane
        wanted = ordinal < children
        code = tl.load(codes + first + ordinal, mask=wanted, other=0).to(tl.int32)
        x = tl.load(logits + code, mask=wanted, other=0.0) / temperature
        score = weight * tl.maximum(x - top - log_total, -LARGEST)
        keys, broken = candidate_keys(score, tl.zeros_like(ordinal), ordinal, wanted)
        bad |= broken
        if is_last:
            ok = leaf_allowed(first + ordinal, wanted, *leaves)
            keys = tl.where(ok, keys, NO_KEY)
        best = merged(best, keys, BEAMS)
    return best, bad


@triton.jit
def pair_logits(
    hidden,
    stride,
    pair_row,  # int32 [pairs]: row of hidden
    pair_code,  # int32 [pairs]
    pairs,
    out_weight,
    out_bias,
    logits,  # float32 [pairs]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A logit for each (beam, child): ROWS dot products at a time."""
    column = tl.arange(0, COLUMNS)
    inside = column[None, :] < stride
    for first in range(0, pairs, ROWS):
        pair = first + tl.arange(0, ROWS)
        live = pair < pairs
        row = tl.load(pair_row + pair, mask=live, other=0)
        code = tl.load(pair_code + pair, mask=live, other=0)
        mask = live[:, None] & inside
        at = row[:, None] * stride + column[None, :]
        x = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
        at = code[:, None] * stride + column[None, :]
        w = tl.load(out_weight + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(x * w, 1) + tl.load(out_bias + code, mask=live, other=0.0)
        tl.store(logits + pair, total, mask=live)


@triton.jit
def expand(
    level,  # 1..L-1: index of the level that is entered
    beams,  # (score [BEAMS], node, words low and high)
    count,
    first_layer,  # float32 [Hp] of this level
    scratch,  # (words low, words high, pair_row, pair_code, hidden, z, logits, keys)
    head,  # (vectors, prefix_table, block_weight, out_weight, out_bias)
    trie,  # (child_begin, codes)
    num_codes,
    settings,  # (temperature, weight, dense, codebook, eps, width, num_blocks)
    leaves,  # (leaf_begin, item_ids, available, excluded, its begin, its end)
    is_last,
    BEAMS: tl.constexpr,
    CHUNK: tl.constexpr,
    FANOUT: tl.constexpr,
    SELECT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    FITTED: tl.constexpr,
):
    """The BEAMS best keys among the children of `count` beams, and whether something was not
    finite."""
    words_low, words_high, pair_row, pair_code, hidden, z, logits, keys = scratch
    vectors, prefix_table, block_weight, out_weight, out_bias = head
    child_begin, codes = trie
    temperature, weight, dense, codebook, eps, width, num_blocks = settings
    stride = padded(width)
    every_code = at_level(num_codes, level)
    fan = tl.arange(0, FANOUT)
    lane = tl.arange(0, SELECT)

    best = tl.full([BEAMS], NO_KEY, tl.int64)
    bad = 0
    for chunk in range(0, count, CHUNK):
        rank = chunk + tl.arange(0, CHUNK)
        if CHUNK == BEAMS:
            score, node, low, high = beams
        else:
            score = tl.gather(beams[0], rank, 0)
            node = tl.gather(beams[1], rank, 0)
            low = tl.gather(beams[2], rank, 0)
            high = tl.gather(beams[3], rank, 0)
        live = rank < count
        begin = tl.load(child_begin + node, mask=live, other=0)
        children = tl.load(child_begin + node + 1, mask=live, other=0) - begin
        needs = live & ((children != 1) | (codebook != 0))
        place = tl.cumsum(needs.to(tl.int32), 0) - 1  # among beams that need a head
        rows = tl.sum(needs.to(tl.int32), 0)
        key_at = tl.cumsum(children, 0) - children
        num_keys = tl.sum(children, 0)
        own = tl.where(needs, children, 0)
        pair_at = tl.cumsum(own, 0) - own
        pairs = tl.sum(own, 0)

        # 1: the list
        tl.store(words_low + place, low, mask=needs)
        tl.store(words_high + place, high, mask=needs)
        if dense == 0:
            for base in range(0, tl.max(own, 0), FANOUT):
                ordinal = base + fan[None, :]
                mask = ordinal < own[:, None]
                code = tl.load(codes + begin[:, None] + ordinal, mask=mask, other=0)
                at = pair_at[:, None] + ordinal
                tl.store(pair_code + at, code.to(tl.int32), mask=mask)
                tl.store(pair_row + at, tl.zeros_like(at) + place[:, None], mask=mask)
        tl.debug_barrier()

        # 2: hidden rows
        hidden_rows(
            first_layer, 0, (words_low, words_high), level, rows, width, prefix_table, num_codes,
            vectors, eps, hidden, ROWS, COLUMNS, FITTED,
        )  # fmt: skip
        tl.debug_barrier()
        further_blocks(
            hidden, z, rows, width, block_weight, vectors, num_blocks, eps,
            M, ROWS, COLUMNS, N, K, STAGES, FITTED,
        )  # fmt: skip

        # 3: logits
        if dense != 0:
            if rows > 0:
                product(
                    hidden, stride, rows, out_weight, stride, width, every_code, out_bias,
                    logits, every_code, M, N, K, STAGES, ROW_PER_COLUMN=True, X_IS_PADDED=True,
                )  # fmt: skip
        else:
            pair_logits(
                hidden, stride, pair_row, pair_code, pairs, out_weight, out_bias, logits,
                ROWS, COLUMNS,
            )  # fmt: skip
        tl.debug_barrier()

        # 4: softmax statistics, then keys
        mine = logits + tl.where(dense != 0, place * every_code, pair_at)
        gathered = (dense != 0) & (codebook == 0)  # logits by code, normalised over children
        span = tl.where(codebook != 0, every_code, children)
        span = tl.where(needs, span, 0)
        longest = tl.max(span, 0)
        top = tl.full([CHUNK], float("-inf"), tl.float32)
        for base in range(0, longest, FANOUT):
            index = base + tl.broadcast_to(fan[None, :], [CHUNK, FANOUT])
            mask = index < span[:, None]
            code = tl.load(codes + begin[:, None] + index, mask=mask & gathered, other=0)
            index = tl.where(gathered, code.to(tl.int32), index)
            x = tl.load(mine[:, None] + index, mask=mask, other=0.0) / temperature
            bad |= tl.max((mask & (is_finite(x) == 0)).to(tl.int32))
            top = tl.maximum(top, tl.max(tl.where(mask, x, float("-inf")), 1))
        total = tl.zeros([CHUNK], tl.float32)
        for base in range(0, longest, FANOUT):
            index = base + tl.broadcast_to(fan[None, :], [CHUNK, FANOUT])
            mask = index < span[:, None]
            code = tl.load(codes + begin[:, None] + index, mask=mask & gathered, other=0)
            index = tl.where(gathered, code.to(tl.int32), index)
            x = tl.load(mine[:, None] + index, mask=mask, other=0.0) / temperature
            total += tl.sum(tl.where(mask, tl.exp(x - top[:, None]), 0.0), 1)
        log_total = tl.log(tl.where(needs, total, 1.0))
        for base in range(0, tl.max(children, 0), FANOUT):
            ordinal = base + tl.broadcast_to(fan[None, :], [CHUNK, FANOUT])
            mask = ordinal < children[:, None]
            scored = mask & needs[:, None]
            code = tl.load(
                codes + begin[:, None] + ordinal, mask=scored & (dense != 0), other=0
            ).to(tl.int32)
            index = tl.where(dense != 0, code, ordinal)
            x = tl.load(mine[:, None] + index, mask=scored, other=0.0) / temperature
            log_p = tl.maximum(x - top[:, None] - log_total[:, None], -LARGEST)
            child_score = score[:, None] + tl.where(needs[:, None], weight * log_p, 0.0)
            key, broken = candidate_keys(
                child_score, tl.broadcast_to(rank[:, None], [CHUNK, FANOUT]), ordinal, mask
            )
            bad |= broken
            tl.store(keys + key_at[:, None] + ordinal, key, mask=mask)
        tl.debug_barrier()

        # 5: the best
        for base in range(0, num_keys, SELECT):
            key = tl.load(keys + base + lane, mask=base + lane < num_keys, other=NO_KEY)
            if is_last:
                real = key != NO_KEY
                parent = tl.where(real, key_rank(key) - chunk, 0)
                leaf = tl.gather(begin, parent, 0) + key_ordinal(key)
                key = tl.where(leaf_allowed(leaf, real, *leaves), key, NO_KEY)
            best = merged(best, key, BEAMS)
    return best, bad


@triton.jit
def advance(
    best, beams, level, num_beams, child_begin, codes, BEAMS: tl.constexpr
):
    """Keys become beams of the next level: (score, node, words low and high), and how many."""
    place = tl.arange(0, BEAMS)
    real = (best != NO_KEY) & (place < num_beams)
    rank = tl.where(real, key_rank(best), 0)
    parent = tl.gather(beams[1], rank, 0)
    node = tl.load(child_begin + parent, mask=real, other=0) + key_ordinal(best)
    node = tl.where(real, node, 0)
    code = tl.load(codes + node, mask=real, other=0).to(tl.int64) << (16 * (level % 4))
    low = tl.gather(beams[2], rank, 0) | tl.where(level < 4, code, 0)
    high = tl.gather(beams[3], rank, 0) | tl.where(level < 4, 0, code)
    return (key_score(best), node, low, high), tl.sum(real.to(tl.int32), 0)
