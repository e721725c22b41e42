"""``sidmlp tokenize``: every tokenizer, every source of vectors, every mistake one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from item_blobs import backends

from sidmlp.cli import main
from sidmlp.cli.tokenize import add_arguments
from sidmlp.tokenizers import RqVaeOptions

ITEMS = 24
# k-means++ finds every one of a few distinct vectors; faiss starts from any items, equal ones too.
PLUS_PLUS = ["--backend", "torch"]
RQVAE = ["--latent", "4", "--hidden", "8", "--epochs", "2", "--lr", "0.01"]


@pytest.fixture
def where(tmp_path: Path) -> list[str]:
    """``--run`` of a directory with the histories of users who walk round a circle of items."""
    lines = ["user,item,timestamp,title"]
    for user in range(ITEMS):
        for step in range(7):
            item = (user + step) % ITEMS
            lines.append(f"u{user},{item * 10},{step},Film number {item} of colour {item % 4}")
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--run", str(tmp_path / "run")]
    assert main(["data", *arguments, "--table", str(tmp_path / "events.csv")]) == 0
    return arguments


def result(where: list[str]) -> tuple[np.ndarray, dict]:
    run = Path(where[1])
    return np.load(run / "codes.npy"), json.loads((run / "tokenize.json").read_text())


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["tokenize", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


class TestTokenizers:
    @pytest.mark.parametrize("name", ["rkmeans", "rqvae", "pq", "opq"])
    def test_each_gives_unique_ids_in_range(self, where, name):
        if name == "opq" and backends() == ["torch"]:
            pytest.skip("faiss is not installed")
        arguments = ["tokenize", *where, "--tokenizer", name, "--codes", "4,3", "--dim", "6"]
        assert main([*arguments, *RQVAE]) == 0
        codes, record = result(where)
        assert codes.shape == (ITEMS, 3)
        assert len(np.unique(codes, axis=0)) == ITEMS
        assert record["codes_per_level"] == [4, 3, int(codes[:, 2].max()) + 1]
        assert (codes.min(0) >= 0).all()
        assert (codes < record["codes_per_level"]).all()
        assert (record["tokenizer"], record["source"]) == (name, "co-occurrence")
        assert record["largest_collision"] == record["codes_per_level"][-1]
        assert record["used_codes"] == [len(np.unique(codes[:, level])) for level in (0, 1)]
        assert ("error" in record) == (name == "rqvae")
        assert main([*arguments, *RQVAE]) == 0
        assert np.array_equal(result(where)[0], codes)

    def test_duplicates_may_stay(self, where, capsys):
        arguments = ["tokenize", *where, "--codes", "2,2", "--dim", "4", "--duplicates", "report"]
        assert main(arguments) == 0
        codes, record = result(where)
        assert codes.shape == (ITEMS, 2)
        assert record["codes_per_level"] == [2, 2]
        assert record["colliding_items"] >= ITEMS - 4
        assert "share an id" in capsys.readouterr().out

    def test_a_full_number_of_levels_leaves_no_room_for_duplicates(self, where, capsys):
        eight = ["--codes", "2,2,2,2,2,2,2,2", "--dim", "4"]
        assert "expected 1..8 levels" in refused(capsys, *where, *eight)
        assert main(["tokenize", *where, *eight, "--duplicates", "report"]) == 0

    def test_defaults_are_the_library_s(self):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        options, library = parser.parse_args([]), RqVaeOptions()
        assert (options.latent, options.hidden) == (library.latent, library.hidden)
        assert (options.codebooks, options.decay) == (library.update, library.decay)
        assert (options.epochs, options.batch_size) == (library.epochs, library.batch_size)
        assert (options.lr, options.commitment) == (library.learning_rate, library.commitment)
        assert options.no_restart is not library.restart
        assert options.device == library.device


class TestSources:
    def test_titles_and_texts(self, where, tmp_path):
        assert main(["tokenize", *where, "--titles", "--codes", "4", "--dim", "8"]) == 0
        codes, record = result(where)
        assert record["source"] == "titles"
        lines = [json.dumps({"item_id": i * 10, "kind": f"colour {i % 4}"}) for i in range(ITEMS)]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines))
        texts = ["--texts", str(tmp_path / "texts.jsonl"), "--text-fields", "kind"]
        assert main(["tokenize", *where, *texts, "--codes", "4", "--dim", "8", *PLUS_PLUS]) == 0
        codes, record = result(where)
        assert record["source"] == "texts"
        with np.load(Path(where[1]) / "data" / "interactions.npz") as data:
            colours = data["item_ids"] // 10 % 4
        # Four texts and four codes: a code is a colour.
        assert len({(c, k) for c, k in zip(codes[:, 0], colours, strict=True)}) == 4

    def test_given_vectors(self, where, tmp_path):
        corners = np.eye(4, dtype=np.float32)[np.arange(ITEMS) % 4]
        np.savez(tmp_path / "v.npz", mine=corners, other=corners * 0)
        chosen = ["--vectors", str(tmp_path / "v.npz"), "--vectors-name", "mine"]
        assert main(["tokenize", *where, *chosen, "--codes", "4", *PLUS_PLUS]) == 0
        codes, record = result(where)
        assert record["source"] == "vectors"
        assert record["residual"] == [0.0]
        assert len(np.unique(codes[:4, 0])) == 4
        assert np.array_equal(codes[4:, 0], codes[:-4, 0])

    def test_given_codes_stay_unless_asked(self, where, tmp_path):
        given = np.stack([np.arange(ITEMS) // 4, np.arange(ITEMS) % 2], axis=1)
        np.save(tmp_path / "c.npy", given)
        arguments = ["tokenize", *where, "--given-codes", str(tmp_path / "c.npy")]
        assert main(arguments) == 0
        codes, record = result(where)
        assert np.array_equal(codes, given)
        assert record["colliding_items"] == ITEMS
        assert record["source"] == str(tmp_path / "c.npy")
        assert main([*arguments, "--duplicates", "level"]) == 0
        codes, record = result(where)
        assert np.array_equal(codes[:, :2], given)
        assert record["codes_per_level"] == [6, 2, 2]
        assert record["unique_ids"] == ITEMS


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--vectors-name", "x"], "--vectors-name belongs to --vectors"),
            (["--text-fields", "x"], "--text-fields belongs to --texts"),
            (["--given-name", "x"], "--given-name belongs to --given-codes"),
            (["--texts", "none.jsonl"], "none.jsonl does not exist"),
            (["--given-codes", "none.json"], "none.json does not exist"),
            (["--given-codes", "none.txt"], "expected one of .json, .npy"),
            (["--tokenizer", "opq", "--backend", "torch"], "needs faiss"),
            (["--tokenizer", "rqvae", "--lr", "-1"], "learning_rate: expected a positive"),
            (["--tokenizer", "rqvae", "--device", "abacus"], "device: expected one"),
        ],
    )
    def test_one_sentence(self, where, capsys, arguments, sentence):
        assert sentence in refused(capsys, *where, "--codes", "4,4", "--dim", "4", *arguments)

    @pytest.mark.parametrize(
        "arguments",
        [["opq", "--backend", "torch"], ["rqvae", "--decay", "1"], ["rqvae", "--commitment", "-1"]],
    )
    def test_settings_are_checked_before_vectors_are_made(
        self, where, capsys, monkeypatch, arguments
    ):
        import sidmlp.tokenizers

        def too_late(*_, **__):
            raise AssertionError("made vectors before the settings were checked")

        monkeypatch.setattr(sidmlp.tokenizers, "cooccurrence_vectors", too_late)
        refused(capsys, *where, "--tokenizer", *arguments)

    def test_texts_without_a_common_word_advise_what_there_is(self, where, tmp_path, capsys):
        lines = [json.dumps({"item_id": i * 10, "text": f"w{i}"}) for i in range(ITEMS)]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        error = refused(capsys, *where, "--texts", tmp_path / "t.jsonl")
        assert "no word is in 2 texts or more; use longer texts, or other item vectors" in error

    def test_two_sources_at_once(self, where, capsys):
        with pytest.raises(SystemExit):
            main(["tokenize", *where, "--titles", "--texts", "x.jsonl"])
        assert "not allowed with" in capsys.readouterr().err
