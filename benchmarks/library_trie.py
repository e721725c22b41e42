"""The reference's trie of a large catalogue, from the arrays that the library's builder made.

Sorting tens of millions of rows a second time would take longer than all measurements on them. The
builder's arrays are verified in full by bench_catalogue; here the codes of some items are looked up
through the trie and compared with what went in. The reference's own algorithms walk it afterwards.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from sidmlp.trie import Trie
from sidmlp_kernels.catalogue import CatalogueSnapshot

SAMPLED = 100_000


class LargeTrie(Trie):
    """A trie that looks its leaves' codes up once."""

    def leaf_codes(self) -> Tensor:
        """As the base class."""
        return self._leaf_codes

    @functools.cached_property
    def _leaf_codes(self) -> Tensor:
        return super().leaf_codes().to(torch.int16)


def library_trie(snapshot: CatalogueSnapshot, codes: Tensor, item_ids: Tensor) -> Trie:
    """The trie of items codes [N, L], item_ids [N], taken from `snapshot`.

    Raises RuntimeError where a sampled item is not where its codes lead.
    """
    *levels, leaf_begin, leaf_ids, available = (t.long() for t in snapshot.trie_tensors("cpu"))
    begins, level_codes = levels[0::2], levels[1::2]
    order = torch.from_numpy(np.argsort(leaf_ids.numpy(), kind="stable"))
    stock = torch.cat([torch.zeros(1, dtype=torch.int64), available.cumsum(0)])
    trie = LargeTrie(
        codes_per_level=tuple(snapshot.codes_per_level),
        child_begin=tuple(begins),
        child_codes=tuple(level_codes),
        leaf_begin=leaf_begin,
        leaf_item_ids=leaf_ids,
        leaf_available=available.bool(),
        available_before=stock,
        sorted_item_ids=leaf_ids[order],
        sorted_positions=order,
        max_fanout=tuple(int(begin.diff().max()) for begin in begins),
        max_leaf_items=int(leaf_begin.diff().max()),
    )
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(0, len(codes), (min(SAMPLED, len(codes)),), generator=generator)
    positions = trie.positions(item_ids[sample])
    node = torch.searchsorted(trie.leaf_begin, positions, right=True) - 1
    found = (positions >= 0) & (leaf_ids[positions.clamp(min=0)] == item_ids[sample])
    for level in reversed(range(trie.num_levels)):
        found &= level_codes[level][node] == codes[sample, level]
        node = torch.searchsorted(begins[level], node, right=True) - 1
    if not bool(found.all()):
        raise RuntimeError(
            f"trie: expected every sampled item below its codes, got {int((~found).sum())} of "
            f"{len(sample)} elsewhere; the library's builder is wrong: run bench_catalogue.py"
        )
    return trie
