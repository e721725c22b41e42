"""Item vectors of texts and files, and the truncated SVD below them."""

from __future__ import annotations

import gzip
import json
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidmlp.data import Interactions
from sidmlp.tokenizers import load_texts, load_vectors, text_vectors
from sidmlp.tokenizers.array_files import read_array
from sidmlp.tokenizers.svd import truncated_svd


class TestTruncatedSvd:
    @pytest.mark.parametrize("shape", [(60, 40), (40, 60), (12, 12)])
    def test_is_the_best_of_its_rank(self, shape):
        rng = np.random.default_rng(1)
        dense = torch.from_numpy(rng.normal(size=shape) * (rng.random(shape) < 0.3))
        u, s = truncated_svd(dense.to_sparse_coo(), 8, seed=0)
        exact = torch.linalg.svdvals(dense)[:8]
        assert torch.allclose(s, exact, rtol=0.02)
        assert torch.allclose(u.T @ u, torch.eye(8, dtype=torch.float64), atol=1e-9)
        left = (dense - u @ (u.T @ dense)).square().sum()
        best = dense.square().sum() - exact.square().sum()
        assert best * (1 - 1e-9) <= left <= best * 1.02

    def test_rank_is_at_most_the_matrix_s(self):
        u, s = truncated_svd(torch.eye(3, dtype=torch.float64).to_sparse_coo(), 9, seed=0)
        assert u.shape == (3, 3)
        assert torch.allclose(s, torch.ones(3, dtype=torch.float64))


def tfidf(texts: list[str]) -> np.ndarray:
    """The weights that `text_vectors` states, word by word."""
    bags = [text.lower().split() for text in texts]
    words = sorted({w for bag in bags for w in bag if sum(w in other for other in bags) > 1})
    rows = np.zeros((len(texts), len(words)))
    for row, bag in enumerate(bags):
        for column, word in enumerate(words):
            if word in bag:
                rarity = 1 + math.log((1 + len(texts)) / (1 + sum(word in b for b in bags)))
                rows[row, column] = (1 + math.log(bag.count(word))) * rarity
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


class TestTextVectors:
    TEXTS = ("red red lamp", "Red lamp desk", "oak desk", "oak chair desk", "unheard", "", "chair")

    def test_inner_products_are_tfidf_cosines(self):
        vectors = text_vectors(self.TEXTS, dim=5)  # 5 words, so nothing is cut off
        rows = tfidf(list(self.TEXTS))
        assert np.allclose(vectors @ vectors.T, rows @ rows.T, atol=1e-5)
        assert not vectors[4:6].any()

    def test_width_is_as_asked(self):
        assert text_vectors(self.TEXTS, dim=64).shape == (7, 64)
        assert not text_vectors(self.TEXTS, dim=64)[:, 5:].any()

    def test_a_subject_is_close_to_itself(self):
        rng = np.random.default_rng(2)
        subjects = [[f"w{s}x{n}" for n in range(12)] for s in range(2)]
        texts = [" ".join([*rng.choice(subjects[i % 2], 5), "the"]) for i in range(60)]
        vectors = text_vectors(texts, dim=4)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        near = unit @ unit.T
        assert near[::2, ::2].mean() > near[::2, 1::2].mean() + 0.3
        assert np.array_equal(vectors, text_vectors(texts, dim=4))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="all are empty"):
            text_vectors(["", ""])
        with pytest.raises(ValueError, match="no word is in 2 texts"):
            text_vectors(["one", "two"])


def shop(names: tuple[str, ...] | None = None) -> Interactions:
    ids = np.asarray([10, 20, 30])
    return Interactions(np.asarray([0, 1, 2]), np.asarray([0, 3]), ids, item_names=names)


