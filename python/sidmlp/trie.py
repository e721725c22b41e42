"""The catalogue as a prefix tree: per node a contiguous range of children, per leaf its items.

Nodes of every level stand in the lexicographic order of their prefixes. Children of node p of level
l-1 are the nodes child_begin[l-1][p] .. child_begin[l-1][p+1]-1 of level l; the root is the only
node of level 0. Items that may not be recommended at the moment stay in the tree: they never change
who is an only child or what a denominator sums over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def catalogue_arrays(
    codes: Tensor | np.ndarray | Sequence[Sequence[int]],
    item_ids: Tensor | np.ndarray | Sequence[int] | None = None,
    codes_per_level: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Checked int64 codes [N, L], int64 item ids [N] and the number of codes per level.

    The defaults are item ids 0..N-1 and the largest code + 1 per level.

    Raises ValueError for an empty catalogue, wrong shapes or dtypes, codes out of range and
    duplicate or negative ids.
    """
    code_array = np.asarray(codes)
    if code_array.ndim != 2 or 0 in code_array.shape or code_array.dtype.kind not in "iu":
        raise ValueError(
            f"codes: expected integers of shape [items, levels] with at least one of each, got "
            f"{code_array.dtype} {list(code_array.shape)}; pass one row of codes per item"
        )
    code_array = code_array.astype(np.int64)
    num_items, num_levels = code_array.shape
    needed = np.maximum(code_array.max(axis=0) + 1, 1)
    sizes = tuple(int(c) for c in (needed if codes_per_level is None else codes_per_level))
    if len(sizes) != num_levels:
        raise ValueError(
            f"codes_per_level: expected {num_levels} sizes, one per column of codes, got "
            f"{len(sizes)}; "
            f"pass the codebook size of every level"
        )
    outside = (code_array < 0) | (code_array >= np.asarray(sizes))
    if outside.any():
        row, level = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"codes: expected 0..{sizes[level] - 1} at level {level + 1}, got "
            f"{code_array[row, level]} in row {row}; "
            f"codes count from 0 at every level, without vocabulary offsets"
        )
    ids = np.arange(num_items) if item_ids is None else np.asarray(item_ids)
    if ids.shape != (num_items,) or ids.dtype.kind not in "iu":
        raise ValueError(
            f"item_ids: expected {num_items} integers, one per row of codes, got {ids.dtype} "
            f"{list(ids.shape)}; "
            f"pass one id per item"
        )
    ids = ids.astype(np.int64)
    if ids.min() < 0:
        raise ValueError(
            f"item_ids: expected ids >= 0, got {ids.min()}; -1 marks a missing result, so "
            f"renumber the items"
        )
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise ValueError(
            f"item_ids: expected every id once, got {twice[0]} more than once; remove the "
            f"duplicate rows"
        )
    return code_array, ids, sizes


