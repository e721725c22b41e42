"""The n best beam candidates: 64-bit keys, a bitonic top-k per tile, merged tile by tile.

    key = (score's bits made monotonic) << 32 | ~(parent rank << 16 | sibling ordinal)

"Higher score, then the lower parent rank, then the lower code" is "greater key"
(csrc/sidmlp/beam_key.h; signed here, since Triton sorts signed integers). Keys are unique, so the
result does not depend on the order in which candidates come.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))  # below every candidate's key
BAD_KEY = tl.constexpr(2**63 - 1)  # above every candidate's; stands for a score that is not finite


@triton.jit
def make_key(score, rank, ordinal):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = ((rank << 16) | ordinal).to(tl.int64) ^ 0xFFFFFFFF
    return (ordered.to(tl.int64) << 32) | (low & 0xFFFFFFFF)


@triton.jit
def key_score(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_rank(key):
    return (((key & 0xFFFFFFFF) ^ 0xFFFFFFFF) >> 16).to(tl.int32)


@triton.jit
def key_ordinal(key):
    return ((key & 0xFFFF) ^ 0xFFFF).to(tl.int32)


@triton.jit
def top_keys(best, keys, BEAMS: tl.constexpr):
    """The BEAMS best of best [BEAMS], descending, and of keys [N >= BEAMS]; descending."""
    top = tl.topk(keys, BEAMS)
    # Of two descending lists, the larger of each and the other's mirror image are the best; they
    # rise and then fall, so one merge sorts them.
    upper = tl.maximum(best, tl.flip(top, 0))
    return tl.bitonic_merge(upper, descending=True)
