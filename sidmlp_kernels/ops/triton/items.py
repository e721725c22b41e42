"""Leaves and their items: what may be recommended to a request, and writing the result.

An item may be given when it is in stock and not excluded. Excluded ids of a request are ascending,
so a binary search answers; offsets are device data that nobody has checked, so they are clamped.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def excluded_range(offsets, total, request):
    """Where the request's excluded ids begin and end among `total`."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + request), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets + request + 1), begin), total)
    return begin, end


@triton.jit
def item_allowed(slot, wanted, item_ids, available, excluded, excluded_begin, excluded_end):
    """Whether the items at `slot` may be given, false where not `wanted`."""
    ok = wanted & (tl.load(available + slot, mask=wanted, other=0) != 0)
    count = excluded_end - excluded_begin
    if count > 0:
        item = tl.load(item_ids + slot, mask=ok, other=0)
        low = tl.zeros_like(item) + excluded_begin
        high = tl.zeros_like(item) + excluded_end
        while count > 0:
            middle = (low + high) // 2
            searching = ok & (low < high)
            below = tl.load(excluded + middle, mask=searching, other=0) < item
            low = tl.where(searching & below, middle + 1, low)
            high = tl.where(searching & (below == 0), middle, high)
            count = count // 2
        inside = ok & (low < excluded_end)
        ok = ok & ((tl.load(excluded + low, mask=inside, other=0) != item) | (inside == 0))
    return ok


@triton.jit
def leaf_allowed(
    leaf,
    wanted,
    leaf_begin,
    item_ids,
    available,
    excluded,
    excluded_begin,
    excluded_end,
):
    """Whether any item of the leaves may be given, false where not `wanted`."""
    slot = tl.load(leaf_begin + leaf, mask=wanted, other=0)
    end = tl.load(leaf_begin + leaf + 1, mask=wanted, other=0)
    found = leaf < 0  # nothing yet
    searched = wanted & (slot < end)
    while tl.max(searched.to(tl.int32), 0) > 0:
        found |= item_allowed(
            slot, searched, item_ids, available, excluded, excluded_begin, excluded_end
        )
        slot += 1
        searched = wanted & (found == 0) & (slot < end)
    return found


@triton.jit
def write_result(
    leaf,  # [BEAMS], best first
    score,
    code_words,  # pair of int64 [BEAMS], see beam.py
    count,  # leaves that are real
    request,
    k,
    leaf_begin,
    item_ids,
    available,
    excluded,
    excluded_begin,
    excluded_end,
    items,
    scores,
    codes,
    counts,
    NUM_LEVELS: tl.constexpr,
    BEAMS: tl.constexpr,
):
    """Leaves become items, in catalogue order inside a leaf, cut at k; the rest is padding."""
    place = tl.arange(0, BEAMS)
    live = place < count
    begin = tl.load(leaf_begin + leaf, mask=live, other=0)
    end = tl.load(leaf_begin + leaf + 1, mask=live, other=0)
    own = tl.zeros([BEAMS], tl.int32)  # items that a leaf may give, counted up to k
    slot = begin
    counted = live & (slot < end)
    while tl.max(counted.to(tl.int32), 0) > 0:
        own += item_allowed(
            slot, counted, item_ids, available, excluded, excluded_begin, excluded_end
        ).to(tl.int32)
        slot += 1
        counted = live & (own < k) & (slot < end)
    at = tl.cumsum(own, 0) - own
    total = tl.minimum(tl.sum(own, 0), k)

    row = tl.cast(request, tl.int64) * k
    slot = begin
    given = live & (at < k) & (slot < end)
    while tl.max(given.to(tl.int32), 0) > 0:
        ok = item_allowed(slot, given, item_ids, available, excluded, excluded_begin, excluded_end)
        tl.store(items + row + at, tl.load(item_ids + slot, mask=ok, other=0), mask=ok)
        tl.store(scores + row + at, score, mask=ok)
        for level in tl.static_range(NUM_LEVELS):
            code = (code_words[level // 4] >> (16 * (level % 4))) & 0xFFFF
            tl.store(codes + (row + at) * NUM_LEVELS + level, code.to(tl.int32), mask=ok)
        at += ok.to(tl.int32)
        slot += 1
        given = live & (at < k) & (slot < end)

    for base in range(total, k, BEAMS):
        rest = base + place
        tl.store(items + row + rest, tl.full([BEAMS], -1, tl.int64), mask=rest < k)
        tl.store(scores + row + rest, tl.full([BEAMS], float("-inf"), tl.float32), mask=rest < k)
        for level in tl.static_range(NUM_LEVELS):
            none = tl.full([BEAMS], -1, tl.int32)
            tl.store(codes + (row + rest) * NUM_LEVELS + level, none, mask=rest < k)
    tl.store(counts + request, total)
