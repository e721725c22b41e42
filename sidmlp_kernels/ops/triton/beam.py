"""Beam search of one request: beams, scores and nodes stay in registers between levels.

Level 1 has one beam, the root, whose logits the whole group of requests has computed together
(`root_keys`). A later level takes its beams in chunks of CHUNK ranks (`child_keys`):

  1  look up children; a beam needs a head unless it has an only child ("children" mode), whose
     log-probability is 0. Beams that need one are listed in scratch memory, with their prefixes.
  2  hidden rows of the listed beams (heads.py)
  3  logits: a dense level multiplies the rows with every code's weights (`product`); a sparse one
     takes a dot product per listed (beam, child) pair
  4  softmax statistics per beam, then one key per child, in scratch memory

`select` keeps the best keys; they become the beams of the next level (`advance`). A score that is
not finite makes BAD_KEY, the greatest of all, so that a broken request shows in its first key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LARGEST, at_level, is_finite, padded
from .heads import further_blocks, hidden_rows
from .items import leaf_allowed
from .product import product
from .selection import BAD_KEY, NO_KEY, key_ordinal, key_rank, key_score, make_key, top_keys


@triton.jit
def candidate_key(score, rank, ordinal):
    return tl.where(is_finite(score), make_key(score, rank, ordinal), BAD_KEY)


@triton.jit
def clamped(log_p):
    """At least -LARGEST; NaN stays NaN."""
    return tl.where(log_p < -LARGEST, -LARGEST, log_p)


@triton.jit(noinline=True)
def root_keys(
    logits,  # float32 [C_1]
    num_codes,
    child_begin,
    codes,
    scale,  # 1 / temperature
    weight,
    keys,
    TILE: tl.constexpr,
):
    """keys <- one for each child of the root; returns how many."""
    lane = tl.arange(0, TILE)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for base in range(0, num_codes, TILE):
        inside = base + lane < num_codes
        x = tl.load(logits + base + lane, mask=inside, other=float("-inf")) * scale
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    terms = tl.zeros([TILE], tl.float32)
    for base in range(0, num_codes, TILE):
        inside = base + lane < num_codes
        x = tl.load(logits + base + lane, mask=inside, other=0.0) * scale
        terms += tl.where(inside, tl.exp(x - top) + x * 0.0, 0.0)  # NaN if x is not finite
    log_total = tl.log(tl.sum(terms, 0))

    first = tl.load(child_begin)
    children = tl.load(child_begin + 1) - first
    for base in range(0, children, TILE):
        ordinal = base + lane
        wanted = ordinal < children
        code = tl.load(codes + first + ordinal, mask=wanted, other=0).to(tl.int32)
        x = tl.load(logits + code, mask=wanted, other=0.0) * scale
        score = weight * clamped(x - top - log_total)
        key = candidate_key(score, tl.zeros_like(ordinal), ordinal)
        tl.store(keys + ordinal, key, mask=wanted)
    return children


@triton.jit(noinline=True)
def pair_logits(
    hidden,
    stride,
    pair_row,  # int32 [pairs]: row of hidden
    pair_code,  # int32 [pairs]
    pairs,
    out_weight,
    out_bias,
    logits,  # float32 [pairs]
    PAIRS: tl.constexpr,
    PART: tl.constexpr,  # columns that are taken at once
    COLUMNS: tl.constexpr,
):
    """A logit for each (beam, child): PAIRS dot products at a time."""
    for first in range(0, pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        live = pair < pairs
        row = tl.load(pair_row + pair, mask=live, other=0)
        code = tl.load(pair_code + pair, mask=live, other=0)
        total = tl.load(out_bias + code, mask=live, other=0.0)
        for part in range(0, COLUMNS, PART):
            column = part + tl.arange(0, PART)
            mask = live[:, None] & (column[None, :] < stride)
            x = tl.load(hidden + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
            w = tl.load(out_weight + code[:, None] * stride + column[None, :], mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
        tl.store(logits + pair, total, mask=live)


@triton.jit
def keys_of_children(
    logits,  # pointers [CHUNK]: to each beam's logits, by code or by child
    codes,
    begin,  # first child
    children,
    needs,  # whether the beam has logits
    rank,
    score,
    key_at,
    keys,
    every_code,  # normalise over so many codes; 0: over the children
    scale,  # 1 / temperature
    weight,
    CHUNK: tl.constexpr,
    FAN: tl.constexpr,
    BY_CODE: tl.constexpr,
):
    """Log-softmax of each beam's logits, then a key for each child."""
    fan = tl.broadcast_to(tl.arange(0, FAN)[None, :], [CHUNK, FAN])
    over_codes = every_code > 0
    span = tl.where(needs, tl.where(over_codes, every_code, children), 0)
    top = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for base in range(0, tl.max(span, 0), FAN):
        index = base + fan
        mask = index < span[:, None]
        if BY_CODE:
            looked = mask & (over_codes == 0)
            code = tl.load(codes + begin[:, None] + index, mask=looked, other=0)
            index = tl.where(over_codes, index, code.to(tl.int32))
        x = tl.load(logits[:, None] + index, mask=mask, other=float("-inf")) * scale
        larger = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(needs, larger, 0.0)
        # NaN if x is not finite
        terms = tl.where(mask, tl.exp(x - shift[:, None]) + x * 0.0, 0.0)
        total = total * tl.exp(top - shift) + tl.sum(terms, 1)
        top = larger
    log_total = tl.log(total)
    for base in range(0, tl.max(children, 0), FAN):
        ordinal = base + fan
        mask = ordinal < children[:, None]
        scored = mask & needs[:, None]
        index = ordinal
        if BY_CODE:
            code = tl.load(codes + begin[:, None] + ordinal, mask=scored, other=0)
            index = code.to(tl.int32)
        x = tl.load(logits[:, None] + index, mask=scored, other=0.0) * scale
        log_p = weight * clamped(x - top[:, None] - log_total[:, None])
        child_score = score[:, None] + tl.where(needs[:, None], log_p, 0.0)
        key = candidate_key(child_score, tl.broadcast_to(rank[:, None], [CHUNK, FAN]), ordinal)
        tl.store(keys + key_at[:, None] + ordinal, key, mask=mask)


