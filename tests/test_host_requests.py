"""Lists to arrays and back in the host library, against Python; arrays that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidmlp_kernels.known_items import KnownItems
from sidmlp_kernels.trie import host_library

LONG = 2**63


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-LONG, LONG - 1), max_size=5) | st.tuples(), max_size=6))
def test_lists_of_ints(sequences: list[Any]) -> None:
    for outer in (sequences, tuple(sequences)):
        ids, lengths = host_library().flatten_lists(outer)
        assert ids.dtype == lengths.dtype == np.int64
        assert ids.tolist() == [number for row in sequences for number in row]
        assert lengths.tolist() == [len(row) for row in sequences]


class OwnList(list):
    """Its iteration may be its own."""


@pytest.mark.parametrize(
    "sequences",
    [
        None,
        5,
        "12",
        [1, 2],
        [[1, True]],
        [[1.0]],
        [[None]],
        [["1"]],
        [[[1]]],
        [[np.int64(1)]],
        [np.array([1])],
        [[1], None],
        [OwnList([1])],
        OwnList([[1]]),
        {1: 2},
        iter([[1]]),
        [[LONG]],
        [[-LONG - 1]],
    ],
)
def test_anything_else_is_left_to_python(sequences: Any) -> None:
    assert host_library().flatten_lists(sequences) is None


def test_none_may_be_empty() -> None:
    flatten = host_library().flatten_lists
    ids, lengths = flatten([None, [3, 4], None], none_is_empty=True)
    assert ids.tolist() == [3, 4]
    assert lengths.tolist() == [0, 2, 0]
    assert flatten([[None]], none_is_empty=True) is None
    assert flatten(None, none_is_empty=True) is None


KINDS = {
    "its own position": np.arange(700),
    "a table": np.random.default_rng(0).permutation(2000)[:700],
    "a search": np.random.default_rng(0).choice(10**15, 700, replace=False),
    "one item": np.array([12345]),
    "two items": np.array([99, 10**12]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_is_found_as_lookup_finds_it(kind: str) -> None:
    """One request for each id, and for its neighbours, which are unknown unless they are ids."""
    item_ids = KINDS[kind]
    codes = np.arange(len(item_ids))[:, None].astype(np.int16)
    known = KnownItems(item_ids, codes)
    extremes = [-LONG, LONG - 1, -1]
    for number in (*item_ids, *(item_ids + 1), *(item_ids - 1), *extremes):
        ids, mask = np.full((1, 4), -9), np.zeros((1, 4), bool)
        first = place(known, np.array([number]), [1], ids, mask)
        (position,) = known.lookup([number])
        assert first == (0 if position < 0 else -1), number
        if position >= 0:
            assert ids.tolist() == [[90, 10 + position, 91, 92]]
            assert mask.tolist() == [[True] * 3 + [False]]


def test_the_first_request_with_an_unknown_item() -> None:
    known = KnownItems([5, 6, 7], np.zeros((3, 1), np.int16))
    items, lengths = np.array([5] * 40 + [6, 8, 9]), [40, 0, 2, 1]
    ids, mask = np.zeros((4, 4), np.int64), np.zeros((4, 4), bool)
    assert place(known, items, lengths, ids, mask) == 2
    items[41] = 7
    assert place(known, items, lengths, ids, mask) == 3
    items[42] = 7
    items[3] = 4  # of a history's oldest, which do not count
    assert place(known, items, lengths, ids, mask) == 0


def place(known: KnownItems, items: Any, lengths: Any, ids: Any, mask: Any, **changes: Any) -> int:
    given: dict[str, Any] = {
        "items": items,
        "lengths": np.asarray(lengths, np.int64),
        "user_tokens": None,
        **dict(zip(("table", "sorted_ids", "order"), known.index, strict=True)),
        "codes": known.codes,
        "code_offsets": (10,),
        "user_offset": 90,
        "eos_id": 91,
        "pad_id": 92,
        "max_items": 2,
        "ids": ids,
        "mask": mask,
    }
    first: int = host_library().place_requests(**(given | changes))
    return first


def test_lists_are_placed_as_their_arrays_are() -> None:
    known = KnownItems([5, 6, 7], np.array([[1], [2], [3]]))
    arguments = (*known.index, known.codes, (10,), 90, 91, 92, 2)
    place_lists = host_library().place_lists
    histories: list[Any] = [[5, 6, 7], (), [6]]
    items, lengths = host_library().flatten_lists(histories)
    wanted, got = ((np.full((3, 5), -9), np.full((3, 5), turn, bool)) for turn in (False, True))
    assert place(known, items, lengths, *wanted) == -1
    assert place_lists(histories, *arguments, *got) is True
    for mine, right in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(mine, right)
    short = np.full((3, 3), -9), np.full((3, 3), False)
    for wrong in (
        histories[:2],
        [*histories, []],
        [*histories[:2], [8]],
        [*histories[:2], [True]],
        [*histories[:2], None],
        {0: [5]},
    ):
        assert place_lists(wrong, *arguments, *got) is False
    assert place_lists(histories, *arguments, *short) is False
    assert place_lists([[5], [], [6]], *arguments, *short) is True
    with pytest.raises(ValueError, match="ids and mask of one shape"):
        place_lists(histories, *arguments, got[0], short[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": np.array([1.0, 2.0])}, "items: expected a contiguous array of int64"),
        ({"items": np.arange(4)[::2]}, "items: expected a contiguous array"),
        ({"items": np.arange(3)}, "as many items as the lengths say"),
        ({"lengths": np.array([3, -1])}, "lengths >= 0"),
        ({"lengths": np.array([2])}, "a row for each of the lengths"),
        ({"user_tokens": np.array([1])}, "a row for each of the lengths"),
        ({"code_offsets": (1, 2)}, "one code offset per level"),
        ({"ids": np.zeros((2, 3), np.int64), "mask": np.zeros((2, 3), bool)}, "longest request"),
        ({"ids": np.zeros((2, 5), np.int64)}, "a row for each of the lengths"),
        ({"mask": np.zeros((2, 4), np.uint8)}, "mask: expected a contiguous array of bool"),
        ({"ids": np.zeros((2, 4), np.int32)}, "ids: expected a contiguous array of int64"),
        ({"sorted_ids": np.arange(3)}, "as many sorted ids and places as codes"),
    ],
)
def test_arrays_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    known = KnownItems([0, 1], np.zeros((2, 1), np.int16))
    ids, mask = np.zeros((2, 4), np.int64), np.zeros((2, 4), bool)
    assert place(known, np.array([0, 1]), [2, 0], ids, mask) == -1
    given: dict[str, Any] = {"items": np.array([0, 1]), "lengths": [2, 0], "ids": ids, "mask": mask}
    with pytest.raises(ValueError, match=message):
        place(known, **(given | changes))


def test_read_only_results_are_refused() -> None:
    known = KnownItems([0, 1], np.zeros((2, 1), np.int16))
    ids, mask = np.zeros((1, 4), np.int64), np.zeros((1, 4), bool)
    ids.setflags(write=False)
    with pytest.raises(ValueError, match="not writeable"):
        place(known, np.array([0]), [1], ids, mask)


def test_lists_of_items() -> None:
    lists = host_library().item_lists
    items = np.array([[5, LONG - 1, -1], [1, 2, 3], [-1, -1, -1]])
    assert lists(items, np.array([2, 3, 0], np.int32)) == [[5, LONG - 1], [1, 2, 3], []]
    assert lists(items, np.array([9, -4, 1], np.int32)) == [[5, LONG - 1, -1], [], [-1]]
    assert lists(items[:0], np.array([], np.int32)) == []
    with pytest.raises(ValueError, match="a count for each row"):
        lists(items, np.array([1], np.int32))
    with pytest.raises(ValueError, match="items: expected a contiguous array of int64"):
        lists(items.T, np.array([1, 1, 1], np.int32))
