"""The catalogue: its trie against a dictionary, files and their damage, stock, versions, bad input.

Every comparison here is exact.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.known_items import KnownItems, checked_codes
from sidmlp_kernels.trie import host_library

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# What every error says: subject, what was expected, what came, and what to do about it.
SENTENCE = re.compile(r"\S.*: .*expected .+, got .+; .+|\S.*: .*expected .+; got .+; .+", re.DOTALL)


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


def stock_by_id(catalogue: Catalogue) -> dict[int, int]:
    """Item id -> availability, as the kernels see it."""
    *_, ids, available = catalogue.snapshot().trie_tensors("cpu")
    return dict(zip(ids.tolist(), available.tolist(), strict=True))


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, ...]], list[int]]:
    """Codes per level, codes with many collisions, distinct item ids."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 17, 256, 8192]), min_size=1, max_size=8))
    # Few codes of a level in use: shared prefixes and shared tuples abound.
    used = [draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=3)) for c in sizes]
    item = st.tuples(*(st.sampled_from(u) for u in used))
    codes = draw(st.lists(item, min_size=1, max_size=40))
    ids = draw(
        st.lists(
            st.one_of(st.integers(0, 60), st.integers(0, 2**63 - 1)),
            min_size=len(codes),
            max_size=len(codes),
            unique=True,
        )
    )
    return sizes, codes, ids


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


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.randoms(use_true_random=False))
def test_known_items_equal_dictionary(
    problem: tuple[list[int], list[tuple[int, ...]], list[int]], random: Any
):
    _, codes, ids = problem
    known = KnownItems(ids, codes)
    position = {item_id: at for at, item_id in enumerate(ids)}
    wanted = [*ids, -1, -(2**63), 0, 1, 61, 2**63 - 1]
    random.shuffle(wanted)
    np.testing.assert_array_equal(known.lookup(wanted), [position.get(i, -1) for i in wanted])

    half = len(ids) // 2
    if half:
        changed = [[0] * len(codes[0])] * half
        other = KnownItems(ids[:half], changed)
        merged = known.merged(other)
        assert sorted(merged.item_ids.tolist()) == sorted(ids)
        expected = dict(zip(ids, codes, strict=True)) | {i: tuple(changed[0]) for i in ids[:half]}
        rows = merged.codes[merged.lookup(ids)]
        np.testing.assert_array_equal(rows, [expected[i] for i in ids])


@pytest.mark.parametrize("stride", [1, 2, 1000])
def test_lookup_keeps_shape_and_finds_every_kind_of_id(stride: int):
    ids = np.arange(0, 50 * stride, stride)[::-1] if stride > 1 else np.arange(50)
    known = KnownItems(ids, np.zeros((50, 2), np.int64))
    found = known.lookup(torch.from_numpy(np.ascontiguousarray(ids)).reshape(5, 10))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.arange(50).reshape(5, 10))
    assert known.lookup(int(ids[7])) == 7
    assert known.lookup([]).shape == (0,)
    np.testing.assert_array_equal(known.lookup([-1, 50 * stride, 2**62]), [-1, -1, -1])


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


def test_threads_do_not_change_a_bit():
    build_trie = host_library().build_trie
    rng = np.random.default_rng(3)
    codes = rng.integers(0, [5, 8192, 2], (20_011, 3), dtype=np.int32)
    ids = rng.permutation(len(codes))
    stock = rng.integers(0, 2, len(codes), dtype=np.uint8)
    one = build_trie(codes, ids, stock, [5, 8192, 2], threads=1)
    np.testing.assert_array_equal(one["leaf_item_ids"], ids[one["leaf_order"]])
    np.testing.assert_array_equal(one["leaf_available"], stock[one["leaf_order"]])
    for other in (
        build_trie(codes, ids, stock, [5, 8192, 2], threads=5),
        build_trie(codes.astype(np.int16), ids, stock, [5, 8192, 2], threads=2),
        build_trie(codes[:3], ids[:3], None, [5, 8192, 2], threads=8),
    ):
        same = one if len(other["leaf_order"]) == len(codes) else None
        expected = same or build_trie(codes[:3], ids[:3], None, [5, 8192, 2], threads=1)
        assert other.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(other[name], expected[name], err_msg=name)


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


def test_known_items_of_a_catalogue():
    catalogue = Catalogue.from_codes(
        [[0, 1], [1, 0]], [10, 11], known_codes=[[3, 3], [1, 0], [2, 2]], known_item_ids=[9, 11, 12]
    )
    known = catalogue.snapshot().known
    assert catalogue.codes_per_level == (4, 4)
    assert known.item_ids.tolist() == [10, 11, 9, 12]
    assert known.codes.tolist() == [[0, 1], [1, 0], [3, 3], [2, 2]]
    assert catalogue.item_ids.tolist() == [10, 11]
    assert stock_by_id(catalogue) == {10: 1, 11: 1}
    assert catalogue.statistics().num_items == 2


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


