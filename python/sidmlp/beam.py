"""Reference beam decode: context vectors -> the best items, every level's heads, catalogue and cut.

Level 1 scores w_1 log_softmax(logits / t_1) over all codes; every further level adds w_l times the
log-probability of a child among its siblings. The num_beams best prefixes survive each level; after
the last one leaves become items. What the published description leaves open is decided so:

- A code without children never occupies a beam, at level 1 too.
- Ties: higher score, then the lower parent rank, then the lower code; -0 counts as +0.
- Several items on one semantic ID are all emitted, in catalogue order, with the same score.
- Leaves are cut to num_beams first, then they become items, and items are cut to k.
- Exclusion takes one id sequence per request (ragged, any length, empty or None, unknown ids are
  ignored) and acts at the last level, before its cut; a leaf whose items are all excluded or
  unavailable is no candidate there.
- Exclusion and availability never change a denominator, a score or who is an only child.
- An only child has log-probability exactly 0 at levels >= 2 of "children"; no logit of it is read.
- A request with a non-finite valid state, context, logit that a denominator reads, or candidate
  score gets counts 0; other requests are untouched. Masked states are never read.
- Fewer results than k: items -1, scores -inf, codes -1, and counts says how many are real. A
  num_beams above what exists gives fewer results, too.
- normalisation "children" renormalises over a node's children at levels >= 2, level 1 always
  over all C_1 codes; "codebook" takes the softmax over all C_l codes at every level.
- Temperatures divide logits and are > 0; level weights are any finite numbers, negative or 0 too.
- Softmax and scores are at least fp32 even where the student runs in half precision.

Source: SID-MLP (arXiv 2605.12617), decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidmlp.student import Student
from sidmlp.trie import Trie, catalogue_arrays

NORMALISATIONS = ("children", "codebook")

# One id sequence per request; None stands for none, for one request or for all of them.
Exclusion = Sequence[Any] | None


@dataclass(frozen=True)
class Decoded:
    """The results of a batch, best first; rows beyond a request's count are padding."""

    items: Tensor  # int64 [B, k], -1 beyond counts
    scores: Tensor  # [B, k], -inf beyond counts
    codes: Tensor  # int32 [B, k, L], -1 beyond counts
    counts: Tensor  # int32 [B]


@dataclass(frozen=True)
class Beams:
    """The prefixes of every request that survived a level, by rank; slots not live hold node 0."""

    scores: Tensor  # [B, W], -inf where not live
    nodes: Tensor  # int64 [B, W]
    codes: Tensor  # int64 [B, W, l]
    live: Tensor  # bool [B, W]


@dataclass(frozen=True)
class Candidates:
    """The children of every beam, padded to the level's largest fan-out F."""

    scores: Tensor  # [B, W, F], -inf where no child exists
    nodes: Tensor  # int64 [B, W, F]
    codes: Tensor  # int64 [B, W, F]
    exists: Tensor  # bool [B, W, F]
    finite: Tensor  # bool [B]


@dataclass(frozen=True)
class LevelOptions:
    """Checked temperatures and weights, one per level, and the normalisation."""

    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    normalisation: str

    @classmethod
    def make(
        cls,
        num_levels: int,
        temperatures: Sequence[float] | None,
        level_weights: Sequence[float] | None,
        normalisation: str,
    ) -> LevelOptions:
        """None stands for 1.0 at every level. Raises ValueError naming what is wrong."""
        if normalisation not in NORMALISATIONS:
            raise ValueError(
                f"normalisation: expected one of {NORMALISATIONS}, got {normalisation!r}; "
                f'"children" is how SID-MLP students are trained'
            )
        options = []
        for name, given in (("temperatures", temperatures), ("level_weights", level_weights)):
            values = (1.0,) * num_levels if given is None else tuple(float(x) for x in given)
            if len(values) != num_levels or not all(math.isfinite(x) for x in values):
                raise ValueError(
                    f"{name}: expected {num_levels} finite numbers, one per level, got {given}; "
                    f"pass None for 1.0 at every level"
                )
            options.append(values)
        if min(options[0]) <= 0:
            raise ValueError(
                f"temperatures: expected numbers > 0, got {temperatures}; "
                f"use a small temperature to sharpen, a large one to flatten"
            )
        return cls(options[0], options[1], normalisation)


