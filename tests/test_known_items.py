"""Items that histories may contain: look-ups and merges against a dictionary, wrong input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from catalogue_cases import SENTENCE, catalogues, stock_by_id
from hypothesis import given, settings
from hypothesis import strategies as st

from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.known_items import KnownItems, checked_codes


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