@pytest.mark.parametrize(
    ("ids", "codes"),
    [
        ([0], [1, 2]),
        ([0], [[0] * 9]),
        ([0, 1], [[0]]),
        ([0], [[-1]]),
        ([0], [[1.0]]),
        ([-1], [[0]]),
    ],
)
def test_bad_known_items_are_a_value_error(ids: list, codes: list):
    with pytest.raises(ValueError, match=SENTENCE):
        KnownItems(ids, codes)


def test_codes_of_other_levels_are_a_value_error():
    with pytest.raises(ValueError, match=SENTENCE):
        checked_codes([[0, 1]], np.arange(1), [4, 4, 4])


def test_builder_rejects_bad_arrays():
    build_trie = host_library().build_trie
    codes, ids = np.zeros((4, 2), np.int16), np.arange(4)
    flags = np.ones(4, np.uint8)
    unaligned = np.frombuffer(bytearray(17), np.int16, 8, offset=1).reshape(4, 2)
    endless = np.broadcast_to(codes[:1], (2**31, 2))  # claims 2^31 items, owns one
    for bad_codes, bad_ids, bad_flags, sizes, match in [
        (codes.astype(np.int64), ids, flags, [1, 1], "int16 or int32"),
        (codes.astype(">i2"), ids, flags, [1, 1], "int16 or int32"),
        (codes[0], ids, flags, [1, 1], "items, levels"),
        (codes[:, ::-1], ids, flags, [1, 1], "C-contiguous"),
        (unaligned, ids, flags, [1, 1], "aligned"),
        (endless, ids, flags, [1, 1], "2147483648 items"),
        (codes[:0], ids[:0], flags[:0], [1, 1], "empty"),
        (np.zeros((1, 9), np.int16), ids[:1], None, [1] * 9, r"1\.\.8"),
        (codes, ids[:3], flags, [1, 1], r"item_ids: expected int64 \[4\]"),
        (codes, ids.astype(np.int32), flags, [1, 1], "item_ids"),
        (codes, ids, flags[:3], [1, 1], "available"),
        (codes, ids, flags.astype(bool), [1, 1], "available"),
        (codes, np.arange(8)[::2], flags, [1, 1], "contiguous"),
        (codes, ids, flags, [1], "codes_per_level"),
        (codes, ids, flags, [1, 0], "level 2 is 0"),
        (codes, ids, flags, [32768, 1], "level 1 is 32768"),
        (codes + np.int16(1), ids, flags, [2, 1], r"item 0 .*level 2.*0\.\.0, got 1"),
        (codes.astype(np.int32) - 70_000, ids, flags, [1, 1], "got -70000"),
    ]:
        with pytest.raises(ValueError, match=match):
            build_trie(bad_codes, bad_ids, bad_flags, sizes)
    with pytest.raises(ValueError, match="threads"):
        build_trie(codes, ids, flags, [1, 1], threads=-1)