class TestLoadTexts:
    LINES = (
        {"item_id": 20, "title": "Lamp", "tags": ["red", "desk"], "price": 3},
        {"item_id": 10, "title": "Chair"},
        {"item_id": 99, "title": "Elsewhere"},
    )

    def write(self, path, lines=LINES):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(text + "\n\n")
        return path

    @pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
    def test_joins_texts_in_the_order_of_the_data(self, tmp_path, name, caplog):
        path = self.write(tmp_path / name)
        with caplog.at_level(logging.INFO):
            assert load_texts(path, shop()) == ("Chair", "Lamp red desk ", "")
        assert "2 of 3 items have one, 1 lines are of other items" in caplog.text
        assert load_texts(path, shop(), ["tags"]) == ("", "red desk", "")

    def test_keys_of_the_data(self, tmp_path):
        lines = [{"item_id": "b", "title": "Bee"}, {"item_id": "a", "title": "Ape"}]
        path = self.write(tmp_path / "t.jsonl", lines)
        assert load_texts(path, shop(("a", "b", "c"))) == ("Ape", "Bee", "")

    @pytest.mark.parametrize(
        ("lines", "fields", "sentence"),
        [
            ([{"item_id": 10}, {"item_id": 10}], None, "line 2: item 10 occurs twice"),
            ([{"item_id": 1, "title": "x"}], None, "such as '10', got 1 lines of other items"),
            ([{"item_id": 10, "a": "x"}], ["b"], "no line has the field 'b'; the fields are a"),
            ([{"item_id": 10}, "{"], None, "not readable after line 1"),
            ([{"item_id": 10}, "[" * 100_000], None, "not readable after line 1"),
            (["[1]"], None, "an object with the key item_id"),
        ],
    )
    def test_bad_lines(self, tmp_path, lines, fields, sentence):
        with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
            load_texts(self.write(tmp_path / "t.jsonl", lines), shop(), fields)

    def test_bad_files(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            load_texts(tmp_path / "none.jsonl", shop())
        cut = self.write(tmp_path / "t.jsonl.gz")
        cut.write_bytes(cut.read_bytes()[:-12])
        with pytest.raises(ValueError, match=r"t\.jsonl\.gz is not readable"):
            load_texts(cut, shop())


class TestArrayFiles:
    ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)

    def test_every_kind_holds_the_same(self, tmp_path):
        np.save(tmp_path / "a.npy", self.ARRAY)
        np.savez(tmp_path / "a.npz", one=self.ARRAY)
        np.savez(tmp_path / "two.npz", one=self.ARRAY, other=self.ARRAY + 1)
        save_file({"one": torch.from_numpy(self.ARRAY)}, tmp_path / "a.safetensors")
        half = torch.from_numpy(self.ARRAY).bfloat16()  # small whole numbers are exact in it
        save_file({"one": half, "other": half + 1}, tmp_path / "two.safetensors")
        for name in ("a.npy", "a.npz", "a.safetensors"):
            assert np.array_equal(load_vectors(tmp_path / name, 3), self.ARRAY)
        for name in ("two.npz", "two.safetensors"):
            assert np.array_equal(load_vectors(tmp_path / name, 3, "other"), self.ARRAY + 1)
            with pytest.raises(ValueError, match="holds one, other; say which"):
                read_array(tmp_path / name)
            with pytest.raises(ValueError, match="no array 'third'; it holds one, other"):
                read_array(tmp_path / name, "third")
        with pytest.raises(ValueError, match="leave out the name 'one'"):
            read_array(tmp_path / "a.npy", "one")

    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
    def test_damaged_and_missing(self, tmp_path, suffix):
        path = tmp_path / f"a{suffix}"
        with pytest.raises(ValueError, match="does not exist"):
            read_array(path)
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=f"not a readable {suffix} file"):
            read_array(path)

    def test_objects_are_not_unpickled(self, tmp_path):
        np.save(tmp_path / "a.npy", np.asarray([{}], dtype=object), allow_pickle=True)
        np.savez(tmp_path / "a.npz", one=np.asarray([{}], dtype=object))
        for name in ("a.npy", "a.npz"):
            with pytest.raises(ValueError, match="not a readable"):
                read_array(tmp_path / name)

    def test_other_kinds(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected one of \.npy, .*got '\.txt'"):
            read_array(tmp_path / "a.txt")
