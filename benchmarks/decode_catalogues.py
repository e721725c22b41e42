"""Catalogues for bench_decode: real ones where ../shared/data has them, seeded random ones beyond.

    real          amazon18_scientific 4.3k, amazon14_beauty 12.1k, cell_phones_sids 47.6k items
    beauty-like   random, but with as many nodes on every level as Beauty's, where its file is not
    uniform       uniformly random codes: hardly a prefix is shared below level 2 and nodes fan out
                  widest, so a decode has most to compute and the trie most to store

Real ones have 4 levels of 256 codes, and so have the others unless their caller wants others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import format_count

CODES_PER_LEVEL = (256, 256, 256, 256)
VARIANT = "rkmeans_zcr"
SEED = 0

# Folder -> distinct prefixes per level of its rkmeans_zcr codes; the last is the number of items.
REAL = {
    "amazon18_scientific": (256, 2006, 3135, 4344),
    "amazon14_beauty": (256, 4298, 8758, 12101),
    "cell_phones_sids": (256, 10241, 31323, 47593),
}
BEAUTY = "amazon14_beauty"


@dataclass(frozen=True, eq=False)
class ItemCodes:
    """A catalogue to decode against: codes int16 [N, L] and where they come from."""

    name: str
    origin: str
    codes: np.ndarray

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.codes)


def load_catalogue(name: str, data: Path) -> ItemCodes:
    """The real catalogue of folder `name` below `data`, or a random one with its nodes per level.

    The result's name and origin say which of the two it is.
    """
    path = data / name / "semantic_ids.npz"
    if not path.exists():
        codes = codes_with_nodes(REAL[name], CODES_PER_LEVEL, SEED)
        origin = f"synthetic, nodes per level {REAL[name]} as {name}, seed {SEED}"
        return ItemCodes(f"{name}-like", origin, codes)
    with np.load(path) as arrays:
        return ItemCodes(name, f"real, {VARIANT}", arrays[VARIANT])


def uniform_catalogue(
    num_items: int, codes_per_level: tuple[int, ...] = CODES_PER_LEVEL
) -> ItemCodes:
    """Uniformly random codes; a few items share theirs."""
    rng = np.random.default_rng(SEED)
    codes = rng.integers(0, codes_per_level, (num_items, len(codes_per_level)), dtype=np.int16)
    name = f"uniform-{format_count(num_items)}"
    if codes_per_level != CODES_PER_LEVEL:
        name += "-" + "x".join(map(str, codes_per_level))
    return ItemCodes(name, f"synthetic, uniformly random codes, seed {SEED}", codes)


def codes_with_nodes(
    nodes_per_level: tuple[int, ...], codes_per_level: tuple[int, ...], seed: int
) -> np.ndarray:
    """Random distinct codes int16 [n_L, L] whose trie has exactly n_l nodes on level l.

    Every node has a child; further children fall on random nodes. Raises ValueError where the
    counts are impossible.
    """
    rng = np.random.default_rng(seed)
    prefixes = np.zeros((1, 0), np.int16)
    for nodes, codes in zip(nodes_per_level, codes_per_level, strict=True):
        parents = len(prefixes)
        if not parents <= nodes <= parents * codes:
            raise ValueError(
                f"nodes_per_level: expected {parents}..{parents * codes} nodes below {parents} "
                f"nodes with {codes} codes, got {nodes}; pass counts of a trie"
            )
        first = np.arange(parents) * codes + rng.integers(0, codes, parents)
        others = np.delete(np.arange(parents * codes), first)
        more = rng.choice(others, nodes - parents, replace=False)
        children = np.sort(np.concatenate([first, more]))
        codes_of = (children % codes).astype(np.int16)[:, None]
        prefixes = np.concatenate([prefixes[children // codes], codes_of], axis=1)
    return prefixes
