"""What a decode in lower precision may and must return, given how far its scores may be off.

A near-tie lost at an early level changes the final set, so comparing last cuts is not enough. Two
beam sets are propagated in fp64, MUST within MAY. With s the exact score of a prefix and every
prefix score of the judged decode within eps_l of s after level l:

- candidates are the children of the prefixes in MAY; those whose parent is in MUST are certain;
- MAY drops c only when num_beams certain candidates d have s(d) > s(c) + 2 eps_l: all of them are
  candidates of the judged decode, and all of them beat c there, too;
- MUST keeps a certain c when fewer than num_beams other candidates d have s(d) >= s(c) - 2 eps_l:
  nobody else can push c out, whatever the tie rule does.

So MUST is within the judged beams and those within MAY, after every level. Leaves become items in
the same way. Item p (0-based) among the items of leaf c that may be emitted comes after everything
on the leaves ranked before c, and the first k items are returned:

- it is in MAY when c is in MAY and p + (the items on certain leaves that beat c by more than 2 eps)
  < k: a decode that emits c holds all those leaves and ranks them before c;
- it is in MUST when c is in MUST and p + (the items on other leaves of MAY that score at least
  s(c) - 2 eps) < k.

This covers every k <= num_beams and every collision; with k = num_beams and one item a leaf it is
the rule for leaves again. The two sets say nothing about the order within the result, which
`check_decode` judges from the scores returned. eps is the caller's: an absolute bound on
accumulated scores, fixed beforehand from the error of a level's scores, rounding of the returned
score included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sidmlp.beam import (
    Beams,
    Exclusion,
    LevelOptions,
    allowed_per_leaf,
    check_sizes,
    excluded_positions,
    expand,
    root,
)
from sidmlp.student import Student
from sidmlp.trie import Trie


class Result(Protocol):
    """What a decode returns, of the reference or of a kernel."""

    @property
    def items(self) -> Tensor: ...  # int64 [B, k]
    @property
    def scores(self) -> Tensor: ...  # [B, k]
    @property
    def codes(self) -> Tensor: ...  # int32 [B, k, L]
    @property
    def counts(self) -> Tensor: ...  # int32 [B]


@dataclass(frozen=True)
class RequestBounds:
    """The sets of one request; leaves are node numbers of the trie's last level.

    A request that is not finite must return nothing: all its sets are empty.
    """

    finite: bool
    must_leaves: frozenset[int]
    may_leaves: frozenset[int]
    must_items: frozenset[int]
    may_items: frozenset[int]
    scores: dict[int, float]  # fp64 score of every item on a leaf of MAY
    min_count: int  # a result has at least so many items
    k: int  # and at most so many
    eps: float  # of the last level


def _at_least(values: Tensor, thresholds: Tensor, weights: Tensor, strictly: bool) -> Tensor:
    """For every threshold [m] the summed weights [n] of the values [n] >= it (> if strictly)."""
    ordered, index = values.sort()
    before = torch.cat([weights.new_zeros(1), weights[index].cumsum(0)])
    return before[-1] - before[torch.searchsorted(ordered, thresholds, right=strictly)]


def _nothing(k: int, eps: float) -> RequestBounds:
    """The bounds of a request that must return nothing because it is not finite."""
    empty: frozenset[int] = frozenset()
    return RequestBounds(False, empty, empty, empty, empty, {}, 0, k, eps)


def _items_of(trie: Trie, leaf: int, barred: set[int]) -> list[int]:
    """The ids of a leaf that may be emitted, in catalogue order."""
    positions = range(int(trie.leaf_begin[leaf]), int(trie.leaf_begin[leaf + 1]))
    ids = [int(trie.leaf_item_ids[p]) for p in positions if bool(trie.leaf_available[p])]
    return [item for item in ids if item not in barred]


def _request_bounds(
    student: Student,
    context: Tensor,
    trie: Trie,
    num_beams: int,
    k: int,
    eps: Sequence[float],
    excluded: Tensor,
    options: LevelOptions,
) -> RequestBounds:
    """Bounds of one request: context [1, D], excluded [1, X] as `excluded_positions` gives it."""
    if not bool(context.isfinite().all()):
        return _nothing(k, eps[-1])
    beams = root(context, torch.ones(1, dtype=torch.bool, device=context.device))
    must = beams.live[0]  # [W], which beams are certain
    for level in range(trie.num_levels):
        found = expand(student, trie, level, context, beams, options)
        if not bool(found.finite):
            return _nothing(k, eps[-1])
        exists = found.exists[0]  # [W, F]
        sizes = torch.ones_like(found.nodes[0])
        if level == trie.num_levels - 1:
            sizes = allowed_per_leaf(trie, found.nodes.flatten(1), excluded).view_as(exists)
            exists = exists & (sizes > 0)
        parent, child = exists.nonzero(as_tuple=True)
        scores = found.scores[0, parent, child]
        sizes = sizes[parent, child]
        certain = must[parent]
        slack = 2 * eps[level]
        one = torch.ones_like(parent)
        beaten_by = _at_least(scores[certain], scores + slack, one[certain], strictly=True)
        rivals = _at_least(scores, scores - slack, one, strictly=False) - 1
        may = beaten_by < num_beams
        must = (certain & (rivals < num_beams))[may]
        if level == trie.num_levels - 1:
            ahead = _at_least(scores[certain], scores[may] + slack, sizes[certain], strictly=True)
            num_certain = int(certain.sum())
        codes = torch.cat([beams.codes[0, parent], found.codes[0, parent, child, None]], dim=1)
        beams = Beams(
            scores=scores[may][None],
            nodes=found.nodes[0, parent, child][may][None],
            codes=codes[may][None],
            live=torch.ones_like(scores[may], dtype=torch.bool)[None],
        )
        sizes = sizes[may]

    scores = beams.scores[0]
    rivals = _at_least(scores, scores - slack, sizes, strictly=False) - sizes
    barred = {int(trie.leaf_item_ids[p]) for p in excluded[0] if p < trie.num_items}
    must_items: set[int] = set()
    may_items: set[int] = set()
    exact: dict[int, float] = {}
    for n, leaf in enumerate(beams.nodes[0].tolist()):
        items = _items_of(trie, leaf, barred)
        exact.update(dict.fromkeys(items, float(scores[n])))
        may_items.update(items[: max(0, k - int(ahead[n]))])
        if bool(must[n]):
            must_items.update(items[: max(0, k - int(rivals[n]))])
    return RequestBounds(
        finite=True,
        must_leaves=frozenset(beams.nodes[0, must].tolist()),
        may_leaves=frozenset(beams.nodes[0].tolist()),
        must_items=frozenset(must_items),
        may_items=frozenset(may_items),
        scores=exact,
        min_count=min(k, num_beams, num_certain),
        k=k,
        eps=eps[-1],
    )


@torch.no_grad()
def decode_bounds(
    student: Student,
    context: Tensor,
    trie: Trie,
    num_beams: int,
    eps: float | Sequence[float],
    *,
    k: int | None = None,
    exclude: Exclusion = None,
    temperatures: Sequence[float] | None = None,
    level_weights: Sequence[float] | None = None,
    normalisation: str = "children",
) -> list[RequestBounds]:
    """MUST and MAY sets of every request, from an fp64 student and context [B, D].

    `eps` bounds |score of the judged decode - exact score| of a prefix: one number for all levels
    or one per level, absolute, fixed beforehand. `k` is the judged decode's (default num_beams).
    The module docstring states the rule. Raises ValueError for anything but fp64, an eps that is
    negative or not finite, and for what `beam_decode` refuses.
    """
    k = num_beams if k is None else k
    check_sizes(student, context, trie, num_beams, k)
    dtypes = {context.dtype} | {weight.dtype for weight in student.parameters()}
    if dtypes != {torch.float64}:
        raise ValueError(
            f"student, context: expected float64, got {sorted(map(str, dtypes))}; "
            f"pass student.double() and its own context"
        )
    per_level = [float(eps)] * trie.num_levels if isinstance(eps, float | int) else list(eps)
    if len(per_level) != trie.num_levels or not all(0 <= e < math.inf for e in per_level):
        raise ValueError(
            f"eps: expected one finite number >= 0 or {trie.num_levels} of them, got {eps}; "
            f"derive it from the error of a level's scores"
        )
    options = LevelOptions.make(trie.num_levels, temperatures, level_weights, normalisation)
    excluded = excluded_positions(trie, exclude, len(context))
    return [
        _request_bounds(
            student,
            context[b : b + 1],
            trie,
            num_beams,
            k,
            per_level,
            excluded[b : b + 1],
            options,
        )
        for b in range(len(context))
    ]


def _check_request(
    items: list[int],
    scores: list[float],
    codes: list[tuple[int, ...]],
    count: int,
    bounds: RequestBounds,
    trie: Trie,
    leaf_codes: Tensor,
    barred: set[int],
) -> list[str]:
    """The violations of one request, without its number."""
    if not 0 <= count <= len(items):
        return [f"counts is {count}, expected 0..{len(items)}"]
    faults = []
    padding = zip(items[count:], scores[count:], codes[count:], strict=True)
    if any(i != -1 or s != -math.inf or set(c) != {-1} for i, s, c in padding):
        faults.append(f"padding beyond counts {count} is not item -1, score -inf, codes -1")
    items, scores, codes = items[:count], scores[:count], codes[:count]
    if not bounds.finite:
        return [*faults, f"not finite, so counts must be 0, got {count}"] if count else faults
    if count < bounds.min_count:
        faults.append(f"counts is {count}, expected at least {bounds.min_count}")
    if len(set(items)) < count:
        faults.append(f"items appear twice: {sorted({i for i in items if items.count(i) > 1})}")
    for n in range(1, count):
        if not scores[n] <= scores[n - 1]:
            faults.append(f"scores ascend at rank {n}: {scores[n - 1]!r} then {scores[n]!r}")

    positions = trie.positions(torch.tensor(items, dtype=torch.int64, device=leaf_codes.device))
    leaves = (torch.searchsorted(trie.leaf_begin, positions, right=True) - 1).tolist()
    for n, (item, position, leaf) in enumerate(zip(items, positions.tolist(), leaves, strict=True)):
        if position < 0:
            faults.append(f"item {item} is not in the catalogue")
            continue
        if not bool(trie.leaf_available[position]):
            faults.append(f"item {item} is not available")
        if item in barred:
            faults.append(f"item {item} is excluded")
        if codes[n] != tuple(leaf_codes[leaf].tolist()):
            wanted = leaf_codes[leaf].tolist()
            faults.append(f"codes of item {item} are {list(codes[n])}, expected {wanted}")
        exact = bounds.scores.get(item)
        if exact is not None and not abs(scores[n] - exact) <= bounds.eps:
            faults.append(
                f"score of item {item} is {scores[n]!r}, recomputed {exact!r}: off by "
                f"{abs(scores[n] - exact):.3g}, eps is {bounds.eps:.3g}"
            )
    for leaf, run in itertools.groupby(range(count), key=leaves.__getitem__):
        ranks = list(run)
        got = [items[n] for n in ranks]
        # Only the cut at k may take items from a leaf, and only from its end.
        wanted = _items_of(trie, leaf, barred)[: bounds.k - ranks[0]] if leaf >= 0 else got
        if got != wanted:
            faults.append(f"items of leaf {leaf} at rank {ranks[0]} are {got}, expected {wanted}")
        if len({scores[n] for n in ranks}) > 1:
            faults.append(f"items {got} share a semantic ID, yet their scores differ")
    if bounds.must_items - set(items):
        faults.append(f"MUST items are missing: {sorted(bounds.must_items - set(items))}")
    if set(items) - bounds.may_items:
        faults.append(f"items outside MAY: {sorted(set(items) - bounds.may_items)}")
    return faults


def check_decode(
    result: Result,
    bounds: Sequence[RequestBounds],
    trie: Trie,
    *,
    exclude: Exclusion = None,
) -> list[str]:
    """Every way in which a result breaks its bounds or a decode's rules; empty when it is right.

    Checked per request: MUST within items within MAY, ids of the catalogue, available, not
    excluded, no duplicates, codes of the item, scores descending and within eps of the exact
    ones, the items of a leaf together, complete up to the cut, in catalogue order and with one
    score, counts and padding.
    `bounds` must come from `decode_bounds` with the same k, num_beams, exclusion and options.
    Raises ValueError when batch sizes or k differ.
    """
    batch, k = result.items.shape
    if len(bounds) != batch or any(bound.k != k for bound in bounds):
        raise ValueError(
            f"bounds: expected those of {batch} requests with k = {k}, got {len(bounds)} with k = "
            f"{sorted({bound.k for bound in bounds})}; compute them for this very decode"
        )
    leaf_codes = trie.leaf_codes()
    faults = []
    for b, bound in enumerate(bounds):
        sequence = None if exclude is None else exclude[b]
        found = _check_request(
            result.items[b].tolist(),
            result.scores[b].tolist(),
            [tuple(row) for row in result.codes[b].tolist()],
            int(result.counts[b]),
            bound,
            trie,
            leaf_codes,
            set() if sequence is None else {int(item) for item in sequence},
        )
        faults += [f"request {b}: {fault}" for fault in found]
    return faults