def check_sizes(student: Student, context: Tensor, trie: Trie, num_beams: int, k: int) -> None:
    """Raises ValueError where student, context, trie, num_beams and k do not fit together."""
    sizes = student.config.codes_per_level
    if len(trie.codes_per_level) != len(sizes) or any(
        have > most for have, most in zip(trie.codes_per_level, sizes, strict=True)
    ):
        raise ValueError(
            f"trie: expected codes within {sizes} per level as the student has them, "
            f"got {trie.codes_per_level}; build it from this student's semantic IDs"
        )
    if context.ndim != 2 or context.shape[1] != student.config.dim:
        raise ValueError(
            f"context: expected shape [batch, {student.config.dim}], got {list(context.shape)}; "
            f"pass what `student.context` returns"
        )
    if num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, got {num_beams}; 50 is usual")
    if not 1 <= k <= num_beams:
        raise ValueError(
            f"k: expected 1..num_beams = 1..{num_beams}, got {k}; raise num_beams or lower k"
        )


def excluded_positions(trie: Trie, exclude: Exclusion, batch: int) -> Tensor:
    """Positions in leaf order of the excluded items that are available, int64 [B, X >= 1].

    Ascending, each once, padded with the number of items. Raises ValueError for another number of
    sequences than requests or ids that are not integers.
    """
    rows: list[Tensor] = [trie.leaf_begin.new_empty(0)] * batch
    if exclude is not None:
        if len(exclude) != batch:
            raise ValueError(
                f"exclude: expected {batch} id sequences, one per request, got {len(exclude)}; "
                f"pass an empty one for a request that excludes nothing"
            )
        for request, sequence in enumerate(exclude):
            ids = np.asarray([] if sequence is None else sequence)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(
                    f"exclude: expected a sequence of integer item ids for request {request}, "
                    f"got {sequence!r}; pass e.g. [[12, 873], []]"
                )
            found = trie.positions(
                torch.from_numpy(ids.astype(np.int64)).to(trie.leaf_begin.device)
            )
            found = found[found >= 0]
            rows[request] = found[trie.leaf_available[found]].unique()
    width = max([1, *(len(row) for row in rows)])
    padded = trie.leaf_begin.new_full((batch, width), trie.num_items)
    for request, row in enumerate(rows):
        padded[request, : len(row)] = row
    return padded


def allowed_per_leaf(trie: Trie, leaves: Tensor, excluded: Tensor) -> Tensor:
    """How many items of each leaf [B, n] may be emitted, given `excluded_positions` [B, X]."""
    begin, end = trie.leaf_begin[leaves], trie.leaf_begin[leaves + 1]
    available = trie.available_before[end] - trie.available_before[begin]
    barred = torch.searchsorted(excluded, end) - torch.searchsorted(excluded, begin)
    return available - barred


def root(context: Tensor, live: Tensor) -> Beams:
    """The beams before level 1: the root alone, with score 0."""
    batch = len(context)
    dtype = torch.promote_types(context.dtype, torch.float32)
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=context.device)
    scores = torch.zeros(batch, 1, dtype=dtype, device=context.device)
    return Beams(scores, nodes, nodes.new_zeros(batch, 1, 0), live[:, None])


def expand(
    student: Student,
    trie: Trie,
    level: int,
    context: Tensor,
    beams: Beams,
    options: LevelOptions,
) -> Candidates:
    """Score every child of every live beam at level index `level`.

    score(child) = score(beam) + w_l log p(child), p as the options' normalisation says.
    """
    last_node = trie.num_nodes(level) - 1
    begin = trie.child_begin[level][beams.nodes]  # [B, W]
    fanout = trie.child_begin[level][beams.nodes + 1] - begin
    offsets = torch.arange(trie.max_fanout[level], device=begin.device)
    exists = (offsets < fanout[..., None]) & beams.live[..., None]  # [B, W, F]
    nodes = (begin[..., None] + offsets).clamp(max=last_node)
    codes = trie.child_codes[level][nodes]

    logits = student.logits(level, context[:, None, :], beams.codes).to(beams.scores.dtype)
    logits = logits / options.temperatures[level]  # [B, W, C]
    if options.normalisation == "children" and level > 0:
        only_child = (fanout == 1)[..., None]
        logits = torch.where(exists, logits.gather(-1, codes), -math.inf)
        read_is_finite = logits.isfinite() | only_child | ~exists
        log_probs = torch.where(only_child, 0.0, logits.log_softmax(dim=-1))
    else:
        read_is_finite = logits.isfinite() | ~beams.live[..., None]
        log_probs = logits.log_softmax(dim=-1).gather(-1, codes)

    scores = beams.scores[..., None] + options.weights[level] * log_probs
    score_is_finite = scores.isfinite() | ~exists
    finite = read_is_finite.flatten(1).all(dim=1) & score_is_finite.flatten(1).all(dim=1)
    scores = torch.where(scores == 0, 0.0, scores)  # -0 becomes +0, whatever the sort thinks of it
    return Candidates(torch.where(exists, scores, -math.inf), nodes, codes, exists, finite)


