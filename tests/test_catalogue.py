"""The catalogue: its trie against a dictionary, whatever the input, and every input that is wrong.

Every comparison here is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalogue_cases import SENTENCE, catalogues
from hypothesis import given, settings

from sidmlp_kernels.catalogue import Catalogue

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def oracle(codes: list[tuple[int, ...]], item_ids: list[int]) -> list[np.ndarray]:
    """The trie tensors but leaf_available, from sets and dictionaries: slow and plain."""
    arrays = []
    parents: list[tuple[int, ...]] = [()]
    for length in range(1, len(codes[0]) + 1):
        nodes = sorted({item[:length] for item in codes})
        children = [sum(node[:-1] == parent for node in nodes) for parent in parents]
        arrays.append(np.cumsum([0, *children]).astype(np.int32))
        arrays.append(np.array([node[-1] for node in nodes], np.int16))
        parents = nodes
    items: dict[tuple[int, ...], list[int]] = {}
    for item, item_id in zip(codes, item_ids, strict=True):
        items.setdefault(item, []).append(item_id)
    arrays.append(np.cumsum([0, *(len(items[leaf]) for leaf in parents)]).astype(np.int32))
    arrays.append(np.array([i for leaf in parents for i in items[leaf]], np.int64))
    return arrays


def assert_trie(catalogue: Catalogue, expected: list[np.ndarray]) -> None:
    tensors = catalogue.snapshot().trie_tensors("cpu")
    assert len(tensors) == len(expected) + 1
    for index, (tensor, array) in enumerate(zip(tensors[:-1], expected, strict=True)):
        assert tensor.numpy().dtype == array.dtype, f"tensor {index}"
        np.testing.assert_array_equal(tensor.numpy(), array, err_msg=f"tensor {index}")


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_trie_equals_dictionary(problem: tuple[list[int], list[tuple[int, ...]], list[int]]):
    sizes, codes, ids = problem
    catalogue = Catalogue.from_codes(codes, ids, sizes)
    assert_trie(catalogue, oracle(codes, ids))
    assert catalogue.codes_per_level == tuple(sizes)
    assert (catalogue.num_items, catalogue.num_levels) == (len(codes), len(sizes))
    np.testing.assert_array_equal(catalogue.codes, codes)
    np.testing.assert_array_equal(catalogue.item_ids, ids)

    statistics = catalogue.statistics()
    parents = 1
    for index, level in enumerate(statistics.levels):
        prefixes = {item[: index + 1] for item in codes}
        fans = [len({p for p in prefixes if p[:-1] == q}) for q in {p[:-1] for p in prefixes}]
        assert (level.level, level.codes, level.nodes) == (index + 1, sizes[index], len(prefixes))
        assert level.mean_children == len(prefixes) / parents
        assert level.max_children == max(fans)
        assert level.only_child_share == fans.count(1) / len(fans)
        parents = len(prefixes)


def test_collisions_stay_in_catalogue_order():
    codes = [[1, 1], [0, 2], [1, 1], [0, 2], [1, 1], [0, 1]]
    catalogue = Catalogue.from_codes(codes, [50, 40, 30, 20, 10, 0])
    *_, leaf_begin, leaf_item_ids, _ = catalogue.snapshot().trie_tensors("cpu")
    assert leaf_begin.tolist() == [0, 1, 3, 6]
    assert leaf_item_ids.tolist() == [0, 40, 20, 50, 30, 10]
    statistics = catalogue.statistics()
    assert (statistics.max_items_per_leaf, statistics.items_sharing_codes) == (3, 5)


@pytest.mark.parametrize("levels", [1, 4, 8])
def test_one_item(levels: int):
    catalogue = Catalogue.from_codes([[8191] * levels], [2**63 - 1])
    assert catalogue.codes_per_level == (8192,) * levels
    assert_trie(catalogue, oracle([(8191,) * levels], [2**63 - 1]))


def test_bytes_per_node():
    codes = np.random.default_rng(0).integers(0, 256, (300_000, 4), dtype=np.int16)
    catalogue = Catalogue.from_codes(codes)
    statistics = catalogue.statistics()
    tensors = catalogue.snapshot().trie_tensors("cpu")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert statistics.node_bytes + statistics.item_bytes == total
    assert statistics.item_bytes == 9 * len(codes)
    assert statistics.bytes_per_node < 6.1


def test_same_catalogue_from_every_kind_of_input():
    codes = [[0, 3], [2, 1], [0, 1]]
    expected = oracle([tuple(row) for row in codes], [7, 8, 9])
    fortran = np.asfortranarray(np.array(codes, np.int64))
    padded = np.zeros((6, 4), np.uint8)
    padded[::2, ::2] = codes
    inputs: list[Any] = [
        codes,
        tuple(map(tuple, codes)),
        torch.tensor(codes),
        torch.tensor(codes).short(),
        np.array(codes, np.uint64),
        fortran,
        padded[::2, ::2],
    ]
    for given_codes in inputs:
        for ids in ([7, 8, 9], np.array([7, 8, 9], np.int16), torch.tensor([7, 8, 9])):
            assert_trie(Catalogue.from_codes(given_codes, ids), expected)
    defaults = Catalogue.from_codes(codes)
    assert defaults.item_ids.tolist() == [0, 1, 2]
    assert defaults.codes_per_level == (3, 4)
    assert defaults.available.tolist() == [True] * 3


def test_catalogue_keeps_its_own_copy():
    codes, ids = np.array([[0, 1], [1, 0]], np.int16), np.array([5, 6])
    catalogue = Catalogue.from_codes(codes, ids)
    codes[:], ids[:] = 1, 0
    assert catalogue.codes.tolist() == [[0, 1], [1, 0]]
    assert catalogue.item_ids.tolist() == [5, 6]
    for array in (catalogue.codes, catalogue.item_ids, catalogue.available):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


BAD_CATALOGUES: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("empty list", ([],), {}, "empty"),
    ("no rows", (np.zeros((0, 4), np.int64),), {}, "empty"),
    ("no levels", (np.zeros((2, 0), np.int64),), {}, r"1\.\.8 levels"),
    ("nine levels", ([[0] * 9],), {}, r"1\.\.8 levels"),
    ("one dimension", ([1, 2],), {}, r"\[items, levels\]"),
    ("ragged", ([[1, 2], [3]],), {}, "same length"),
    ("floats", ([[0.0, 1.0]],), {}, "float64"),
    ("booleans", ([[True, False]],), {}, "bool"),
    ("a boolean among integers", ([[0, 1], [5, True]],), {}, "codes: .*got booleans"),
    ("a flag array among rows", ([[0, 1], np.array([True, False])],), {}, "codes: .*got booleans"),
    ("a boolean among ids", ([[0], [0]], [True, 5]), {}, "item_ids: .*got booleans"),
    ("float tensor", (torch.zeros(2, 2),), {}, "float32"),
    ("strings", ([["a"]],), {}, "integers"),
    ("none", (None,), {}, "integers"),
    ("negative code", ([[0, 0], [0, -3]], [7, 9]), {}, "item 9 .*level 2.*got -3"),
    ("code too large", ([[0, 0], [4, 0]], [7, 9], [4, 1]), {}, r"item 9 .*level 1.*0\.\.3, got 4"),
    ("code above int16", ([[32767]],), {}, "got 32767"),
    ("code above int64", (np.array([[2**63]], np.uint64),), {}, str(2**63)),
    ("codebook too large", ([[0]], None, [32768]), {}, "32768"),
    ("codebook of none", ([[0]], None, [0]), {}, "codes_per_level"),
    ("sizes of other levels", ([[0, 0]], None, [1]), {}, "expected 2 sizes"),
    ("sizes a number", ([[0]], None, 4), {}, "codes_per_level"),
    ("duplicate ids", ([[0], [0], [0]], [4, 8, 4]), {}, "id 4 at positions 0 and 2"),
    ("duplicate sparse ids", ([[0]] * 3, [10**9, 5, 5]), {}, "id 5 at positions 1 and 2"),
    ("negative id", ([[0], [0]], [3, -1]), {}, "-1 at position 1"),
    ("float ids", ([[0]], [1.0]), {}, "float64"),
    ("id above int64", ([[0]], [2**63]), {}, str(2**63)),
    ("id above uint64", ([[0]], [2**64]), {}, "item_ids"),
    ("too few ids", ([[0], [0]], [1]), {}, r"shape \[2\]"),
    ("ids of two dimensions", ([[0]], [[1]]), {}, r"shape \[1\]"),
    ("flags not binary", ([[0]],), {"available": [2]}, r"values 2\.\.2"),
    ("flags of floats", ([[0]],), {"available": [1.0]}, "booleans"),
    ("too many flags", ([[0]],), {"available": [True, True]}, r"shape \[1\]"),
    ("known without ids", ([[0]],), {"known_codes": [[0]]}, "both or none"),
    ("known levels", ([[0]],), {"known_codes": [[0, 0]], "known_item_ids": [3]}, "known_codes"),
    ("known out of range", ([[0]], None, [1]), {"known_codes": [[1]], "known_item_ids": [3]},
     "known_codes.*item 3"),
    ("known twice", ([[0]],), {"known_codes": [[0], [0]], "known_item_ids": [3, 3]},
     "known_item_ids.*id 3"),
    ("known otherwise", ([[0]], [5]), {"known_codes": [[1]], "known_item_ids": [5]}, "item 5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [case[1:] for case in BAD_CATALOGUES],
    ids=[case[0] for case in BAD_CATALOGUES],
)
def test_bad_catalogue_is_a_value_error(args: tuple, kwargs: dict, match: str):
    with pytest.raises(ValueError, match=match) as caught:
        Catalogue.from_codes(*args, **kwargs)
    assert SENTENCE.fullmatch(str(caught.value))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real catalogues of ../shared/data are not here")
@pytest.mark.parametrize("folder", ["amazon18_scientific", "amazon14_beauty", "cell_phones_sids"])
def test_real_catalogues(folder: str):
    stats = json.loads((DATA / folder / "stats.json").read_text())["semantic_ids"]
    with np.load(DATA / folder / "semantic_ids.npz") as variants:
        assert set(variants.files) == set(stats)
        for name in variants.files:
            codes, expected = variants[name], stats[name]
            catalogue = Catalogue.from_codes(codes)
            statistics = catalogue.statistics()
            assert [s.nodes for s in statistics.levels] == [
                level["prefixes"] for level in expected["per_level"]
            ], name
            for ours, level in zip(statistics.levels, expected["per_level"], strict=True):
                assert ours.max_children == level["children_max"], name
                assert round(ours.mean_children, 3) == level["children_mean"], name
            assert statistics.max_items_per_leaf == expected["largest_group"], name
            assert statistics.items_sharing_codes == expected["items_sharing_an_id"], name

            tensors = [tensor.numpy() for tensor in catalogue.snapshot().trie_tensors("cpu")]
            order = np.lexsort(codes.T[::-1])  # stable, first level first
            np.testing.assert_array_equal(tensors[-2], order, err_msg=name)
            counts = np.unique(codes, axis=0, return_counts=True)[1]
            np.testing.assert_array_equal(np.diff(tensors[-3]), counts, err_msg=name)
            assert statistics.bytes_per_node < 6.1, name
