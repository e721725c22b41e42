"""The reference trie against plain sets of prefixes."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sidmlp.trie import Trie


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    row = st.tuples(*(st.integers(0, c - 1) for c in sizes))
    return sizes, draw(st.lists(row, min_size=1, max_size=50))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(catalogues(), st.integers(0, 99))
def test_trie_equals_sets_of_prefixes(
    catalogue: tuple[tuple[int, ...], list[tuple[int, ...]]], seed: int
) -> None:
    sizes, codes = catalogue
    random = np.random.default_rng(seed)
    ids = random.permutation(1000)[: len(codes)]
    stock = random.random(len(codes)) < 0.5
    trie = Trie.from_codes(np.array(codes), ids, stock, sizes)
    *levels, leaf_begin, leaf_ids, leaf_available = trie.tensors()
    for level in range(len(sizes)):
        begin, level_codes = levels[2 * level], levels[2 * level + 1]
        assert begin.dtype == torch.int32
        assert level_codes.dtype == torch.int16
        parents = sorted({c[:level] for c in codes})
        children = [sorted({c[level] for c in codes if c[:level] == p}) for p in parents]
        assert begin.tolist() == np.cumsum([0, *map(len, children)]).tolist()
        assert level_codes.tolist() == [code for siblings in children for code in siblings]
        assert trie.max_fanout[level] == max(map(len, children))
        assert trie.num_nodes(level) == len(level_codes)
    leaves = sorted(set(codes))
    rows = [[i for i, c in enumerate(codes) if c == leaf] for leaf in leaves]
    flat = [i for row in rows for i in row]
    assert leaf_begin.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert leaf_ids.tolist() == ids[flat].tolist()
    assert leaf_available.tolist() == stock[flat].astype(int).tolist()
    assert trie.max_leaf_items == max(map(len, rows))
    assert trie.leaf_codes().tolist() == [list(leaf) for leaf in leaves]
    assert trie.positions(leaf_ids).tolist() == list(range(len(codes)))
    assert trie.positions(torch.tensor([-1, 1000, 2**62])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((0, 3), dtype=int),), "codes: expected integers of shape"),
        ((np.zeros((3, 0), dtype=int),), "codes: expected integers of shape"),
        ((np.zeros(3, dtype=int),), "codes: expected integers of shape"),
        ((np.zeros((3, 2)),), "codes: expected integers of shape"),
        (([[0, -1]],), r"codes: expected 0\.\.0 at level 2, got -1 in row 0"),
        (([[0, 1], [0, 4]], None, None, (2, 4)), r"codes: expected 0\.\.3 at level 2, got 4"),
        (([[0, 1]], None, None, (2,)), "codes_per_level: expected 2 sizes"),
        (([[0, 1]], [1, 2]), "item_ids: expected 1 integers"),
        (([[0, 1]], [-1]), "item_ids: expected ids >= 0"),
        (([[0, 1], [1, 1]], [3, 3]), "item_ids: expected every id once, got 3"),
        (([[0, 1]], None, [True, False]), "available: expected 1 flags"),
    ],
)
def test_wrong_catalogues_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(*arguments)
