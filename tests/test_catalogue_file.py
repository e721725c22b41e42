"""Catalogue files: what is saved is loaded, and damage of any kind is seen."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue_cases import SENTENCE
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sidmlp_kernels.catalogue import Catalogue


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