def test_build_info():
    info = host_library().build_info()
    assert info.keys() == {"compiler", "flags", "version", "cuda", "instruction_sets"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert isinstance(info["cuda"], bool)


def test_set_available():
    catalogue = Catalogue.from_codes(
        [[1, 1], [0, 0], [1, 1], [0, 1]], [5, 6, 7, 8], available=[True, True, False, True]
    )
    assert stock_by_id(catalogue) == {5: 1, 6: 1, 7: 0, 8: 1}
    assert catalogue.available.tolist() == [True, True, False, True]
    old, version = catalogue.snapshot(), catalogue.version

    catalogue.set_available(5, False)
    assert stock_by_id(catalogue) == {5: 0, 6: 1, 7: 0, 8: 1}
    catalogue.set_available([7, 8], [True, False])
    catalogue.set_available(np.array([6]), np.array(False))
    assert stock_by_id(catalogue) == {5: 0, 6: 0, 7: 1, 8: 0}
    assert catalogue.available.tolist() == [False, False, True, False]
    assert catalogue.version > version
    assert old.version == version
    assert old.available.tolist() == [True, True, False, True]

    # Availability is the last tensor alone: the others are not even copied.
    before, after = old.trie_tensors("cpu"), catalogue.snapshot().trie_tensors("cpu")
    assert all(a is b for a, b in zip(before[:-1], after[:-1], strict=True))
    assert before[-1] is not after[-1]


def test_set_available_without_a_change_keeps_the_version():
    catalogue = Catalogue.from_codes([[0], [1]], [3, 4])
    snapshot = catalogue.snapshot()
    catalogue.set_available([3, 4], True)
    catalogue.set_available([], False)
    assert catalogue.snapshot() is snapshot


def test_bad_stock_changes_nothing():
    catalogue = Catalogue.from_codes([[0], [1]], [3, 4], known_codes=[[1]], known_item_ids=[9])
    snapshot = catalogue.snapshot()
    cases: list[tuple[Any, Any, str]] = [
        ([3, 5], False, "got 5"),
        (-1, False, "got -1"),
        (9, True, "got 9"),  # known to histories, never to be recommended
        ([3, 4], [True], "flag"),
        (3, [True, False], "flag"),
        ([[3, 4]], False, "flag"),
        ([3.0], False, "integers"),
        ([3, True], False, "booleans"),
        ([3], 0.5, "booleans"),
        ([3], 2, "booleans"),
        ([3], None, "booleans"),
    ]
    for ids, flags, match in cases:
        with pytest.raises(ValueError, match=match) as caught:
            catalogue.set_available(ids, flags)
        assert SENTENCE.fullmatch(str(caught.value))
    assert catalogue.snapshot() is snapshot


def test_stock_changes_from_threads_are_whole_and_never_lost():
    count = 400
    catalogue = Catalogue.from_codes([[i % 20, i // 20] for i in range(count)])
    stop = threading.Event()
    failures: list[str] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            snapshot = catalogue.snapshot()
            flags = snapshot.available
            if flags[0] == flags[1]:  # each change below flips both at once
                failures.append(f"torn: {flags[:2]}")
            if snapshot.version < last:
                failures.append(f"version {snapshot.version} after {last}")
            last = snapshot.version

    def flip() -> None:
        for step in range(200):
            catalogue.set_available([0, 1], [step % 2 == 0, step % 2 == 1])

    def sell_out(first: int) -> None:
        for item in range(first, count, 4):
            catalogue.set_available(item, False)

    catalogue.set_available([0, 1], [False, True])
    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=sell_out, args=(2 + i,)) for i in range(4)]
    writers.append(threading.Thread(target=flip))
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures, failures[:3]
    assert catalogue.available.tolist() == [False, True] + [False] * (count - 2)


def test_versions_are_unique_over_threads_and_catalogues():
    versions: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        for _ in range(50):
            catalogue = Catalogue.from_codes([[0]])
            mine.append(catalogue.version)
            catalogue.set_available(0, False)
            mine.append(catalogue.version)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in versions)
    assert len({v for mine in versions for v in mine}) == 400


def test_trie_tensors_are_cached_and_lists_are_not_shared():
    snapshot = Catalogue.from_codes([[0, 1], [1, 0]]).snapshot()
    first, second = snapshot.trie_tensors("meta"), snapshot.trie_tensors(torch.device("meta"))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(tensor.device.type == "meta" for tensor in first)
    first.clear()
    assert len(snapshot.trie_tensors("meta")) == 7


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    catalogue = Catalogue.from_codes(
        [[3, 0], [0, 1], [3, 0]],
        [70, 2**62, 3],
        [5, 300],
        available=[True, False, True],
        known_codes=[[4, 299]],
        known_item_ids=[8],
    )
    catalogue.save(tmp_path / "catalogue.safetensors")
    return tmp_path / "catalogue.safetensors"


def test_save_and_load(saved: Path):
    tensors = load_file(saved)
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        "codes": ("int32", (3, 2)),
        "item_ids": ("int64", (3,)),
        "available": ("uint8", (3,)),
        "known_codes": ("int32", (1, 2)),
        "known_item_ids": ("int64", (1,)),
    }
    for sizes in (None, [5, 300], (np.int64(5), 300)):
        catalogue = Catalogue.load(saved, sizes)
        assert catalogue.codes_per_level == (5, 300)
        assert catalogue.codes.tolist() == [[3, 0], [0, 1], [3, 0]]
        assert catalogue.item_ids.tolist() == [70, 2**62, 3]
        assert catalogue.available.tolist() == [True, False, True]
        assert catalogue.snapshot().known.item_ids.tolist() == [70, 2**62, 3, 8]
        assert catalogue.snapshot().known.codes[3].tolist() == [4, 299]
    again = saved.with_name("again.safetensors")
    catalogue.save(again)
    assert again.stat().st_size == saved.stat().st_size
    for name, tensor in load_file(again).items():  # safetensors orders its metadata at random
        assert np.array_equal(tensor, tensors[name]), name


