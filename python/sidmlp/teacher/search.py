"""Beam search with the teacher, over the catalogue's items or over every token sequence.

The plain convention of generative retrieval: the log-softmax runs over the whole vocabulary and the
catalogue only removes candidates; nothing is renormalised. (The student renormalises.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .generative import GenerativeTeacher, SequenceState


class PrefixTable:
    """Which codes continue which prefix, and which item a complete one names.

    Nodes of level l are numbered in lexicographic order of their prefixes; the root is node 0 of
    level 0. ``children[l][p]`` lists, per code, the node of level l + 1 below node p or -1.
    Memory is nodes times codes: a teacher's tool for catalogues of up to some 100,000 items.
    """

    def __init__(self, codes: np.ndarray, codes_per_level: tuple[int, ...]) -> None:
        """codes: int64 [N, L], 0-based; every row is an item, equal rows share a leaf."""
        self.children: list[Tensor] = []
        parent = np.zeros(len(codes), dtype=np.int64)
        nodes = 1
        for level, count in enumerate(codes_per_level):
            keys, node = np.unique(parent * count + codes[:, level], return_inverse=True)
            table = torch.full((nodes * count,), -1, dtype=torch.int64)
            table[torch.from_numpy(keys)] = torch.arange(len(keys))
            self.children.append(table.view(nodes, count))
            parent, nodes = node.reshape(-1), len(keys)
        self.leaf_of_item = torch.from_numpy(parent)
        order = np.argsort(parent, kind="stable")
        self.leaf_items = torch.from_numpy(order)
        sizes = np.bincount(parent, minlength=nodes)
        self.leaf_begin = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
        self.leaf_sizes = torch.from_numpy(sizes)
        self.largest_leaf = int(sizes.max(initial=0))

    def to(self, device: torch.device | str) -> PrefixTable:
        """The same table for searches on another device."""
        moved = copy.copy(self)
        moved.children = [table.to(device) for table in self.children]
        moved.leaf_of_item = self.leaf_of_item.to(device)
        moved.leaf_items = self.leaf_items.to(device)
        moved.leaf_begin = self.leaf_begin.to(device)
        moved.leaf_sizes = self.leaf_sizes.to(device)
        return moved


@dataclass(frozen=True)
class SearchResult:
    """Ranked answers of a batch.

    items: int64 [B, k], dense item indices, -1 where there are fewer; scores: [B, k], summed
    log-probabilities, -inf where there are fewer; invalid: int64 [B], how many of the beams ended
    on a sequence that no item has (always 0 in a constrained search).
    """

    items: Tensor
    scores: Tensor
    invalid: Tensor


@torch.no_grad()
def beam_search(
    teacher: GenerativeTeacher,
    ids: Tensor,
    mask: Tensor,
    table: PrefixTable,
    *,
    k: int,
    num_beams: int,
    constrained: bool = True,
    exclude: list[np.ndarray] | None = None,
) -> SearchResult:
    """The k best items for token ids int64 [B, T], mask bool [B, T].

    score = sum over l of log softmax_vocab(decoder logits)[token of c_l]. constrained: only
    prefixes of items are followed; otherwise every token may follow (padding, end and user tokens
    and codes of other levels too, as a plain ``generate`` does) and beams that name no item are
    dropped at the end and counted. exclude: dense item indices per request never to return,
    removed before the last cut (constrained) or from the answer (unconstrained). Equal scores
    keep the higher-ranked parent, then the lower token. Several items on one leaf share its score.
    Raises ValueError unless 1 <= k <= num_beams.
    """
    if not 1 <= k <= num_beams:
        raise ValueError(f"k must be between 1 and num_beams ({num_beams}), got {k}")
    training = teacher.training
    teacher.eval()
    try:
        table = table.to(ids.device)
        state = teacher.begin(ids, mask)
        run = _constrained if constrained else _unconstrained
        leaves, scores, invalid = run(teacher, state, table, num_beams, len(ids), exclude)
    finally:
        teacher.train(training)
    return _emit(leaves, scores, invalid, table, k, exclude)


def _constrained(
    teacher: GenerativeTeacher,
    state: SequenceState,
    table: PrefixTable,
    num_beams: int,
    users: int,
    exclude: list[np.ndarray] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = teacher.tokens
    device = teacher.offsets.device
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(users, 1, device=device)
    tokens = torch.full((users, 1), spec.pad_id, device=device)
    for level, count in enumerate(spec.codes_per_level):
        start = spec.code_offsets[level]
        log_probs = _log_probs(state, tokens)[..., start : start + count]
        children = table.children[level][nodes]  # [users, beams, count]
        # A dead beam keeps node 0 and the score -inf, so that nothing below it can win.
        candidates = (scores[..., None] + log_probs).masked_fill(children < 0, -torch.inf)
        if exclude is not None and level == spec.num_levels - 1:
            gone = _all_excluded(table, exclude)
            lost = gone.gather(1, children.clamp(min=0).flatten(1)).view_as(children)
            candidates = candidates.masked_fill(lost, -torch.inf)
        scores, chosen = _best(candidates.flatten(1), num_beams)
        parents, code = chosen // count, chosen % count
        nodes = children.flatten(1).gather(1, chosen).clamp(min=0)
        state.reorder(parents)
        tokens = code + start
    leaves = nodes.masked_fill(scores == -torch.inf, -1)
    return leaves, scores, torch.zeros(users, dtype=torch.int64, device=device)


def _unconstrained(
    teacher: GenerativeTeacher,
    state: SequenceState,
    table: PrefixTable,
    num_beams: int,
    users: int,
    exclude: list[np.ndarray] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = teacher.tokens
    device = teacher.offsets.device
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(users, 1, device=device)
    tokens = torch.full((users, 1), spec.pad_id, device=device)
    for level, count in enumerate(spec.codes_per_level):
        start = spec.code_offsets[level]
        log_probs = _log_probs(state, tokens)
        vocabulary = log_probs.shape[-1]
        scores, chosen = _best((scores[..., None] + log_probs).flatten(1), num_beams)
        parents, tokens = chosen // vocabulary, chosen % vocabulary
        above, code = nodes.gather(1, parents), tokens - start
        # A node of -1: the prefix has left the catalogue.
        inside = (above >= 0) & (code >= 0) & (code < count)
        below = table.children[level][above.clamp(min=0), code.clamp(0, count - 1)]
        nodes = torch.where(inside, below, -1)
        state.reorder(parents)
    invalid = (nodes < 0).sum(1)
    scores = scores.masked_fill(nodes < 0, -torch.inf)
    # Valid beams move to the front in the order they have.
    order = torch.argsort(nodes < 0, dim=1, stable=True)
    return nodes.gather(1, order), scores.gather(1, order), invalid


def _log_probs(state: SequenceState, tokens: Tensor) -> Tensor:
    """After feeding tokens int64 [users, beams]: [users, beams, vocab], never half precision."""
    logits = state.feed(tokens[..., None])[:, :, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _best(candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest per row, equal ones by index (topk promises no order among those)."""
    values, index = candidates.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def _all_excluded(table: PrefixTable, exclude: list[np.ndarray]) -> Tensor:
    """Leaves whose every item is excluded, per request; bool [B, leaves]."""
    device, leaves = table.leaf_sizes.device, table.leaf_sizes.numel()
    rows, items = _flat([np.unique(one) for one in exclude], device)
    place = rows * leaves + table.leaf_of_item[items]
    counts = torch.zeros(len(exclude) * leaves, dtype=torch.int32, device=device)
    counts.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    return counts.view(-1, leaves) == table.leaf_sizes