def select(candidates: Candidates, beams: Beams, width: int, exact_ties: bool) -> Beams:
    """The `width` best candidates of every request, by the tie rule if `exact_ties`."""
    fanout = candidates.scores.shape[-1]
    flat = candidates.scores.flatten(1)
    if exact_ties:
        # Flattened candidates stand by parent rank, then by code: a stable sort is the tie rule.
        scores, index = torch.sort(flat, dim=1, descending=True, stable=True)
        scores, index = scores[:, :width], index[:, :width]
    else:
        scores, index = torch.topk(flat, width, dim=1)
    live = candidates.exists.flatten(1).gather(1, index)
    parent = (index // fanout)[..., None].expand(-1, -1, beams.codes.shape[-1])
    code = candidates.codes.flatten(1).gather(1, index)
    codes = torch.cat([beams.codes.gather(1, parent), code[..., None]], dim=-1)
    nodes = torch.where(live, candidates.nodes.flatten(1).gather(1, index), 0)
    return Beams(scores, nodes, codes, live)


def emit(trie: Trie, leaves: Beams, excluded: Tensor, k: int) -> Decoded:
    """Turn surviving leaves into items: catalogue order inside a leaf, cut at k, padded."""
    batch, device = len(leaves.nodes), leaves.nodes.device
    begin, end = trie.leaf_begin[leaves.nodes], trie.leaf_begin[leaves.nodes + 1]
    offsets = torch.arange(trie.max_leaf_items, device=device)
    position = begin[..., None] + offsets  # [B, W, M]
    exists = (position < end[..., None]) & leaves.live[..., None]
    position = position.clamp(max=trie.num_items - 1).flatten(1)
    slot = torch.searchsorted(excluded, position).clamp(max=excluded.shape[1] - 1)
    barred = excluded.gather(1, slot) == position
    allowed = exists.flatten(1) & trie.leaf_available[position] & ~barred

    rank = allowed.cumsum(dim=1) - 1
    counts = allowed.sum(dim=1).clamp(max=k)
    # Whatever is not emitted lands in column k, which is cut off.
    target = torch.where(allowed, rank.clamp(max=k), k)
    beam = torch.arange(leaves.nodes.shape[1], device=device).repeat_interleave(len(offsets))
    source = torch.zeros(batch, k + 1, dtype=torch.int64, device=device)
    source = source.scatter(1, target, torch.arange(len(beam), device=device).expand(batch, -1))
    source = source[:, :k]
    real = torch.arange(k, device=device) < counts[:, None]
    beam = beam[source]
    codes = leaves.codes.gather(1, beam[..., None].expand(-1, -1, trie.num_levels))
    return Decoded(
        items=torch.where(real, trie.leaf_item_ids[position.gather(1, source)], -1),
        scores=torch.where(real, leaves.scores.gather(1, beam), -math.inf),
        codes=torch.where(real[..., None], codes, -1).to(torch.int32),
        counts=counts.to(torch.int32),
    )


@torch.no_grad()
def beam_decode(
    student: Student,
    context: Tensor,
    trie: Trie,
    k: int,
    num_beams: int,
    exclude: Exclusion = None,
    temperatures: Sequence[float] | None = None,
    level_weights: Sequence[float] | None = None,
    normalisation: str = "children",
    exact_ties: bool = True,
) -> Decoded:
    """Decode context vectors [B, D] (the student's dtype) to the k best items of each request.

    The module docstring states every rule. `exact_ties=False` takes torch.topk, whose order among
    equal scores is arbitrary: for timing only. Scores come in the student's dtype, at least fp32.
    Raises ValueError for sizes that do not fit together, k outside 1..num_beams and bad options.
    """
    check_sizes(student, context, trie, num_beams, k)
    options = LevelOptions.make(trie.num_levels, temperatures, level_weights, normalisation)
    excluded = excluded_positions(trie, exclude, len(context))
    finite = context.isfinite().all(dim=1)
    context = torch.where(finite[:, None], context, 0)
    beams = root(context, finite)
    for level in range(trie.num_levels):
        found = expand(student, trie, level, context, beams, options)
        exists = found.exists & found.finite[:, None, None]
        if level == trie.num_levels - 1:
            count = allowed_per_leaf(trie, found.nodes.flatten(1), excluded)
            exists = exists & (count > 0).view_as(exists)
        scores = torch.where(exists, found.scores, -math.inf)
        found = Candidates(scores, found.nodes, found.codes, exists, found.finite)
        width = min(num_beams, scores.shape[1] * scores.shape[2], trie.num_nodes(level))
        beams = select(found, beams, width, exact_ties)
    return emit(trie, beams, excluded, k)


@torch.no_grad()
def decode_states(
    student: Student,
    states: Tensor,
    mask: Tensor,
    trie: Trie,
    k: int,
    num_beams: int,
    exclude: Exclusion = None,
    temperatures: Sequence[float] | None = None,
    level_weights: Sequence[float] | None = None,
    normalisation: str = "children",
    exact_ties: bool = True,
) -> Decoded:
    """Decode encoder states [B, T, D] under mask bool [B, T] (True = valid): readout, then beams.

    Takes and raises what `Student.context` and `beam_decode` do.
    """
    context = student.context(states, mask)
    # A non-finite valid state disqualifies its request even where the readout would absorb it.
    finite = (states.isfinite().all(dim=2) | ~mask).all(dim=1)
    context = torch.where(finite[:, None], context, math.nan)
    options = (exclude, temperatures, level_weights, normalisation, exact_ties)
    return beam_decode(student, context, trie, k, num_beams, *options)


@torch.no_grad()
def brute_force_decode(
    student: Student,
    context: Tensor,
    codes: Any,
    item_ids: Any,
    k: int,
    *,
    available: Sequence[bool] | None = None,
    exclude: Exclusion = None,
    temperatures: Sequence[float] | None = None,
    level_weights: Sequence[float] | None = None,
    normalisation: str = "children",
) -> Decoded:
    """Score every item of a small catalogue level by level in Python loops, without any cut.

    Takes codes [N, L] and item ids [N] themselves, no trie. Equals `beam_decode` where num_beams is
    at least the number of nodes of every level. Raises ValueError as `catalogue_arrays` does.
    """
    rows, ids, sizes = catalogue_arrays(codes, item_ids, student.config.codes_per_level)
    items = [tuple(row) for row in rows.tolist()]
    options = LevelOptions.make(len(sizes), temperatures, level_weights, normalisation)
    children: dict[tuple[int, ...], set[int]] = {}
    for item in items:
        for level, code in enumerate(item):
            children.setdefault(item[:level], set()).add(code)

    decoded = []
    for request in range(len(context)):
        finite = bool(context[request].isfinite().all())
        scores: dict[tuple[int, ...], float] = {(): 0.0}
        for prefix in sorted(children, key=len):
            level = len(prefix)
            row = student.logits(level, context[request], torch.tensor(prefix, dtype=torch.int64))
            only_siblings = normalisation == "children" and level > 0
            pool = children[prefix] if only_siblings else range(sizes[level])
            logits = {code: float(row[code]) / options.temperatures[level] for code in pool}
            if only_siblings and len(pool) == 1:
                log_probs = dict.fromkeys(pool, 0.0)
            elif all(math.isfinite(x) for x in logits.values()):
                peak = max(logits.values())
                total = math.log(math.fsum(math.exp(x - peak) for x in logits.values()))
                log_probs = {code: x - peak - total for code, x in logits.items()}
            else:
                finite, log_probs = False, dict.fromkeys(pool, 0.0)
            for code in children[prefix]:
                child = (*prefix, code)
                scores[child] = scores[prefix] + options.weights[level] * log_probs[code]

        barred = set() if exclude is None or exclude[request] is None else set(exclude[request])
        ranked = []
        for n, item in enumerate(items):
            if finite and (available is None or available[n]) and int(ids[n]) not in barred:
                # The tie rule unrolled: own score, then the parents' scores upwards, then codes.
                path = [-scores[item[: level + 1]] for level in reversed(range(len(item)))]
                ranked.append((path, item, n))
        best = [(int(ids[n]), -path[0], item) for path, item, n in sorted(ranked)[:k]]
        missing = [(-1, -math.inf, (-1,) * len(sizes))] * (k - len(best))
        decoded.append((best + missing, len(best)))
    return Decoded(
        items=torch.tensor([[r[0] for r in best] for best, _ in decoded], dtype=torch.int64),
        scores=torch.tensor([[r[1] for r in best] for best, _ in decoded], dtype=torch.float64),
        codes=torch.tensor([[r[2] for r in best] for best, _ in decoded], dtype=torch.int32),
        counts=torch.tensor([count for _, count in decoded], dtype=torch.int32),
    )