def test_load_without_stated_sizes(saved: Path):
    save_file(load_file(saved), saved)  # no metadata
    assert Catalogue.load(saved).codes_per_level == (5, 300)
    assert Catalogue.load(saved, [9, 1000]).codes_per_level == (9, 1000)
    with pytest.raises(ValueError, match=r"known_codes.*item 8.*level 2"):
        Catalogue.load(saved, [9, 299])


def test_save_replaces_whole_files_or_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch):
    content = saved.read_bytes()
    catalogue = Catalogue.from_codes([[0]])

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            catalogue.save(saved)
    assert saved.read_bytes() == content
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    catalogue.save(str(saved))
    assert Catalogue.load(saved).num_items == 1
    plain = saved.with_name("plain")
    plain.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with pytest.raises(FileNotFoundError):
        catalogue.save(saved.parent / "none" / "catalogue.safetensors")


def test_load_of_no_file(tmp_path: Path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="catalogue file"):
            Catalogue.load(path)


def test_truncated_and_foreign_files(saved: Path):
    content = saved.read_bytes()
    for damaged in (content[:-1], content[:50], content[:7], b"", b"PK\x03\x04" * 100):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Catalogue.load(saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codes": None}, "expected the tensors"),
        ({"available": None}, "expected the tensors"),
        ({"known_codes": None}, "expected the tensors"),
        ({"weights": np.zeros(1, np.float32)}, "weights"),
        ({"codes": np.zeros((3, 2), np.int64)}, "codes: expected I32"),
        ({"codes": np.zeros(3, np.int32)}, "codes: expected I32 with 2"),
        ({"codes": np.zeros((2, 2), np.int32)}, "item_ids"),
        ({"codes": np.full((3, 2), 300, np.int32)}, "item 70 .*level 1"),
        ({"codes": np.full((3, 2), -1, np.int32)}, "got -1"),
        ({"codes": np.zeros((0, 2), np.int32)}, "empty"),
        ({"item_ids": np.zeros(3, np.int32)}, "item_ids: expected I64"),
        ({"item_ids": np.array([1, 2, 1])}, "id 1 at positions 0 and 2"),
        ({"item_ids": np.array([1, -2, 3])}, "got -2"),
        ({"available": np.ones(3, bool)}, "available: expected U8"),
        ({"available": np.array([0, 1, 2], np.uint8)}, "available"),
        ({"available": np.ones(4, np.uint8)}, "available"),
        ({"known_codes": np.zeros((1, 3), np.int32)}, "known_codes"),
        ({"known_item_ids": np.array([-8])}, "got -8"),
        ({"known_item_ids": np.array([70])}, "item 70"),
    ],
)
def test_altered_tensors(saved: Path, change: dict[str, np.ndarray | None], match: str):
    tensors: dict[str, Any] = {**load_file(saved), **change}
    with safe_open(saved, framework="numpy") as file:
        metadata = {"codes_per_level": file.metadata()["codes_per_level"]}  # and no checksum
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, saved, metadata=metadata)
    with pytest.raises(ValueError, match=match) as caught:
        Catalogue.load(saved)
    assert str(saved) in str(caught.value)
    assert SENTENCE.fullmatch(str(caught.value))


def test_every_damaged_byte_is_seen(saved: Path):
    def content() -> tuple[Any, ...]:
        found = Catalogue.load(saved)
        known = found.snapshot().known
        stock = found.available.tolist()
        return found.codes_per_level, stock, known.item_ids.tolist(), known.codes.tolist()

    whole, right = saved.read_bytes(), content()
    refused: list[str] = []
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert content() == right, f"byte {at}"
        except ValueError as error:
            refused.append(str(error))
    header = int.from_bytes(whole[:8], "little")
    assert len(refused) >= len(whole) - 8 - header  # every byte of the tensors
    assert all(SENTENCE.fullmatch(message) for message in refused)


def test_another_catalogue_in_a_saved_file(saved: Path):
    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    other = {**load_file(saved), "available": np.zeros(3, np.uint8)}
    save_file(other, saved, metadata=metadata)
    with pytest.raises(ValueError, match=r"expected sha256 .*damaged or altered"):
        Catalogue.load(saved)
    save_file(other, saved, metadata={"codes_per_level": metadata["codes_per_level"]})
    assert not Catalogue.load(saved).available.any()  # a file without a checksum is read too


def test_altered_sizes(saved: Path):
    with pytest.raises(ValueError, match="another model"):
        Catalogue.load(saved, [5, 301])
    for text in ("[5", "[5]", "[0, 300]", "7", '["a", "b"]', "[4, 300]"):
        save_file(load_file(saved), saved, metadata={"codes_per_level": text})
        with pytest.raises(ValueError, match=r"codes_per_level|out of range"):
            Catalogue.load(saved)


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