def _flat(lists: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """All items of all requests one after another, and the request of each; int64 [n] both."""
    rows = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
    flat = np.concatenate([np.zeros(0), *lists]).astype(np.int64)
    return torch.from_numpy(rows).to(device), torch.from_numpy(flat).to(device)


def _emit(
    leaves: Tensor,
    scores: Tensor,
    invalid: Tensor,
    table: PrefixTable,
    k: int,
    exclude: list[np.ndarray] | None,
) -> SearchResult:
    """Leaves to items, in catalogue order within a leaf, without the excluded ones, cut at k."""
    users, device = len(leaves), leaves.device
    inside = torch.arange(table.largest_leaf, device=device)
    leaf = leaves.clamp(min=0)
    real = (leaves >= 0)[..., None] & (inside < table.leaf_sizes[leaf][..., None])
    place = (table.leaf_begin[leaf][..., None] + inside).clamp(max=table.leaf_items.numel() - 1)
    found = table.leaf_items[place].flatten(1)  # [users, beams x largest leaf], best first
    real = real.flatten(1)
    if exclude is not None:
        rows, excluded = _flat(exclude, device)
        count = table.leaf_of_item.numel()
        key = torch.arange(users, device=device)[:, None] * count + found
        real &= ~torch.isin(key, rows * count + excluded)
    rank = real.cumsum(1) - 1
    # What is not wanted goes to a column that is cut off.
    column = torch.where(real & (rank < k), rank, k)
    items = torch.full((users, k + 1), -1, dtype=torch.int64, device=device)
    item_scores = torch.full((users, k + 1), -torch.inf, dtype=scores.dtype, device=device)
    items.scatter_(1, column, found)
    item_scores.scatter_(1, column, scores.repeat_interleave(table.largest_leaf, dim=1))
    return SearchResult(items[:, :k].cpu(), item_scores[:, :k].cpu(), invalid.cpu())