@dataclass(frozen=True)
class Trie:
    """A catalogue as CSR arrays, int64 so that they index directly (`tensors` narrows them)."""

    codes_per_level: tuple[int, ...]
    child_begin: tuple[Tensor, ...]  # per level l: [n_{l-1} + 1]
    child_codes: tuple[Tensor, ...]  # per level l: [n_l], ascending among siblings
    leaf_begin: Tensor  # [n_L + 1]
    leaf_item_ids: Tensor  # [N], leaf by leaf, catalogue order inside a leaf
    leaf_available: Tensor  # bool [N]
    available_before: Tensor  # [N + 1], how many available items stand before a position
    sorted_item_ids: Tensor  # [N], ascending
    sorted_positions: Tensor  # [N], position in leaf order of each sorted id
    max_fanout: tuple[int, ...]  # per level l: the most children of a node of level l-1
    max_leaf_items: int

    @classmethod
    def from_codes(
        cls,
        codes: Tensor | np.ndarray | Sequence[Sequence[int]],
        item_ids: Tensor | np.ndarray | Sequence[int] | None = None,
        available: Tensor | np.ndarray | Sequence[bool] | None = None,
        codes_per_level: Sequence[int] | None = None,
    ) -> Trie:
        """Build from codes [N, L] (0-based per level), item ids [N] and availability [N].

        Raises ValueError as `catalogue_arrays` does, and for an availability of another length.
        """
        code_array, ids, sizes = catalogue_arrays(codes, item_ids, codes_per_level)
        num_items, num_levels = code_array.shape
        stock = (
            np.ones(num_items, dtype=bool)
            if available is None
            else np.asarray(available).astype(bool)
        )
        if stock.shape != (num_items,):
            raise ValueError(
                f"available: expected {num_items} flags, one per item, got {list(stock.shape)}; "
                f"pass True for every item that may be recommended"
            )
        # lexsort sorts by its last key first and is stable, so equal codes keep their catalogue
        # order.
        order = np.lexsort(code_array.T[::-1])
        rows = code_array[order]
        child_begin, child_codes, max_fanout = [], [], []
        parent_of_row = np.zeros(num_items, dtype=np.int64)
        num_parents = 1
        for level in range(num_levels):
            starts_node = np.ones(num_items, dtype=bool)
            starts_node[1:] = (rows[1:, : level + 1] != rows[:-1, : level + 1]).any(axis=1)
            parents = parent_of_row[starts_node]
            begin = np.searchsorted(parents, np.arange(num_parents + 1))
            child_begin.append(torch.from_numpy(begin.astype(np.int64)))
            child_codes.append(torch.from_numpy(rows[starts_node, level]))
            max_fanout.append(int(np.diff(begin).max()))
            parent_of_row = np.cumsum(starts_node) - 1
            num_parents = len(parents)
        leaf_begin = np.searchsorted(parent_of_row, np.arange(num_parents + 1))
        leaf_ids = ids[order]
        by_id = np.argsort(leaf_ids, kind="stable")
        return cls(
            codes_per_level=sizes,
            child_begin=tuple(child_begin),
            child_codes=tuple(child_codes),
            leaf_begin=torch.from_numpy(leaf_begin.astype(np.int64)),
            leaf_item_ids=torch.from_numpy(leaf_ids),
            leaf_available=torch.from_numpy(stock[order]),
            available_before=torch.from_numpy(
                np.concatenate([[0], np.cumsum(stock[order])]).astype(np.int64)
            ),
            sorted_item_ids=torch.from_numpy(leaf_ids[by_id]),
            sorted_positions=torch.from_numpy(by_id.astype(np.int64)),
            max_fanout=tuple(max_fanout),
            max_leaf_items=int(np.diff(leaf_begin).max()),
        )

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.child_codes)

    @property
    def num_items(self) -> int:
        """N, available or not."""
        return len(self.leaf_item_ids)

    def num_nodes(self, level_index: int) -> int:
        """n_l of level l = level_index + 1."""
        return len(self.child_codes[level_index])

    def leaf_codes(self) -> Tensor:
        """The codes of every leaf, int64 [n_L, L], by walking from the leaves to the root."""
        node = torch.arange(self.num_nodes(self.num_levels - 1), device=self.leaf_begin.device)
        columns = []
        for level in reversed(range(self.num_levels)):
            columns.append(self.child_codes[level][node])
            node = torch.searchsorted(self.child_begin[level], node, right=True) - 1
        return torch.stack(columns[::-1], dim=1)

    def positions(self, item_ids: Tensor) -> Tensor:
        """Position in leaf order of each id, -1 where the catalogue lacks it; int64, any shape."""
        where = torch.searchsorted(self.sorted_item_ids, item_ids).clamp(max=self.num_items - 1)
        return torch.where(
            self.sorted_item_ids[where] == item_ids, self.sorted_positions[where], -1
        )

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device."""
        return replace(
            self,
            child_begin=tuple(t.to(device) for t in self.child_begin),
            child_codes=tuple(t.to(device) for t in self.child_codes),
            leaf_begin=self.leaf_begin.to(device),
            leaf_item_ids=self.leaf_item_ids.to(device),
            leaf_available=self.leaf_available.to(device),
            available_before=self.available_before.to(device),
            sorted_item_ids=self.sorted_item_ids.to(device),
            sorted_positions=self.sorted_positions.to(device),
        )

    def tensors(self) -> list[Tensor]:
        """The arrays in the operators' layout and dtypes.

        [child_begin_1, codes_1, .., child_begin_L, codes_L, leaf_begin, leaf_item_ids,
        leaf_available] with begins int32, codes int16, ids int64 and availability uint8.
        """
        flat: list[Tensor] = []
        for begin, codes in zip(self.child_begin, self.child_codes, strict=True):
            flat += [begin.to(torch.int32), codes.to(torch.int16)]
        return [
            *flat,
            self.leaf_begin.to(torch.int32),
            self.leaf_item_ids,
            self.leaf_available.to(torch.uint8),
        ]
