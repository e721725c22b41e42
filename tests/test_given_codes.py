"""Semantic IDs made elsewhere, in every form that is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidmlp.data import Interactions
from sidmlp.tokenizers import load_codes

CODES = np.asarray([[0, 5], [7, 1], [0, 5]])


def shop(names: tuple[str, ...] | None = None) -> Interactions:
    ids = np.asarray([10, 20, 30])
    return Interactions(np.asarray([0, 1, 2]), np.asarray([0, 3]), ids, item_names=names)


def by_item(keys: tuple) -> dict[str, list[int]]:
    return {str(key): row for key, row in zip(keys, CODES.tolist(), strict=True)}


class TestForms:
    def test_arrays(self, tmp_path):
        np.save(tmp_path / "c.npy", CODES.astype(np.int16))
        np.savez(tmp_path / "c.npz", mine=CODES, other=CODES + 1)
        save_file({"mine": torch.from_numpy(CODES)}, tmp_path / "c.safetensors")
        for found in (
            load_codes(tmp_path / "c.npy", shop()),
            load_codes(tmp_path / "c.npz", shop(), "mine"),
            load_codes(tmp_path / "c.safetensors", shop()),
        ):
            assert found.dtype == np.int64
            assert np.array_equal(found, CODES)

    @pytest.mark.parametrize("names", [None, ("a", "b", "c")])
    def test_json_of_item_to_codes(self, tmp_path, names):
        entries = by_item(names or (10, 20, 30))
        entries = dict(reversed(entries.items())) | {"stranger": [1]}
        (tmp_path / "c.json").write_text(json.dumps(entries))
        assert np.array_equal(load_codes(tmp_path / "c.json", shop(names)), CODES)


class TestMistakes:
    @pytest.mark.parametrize(
        ("codes", "sentence"),
        [
            (CODES[:2], r"one row of codes per item, \[3, levels\], got shape \(2, 2\)"),
            (CODES[:, :0], "one row of codes per item"),
            (CODES.astype(np.float32), "expected whole numbers, got float32"),
            (CODES + 32_766, r"item '10' has the codes .*expected codes up to 32766"),
            (CODES - 1, r"item '10' has the codes \[-1, 4\].*subtract the vocabulary offset"),
        ],
    )
    def test_arrays(self, tmp_path, codes, sentence):
        np.save(tmp_path / "c.npy", codes)
        with pytest.raises(ValueError, match=sentence):
            load_codes(tmp_path / "c.npy", shop())

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"20": None}, "item '20' has no codes"),
            ({"20": [1]}, "item '20' has 1 codes, '10' has 2"),
            ({"20": [1, 2.0]}, r"item '20': expected a list of codes, got \[1, 2.0\]"),
            ({"20": [1, True]}, "item '20': expected a list of codes"),
            ({"20": "1 2"}, "item '20': expected a list of codes, got '1 2'"),
            ({"20": [1, -2]}, "item '20' has the codes"),
            ({"20": [1, 2**70]}, "too large"),
        ],
    )
    def test_json(self, tmp_path, change, sentence):
        (tmp_path / "c.json").write_text(json.dumps(by_item((10, 20, 30)) | change))
        with pytest.raises(ValueError, match=sentence):
            load_codes(tmp_path / "c.json", shop())

    def test_json_of_something_else(self, tmp_path):
        path = tmp_path / "c.json"
        path.write_text(json.dumps(CODES.tolist()))
        with pytest.raises(ValueError, match="an object of item to codes, got list"):
            load_codes(path, shop())
        with pytest.raises(ValueError, match="leave out the name 'mine'"):
            load_codes(path, shop(), "mine")
        with pytest.raises(ValueError, match="does not exist"):
            load_codes(tmp_path / "none.json", shop())