@triton.jit
def child_keys(
    level,  # 1..L-1: index of the level that is entered
    chunk,  # first rank
    beams,  # (score [BEAMS], node, words low and high)
    count,
    first_layer,  # float32 [Hp] of this level
    scratch,  # (words low, words high, pair_row, pair_code, hidden, z, logits, keys)
    head,  # (vectors, prefix_table, block_weight, out_weight, out_bias)
    trie,  # (child_begin, codes)
    num_codes,
    settings,  # (1 / temperature, weight, dense, codebook, eps, width, num_blocks)
    BEAMS: tl.constexpr,
    CHUNK: tl.constexpr,
    FANOUT: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    PART: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    FITTED: tl.constexpr,
    FULL: tl.constexpr,
    FURTHER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """keys <- one for each child of beams chunk .. chunk + CHUNK - 1; returns how many."""
    words_low, words_high, pair_row, pair_code, hidden, z, logits, keys = scratch
    vectors, prefix_table, block_weight, out_weight, out_bias = head
    child_begin, codes = trie
    scale, weight, dense, codebook, eps, width, num_blocks = settings
    stride = padded(width)
    every_code = at_level(num_codes, level)

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
    own = tl.where(needs, children, 0)
    # One scan for three counts: beams that need a head, their children, all children. A count is at
    # most 64 * 32767 and fits 21 bits.
    counted = (needs.to(tl.int64) << 42) | (own.to(tl.int64) << 21) | children.to(tl.int64)
    before = tl.cumsum(counted, 0) - counted
    totals = tl.sum(counted, 0)
    place = (before >> 42).to(tl.int32)  # among beams that need a head
    pair_at = ((before >> 21) & 0x1FFFFF).to(tl.int32)
    key_at = (before & 0x1FFFFF).to(tl.int32)
    rows = (totals >> 42).to(tl.int32)
    pairs = ((totals >> 21) & 0x1FFFFF).to(tl.int32)
    num_keys = (totals & 0x1FFFFF).to(tl.int32)

    # 1: the list
    tl.store(words_low + place, low, mask=needs)
    tl.store(words_high + place, high, mask=needs)
    if dense == 0:
        fan = tl.broadcast_to(tl.arange(0, NARROW)[None, :], [CHUNK, NARROW])
        for base in range(0, tl.max(own, 0), NARROW):
            ordinal = base + fan
            mask = ordinal < own[:, None]
            code = tl.load(codes + begin[:, None] + ordinal, mask=mask, other=0)
            at = pair_at[:, None] + ordinal
            tl.store(pair_code + at, code.to(tl.int32), mask=mask)
            tl.store(pair_row + at, tl.zeros_like(at) + place[:, None], mask=mask)
    tl.debug_barrier()

    # 2: hidden rows
    hidden_rows(
        first_layer, 0, (words_low, words_high), level, rows, width, prefix_table, num_codes,
        vectors, eps, hidden, ROWS, COLUMNS, FITTED, FULL, True, True,
    )  # fmt: skip
    tl.debug_barrier()
    if FURTHER:
        further_blocks(
            hidden, z, rows, width, block_weight, vectors, num_blocks, eps,
            M, ROWS, COLUMNS, N, K, STAGES, FITTED, FULL,
        )  # fmt: skip

    # 3: logits
    if dense != 0:
        if rows > 0:
            product(
                hidden, stride, rows, out_weight, stride, width, every_code, out_bias,
                logits, every_code, logits, M, N, K, STAGES, ROW_PER_COLUMN=True, X_IS_PADDED=True,
                EVEN=EVEN,
            )  # fmt: skip
    else:
        pair_logits(
            hidden, stride, pair_row, pair_code, pairs, out_weight, out_bias, logits,
            PAIRS, PART, COLUMNS,
        )  # fmt: skip
    tl.debug_barrier()

    # 4: softmax statistics, then keys
    if dense != 0:
        keys_of_children(
            logits + place * every_code, codes, begin, children, needs, rank, score, key_at, keys,
            tl.where(codebook != 0, every_code, 0), scale, weight, CHUNK, FANOUT, BY_CODE=True,
        )  # fmt: skip
    else:
        keys_of_children(
            logits + pair_at, codes, begin, children, needs, rank, score, key_at, keys,
            0, scale, weight, CHUNK, NARROW, BY_CODE=False,
        )  # fmt: skip
    return num_keys


@triton.jit
def bar_leaves(
    keys,
    num_keys,
    node,  # [BEAMS], of the parents
    child_begin,
    leaves,  # (leaf_begin, item_ids, available, excluded, its begin, its end)
    TILE: tl.constexpr,
):
    """Takes out the keys of leaves that have no item that may be given."""
    lane = tl.arange(0, TILE)
    for base in range(0, num_keys, TILE):
        inside = base + lane < num_keys
        key = tl.load(keys + base + lane, mask=inside, other=NO_KEY)
        real = inside & (key != BAD_KEY)
        parent = tl.gather(node, tl.where(real, key_rank(key), 0), 0)
        leaf = tl.load(child_begin + parent, mask=real, other=0) + key_ordinal(key)
        barred = real & (leaf_allowed(leaf, real, *leaves) == 0)
        tl.store(keys + base + lane, tl.full([TILE], NO_KEY, tl.int64), mask=barred)


@triton.jit
def select_tiles(best, keys, num_keys, BEAMS: tl.constexpr, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    for base in range(0, num_keys, TILE):
        key = tl.load(keys + base + lane, mask=base + lane < num_keys, other=NO_KEY)
        best = top_keys(best, key, BEAMS)
    return best


@triton.jit
def select(best, keys, num_keys, BEAMS: tl.constexpr, SELECT: tl.constexpr, FEW: tl.constexpr):
    """The BEAMS best of best [BEAMS], descending, and of `num_keys` keys."""
    if num_keys <= FEW:
        best = select_tiles(best, keys, num_keys, BEAMS, FEW)
    else:
        best = select_tiles(best, keys, num_keys, BEAMS, SELECT)
    return best


@triton.jit
def advance(best, beams, level, num_beams, child_begin, codes, BEAMS: tl.constexpr):
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
