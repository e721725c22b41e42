"""The catalogue's trie as the operators take it: CSR levels in tensors, on any device.

Level l holds one node per distinct prefix of l codes, in lexicographic order. The tensors are

    [child_begin_1, codes_1, .., child_begin_L, codes_L, leaf_begin, leaf_item_ids, leaf_available]

child_begin_l int32 [n_{l-1} + 1] (n_0 = 1, the root): the children of node p of level l-1 are the
nodes child_begin_l[p] .. child_begin_l[p+1]-1 of level l; codes_l int16 [n_l], ascending among
siblings; leaf_begin int32 [n_L + 1]: the items of leaf n are leaf_begin[n] .. leaf_begin[n+1]-1;
leaf_item_ids int64 [N] in leaf order, catalogue order inside a leaf; leaf_available uint8 [N] in
leaf order. Items out of stock stay in the trie: availability never changes a denominator.
"""

from __future__ import annotations

import functools
import importlib
import threading
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch


@functools.cache
def host_library() -> ModuleType:
    """The compiled module `sidmlp_kernels._lib._host`; ImportError names the build command."""
    try:
        return importlib.import_module("sidmlp_kernels._lib._host")
    except ImportError as error:
        raise ImportError(
            f"the compiled library sidmlp_kernels._lib._host cannot be loaded ({error}); build it "
            f"in the repository root with `pip install --no-build-isolation -e .`"
        ) from error


@dataclass(frozen=True)
class LevelStatistics:
    """One level of a trie: what it costs to expand a node of level `level - 1`."""

    level: int  # 1..L
    codes: int  # C_l
    nodes: int  # n_l
    mean_children: float  # n_l / n_{l-1}
    max_children: int  # of one node of level l-1
    only_child_share: float  # nodes of level l-1 with one child / n_{l-1}; those need no logits


@dataclass(frozen=True)
class CatalogueStatistics:
    """Sizes of a catalogue's trie; `str()` is a table."""

    num_items: int
    levels: tuple[LevelStatistics, ...]
    max_items_per_leaf: int
    items_sharing_codes: int  # items whose codes another item has too
    node_bytes: int  # child_begin and codes of all levels, and leaf_begin
    item_bytes: int  # leaf_item_ids and leaf_available

    @property
    def num_nodes(self) -> int:
        """Nodes of all levels, without the root."""
        return sum(level.nodes for level in self.levels)

    @property
    def bytes_per_node(self) -> float:
        """`node_bytes` / `num_nodes`."""
        return self.node_bytes / self.num_nodes

    def __str__(self) -> str:
        lines = ["level   codes       nodes  mean children  max children  only children"]
        lines += [
            f"{s.level:>5}{s.codes:>8}{s.nodes:>12}{s.mean_children:>15.3f}{s.max_children:>14}"
            f"{100 * s.only_child_share:>13.1f} %"
            for s in self.levels
        ]
        lines.append(
            f"{self.num_items} items on {self.levels[-1].nodes} leaves, at most "
            f"{self.max_items_per_leaf} on one; {self.items_sharing_codes} items share their codes"
        )
        lines.append(
            f"{self.node_bytes} bytes of nodes ({self.bytes_per_node:.2f} a node), "
            f"{self.item_bytes} bytes of items"
        )
        return "\n".join(lines)


def resolve_device(device: torch.device | str | int) -> torch.device:
    """`device` with its index, so that "cuda" and "cuda:0" are one cache key."""
    return torch.empty(0, device=device).device


class DeviceTensors:
    """Tensors that never change, copied at most once to each device; safe from any thread."""

    def __init__(self, on_cpu: list[torch.Tensor]) -> None:
        self._lock = threading.Lock()
        self._on = {torch.device("cpu"): on_cpu}

    def on(self, device: torch.device | str | int) -> list[torch.Tensor]:
        """The tensors on `device`, in a new list."""
        key = resolve_device(device)
        with self._lock:
            if key not in self._on:
                self._on[key] = [tensor.to(key) for tensor in self._on[torch.device("cpu")]]
            return list(self._on[key])


class CatalogueTrie:
    """The part of a catalogue that stock changes leave alone: all tensors but leaf_available.

    codes int16 [N, L] and item_ids int64 [N] are C-contiguous and never change; codes_per_level is
    C_1..C_L.
    Raises ValueError for a code out of range.
    """

    def __init__(
        self,
        codes: npt.NDArray[np.int16],
        item_ids: npt.NDArray[np.int64],
        codes_per_level: tuple[int, ...],
    ) -> None:
        arrays = host_library().build_trie(codes, item_ids, None, list(codes_per_level))
        self.codes_per_level = codes_per_level
        order = arrays["leaf_order"]
        # Catalogue position -> leaf slot, int32 [N]: what a stock change needs.
        self.leaf_slot = np.empty_like(order)
        self.leaf_slot[order] = np.arange(len(order), dtype=np.int32)
        self.leaf_slot.setflags(write=False)

        names = [
            name
            for level in range(1, len(codes_per_level) + 1)
            for name in (f"child_begin_{level}", f"codes_{level}")
        ]
        self._arrays = [arrays[name] for name in [*names, "leaf_begin", "leaf_item_ids"]]
        self._tensors = DeviceTensors([torch.from_numpy(array) for array in self._arrays])
        self._statistics: CatalogueStatistics | None = None

    def tensors(self, device: torch.device | str | int) -> list[torch.Tensor]:
        """The trie tensors but the last, on `device`."""
        return self._tensors.on(device)

    def statistics(self) -> CatalogueStatistics:
        """Nodes and children of every level; computed once."""
        if self._statistics is None:  # two threads may both compute it, with one result
            self._statistics = self._compute_statistics()
        return self._statistics

    def _compute_statistics(self) -> CatalogueStatistics:
        levels = []
        for index, codes in enumerate(self.codes_per_level):
            children = np.diff(self._arrays[2 * index])
            levels.append(
                LevelStatistics(
                    level=index + 1,
                    codes=codes,
                    nodes=len(self._arrays[2 * index + 1]),
                    mean_children=float(children.mean()),
                    max_children=int(children.max()),
                    only_child_share=float((children == 1).mean()),
                )
            )
        leaf_begin, leaf_item_ids = self._arrays[-2:]
        items = np.diff(leaf_begin)
        return CatalogueStatistics(
            num_items=len(leaf_item_ids),
            levels=tuple(levels),
            max_items_per_leaf=int(items.max()),
            items_sharing_codes=int(items[items > 1].sum()),
            node_bytes=sum(array.nbytes for array in self._arrays[:-1]),
            item_bytes=leaf_item_ids.nbytes + len(leaf_item_ids),
        )
