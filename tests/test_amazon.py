"""Amazon Reviews 2023 and 2014, read from small files of the published form."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from sidmlp.cli import main
from sidmlp.data import Interactions, leave_last_out, load_amazon, load_arrays
from sidmlp.data.core import first_of_each_pair, k_core

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# (user, product, time): three users and three products of three events each, a user u4 with one
# event, a product "B00Z" with one, and an earlier repetition of (u1, 0001B) further down.
EVENTS = [
    ("u1", "B00A", 300),
    ("u1", "0001B", 200),
    ("u1", "B00C", 250),
    ("u2", "B00C", 10),
    ("u2", "B00A", 20),
    ("u2", "0001B", 20),
    ("u2", "B00Z", 30),
    ("u3", "0001B", 7),
    ("u3", "B00A", 5),
    ("u3", "B00C", 6),
    ("u4", "B00A", 1),
    ("u1", "0001B", 100),
]
SEQUENCES = {"u1": ["0001B", "B00C", "B00A"], "u2": ["B00C", "B00A", "0001B"]}
SEQUENCES["u3"] = ["B00A", "B00C", "0001B"]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def ratings_2023(path: Path, events=EVENTS) -> Path:
    rows = [f"{user},{item},5.0,{time}" for user, item, time in events]
    return write(path, "\n".join(["user_id,parent_asin,rating,timestamp", *rows]) + "\n")


def reviews_2023(path: Path, events=EVENTS) -> Path:
    rows = [
        {
            "rating": 5.0,
            "title": "Just \u2028 great",
            "text": "line\nbreak",
            "images": [],
            "asin": f"{item}-variant",
            "parent_asin": item,
            "user_id": user,
            "timestamp": time,
            "helpful_vote": 0,
            "verified_purchase": True,
        }
        for user, item, time in events
    ]
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def ratings_2014(path: Path, events=EVENTS) -> Path:
    return write(path, "".join(f"{user},{item},4.0,{time}\n" for user, item, time in events))


def reviews_2014(path: Path, events=EVENTS) -> Path:
    rows = [
        {
            "reviewerID": user,
            "asin": item,
            "reviewerName": "A",
            "helpful": [0, 0],
            "reviewText": "Good.",
            "overall": 5.0,
            "summary": "Good",
            "unixReviewTime": time,
            "reviewTime": "01 1, 2014",
        }
        for user, item, time in events
    ]
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


FORMS = [
    (2023, ratings_2023, "Video_Games.csv"),
    (2023, ratings_2023, "Video_Games.csv.gz"),
    (2023, reviews_2023, "Video_Games.jsonl"),
    (2023, reviews_2023, "Video_Games.jsonl.gz"),
    (2014, ratings_2014, "ratings_Beauty.csv"),
    (2014, reviews_2014, "reviews_Beauty_5.json.gz"),
    (2014, reviews_2014, "reviews_Beauty.json"),
]


def named(data: Interactions) -> list[list[str]]:
    assert data.item_names is not None
    return [[data.item_names[i] for i in data.sequence(u)] for u in range(data.num_users)]


USER_FIRST = {"columns": "user,item"}  # short ids do not tell


@pytest.mark.parametrize(("release", "make", "name"), FORMS)
def test_every_published_form_gives_the_same_sequences(tmp_path, release, make, name) -> None:
    columns = USER_FIRST if make is ratings_2014 else {}
    data = load_amazon(make(tmp_path / name), release, min_count=3, **columns)
    assert named(data) == list(SEQUENCES.values())
    assert data.item_ids.tolist() == [0, 1, 2]
    assert data.titles is None


def test_the_last_two_of_every_user_are_held_out(tmp_path) -> None:
    split = leave_last_out(load_amazon(ratings_2023(tmp_path / "a.csv"), 2023, min_count=3))
    names = ("B00A", "B00C", "0001B")  # by first appearance among what is kept
    assert [names[i] for i in split.test.target_items()] == ["B00A", "0001B", "0001B"]
    assert [names[i] for i in split.validation.target_items()] == ["B00C", "B00A", "B00C"]


def test_a_limit_of_one_keeps_everything_but_repetitions(tmp_path) -> None:
    data = load_amazon(ratings_2014(tmp_path / "a.csv"), 2014, min_count=1, **USER_FIRST)
    assert (data.num_users, data.num_items, data.items.size) == (4, 4, 11)
    assert named(data)[0] == SEQUENCES["u1"]


def test_the_default_is_the_5_core(tmp_path) -> None:
    products = [f"{10 + i}" for i in range(5)]  # digits alone, which stay names
    block = [(f"u{u}", item, u) for u in range(5) for item in products]
    data = load_amazon(ratings_2023(tmp_path / "a.csv", [*EVENTS, *block]), 2023)
    assert data.item_names == tuple(products)
    assert data.num_users == 5


def brute_force_core(pairs: list[tuple[int, int]], k: int) -> set[tuple[int, int]]:
    """Union of all (user, item) subsets in which everything occurs k times: the k-core."""
    best: set[tuple[int, int]] = set()
    for size in range(len(pairs) + 1):
        for subset in itertools.combinations(pairs, size):
            users, items = zip(*subset, strict=True) if subset else ((), ())
            if all(users.count(u) >= k and items.count(i) >= k for u, i in subset):
                best |= set(subset)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_core_is_the_largest_set(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = sorted({(int(u), int(i)) for u, i in rng.integers(0, 4, size=(12, 2))})
    users, items = np.asarray(pairs).T
    keep = k_core(users, items, k)
    assert {pair for pair, kept in zip(pairs, keep, strict=True) if kept} == brute_force_core(
        pairs, k
    )


def test_k_core_of_nothing_and_of_a_bad_k() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert k_core(none, none, 5).size == 0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        k_core(none, none, 0)


def test_the_first_of_equally_early_events_is_kept() -> None:
    users, items = np.asarray([1, 0, 1, 1, 0]), np.asarray([2, 2, 2, 2, 2])
    keep = first_of_each_pair(users, items, np.asarray([5.0, 9.0, 3.0, 3.0, 9.0]))
    assert keep.tolist() == [False, True, True, False, False]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the repository")
def test_a_real_5_core_is_left_as_it_is(tmp_path) -> None:
    real = load_arrays(SHARED / "amazon14_beauty")
    events = [
        (f"A{user:012}", f"B{item:09}", time)
        for user in range(real.num_users)
        for time, item in enumerate(real.sequence(user).tolist())
    ]
    data = load_amazon(ratings_2014(tmp_path / "ratings_Beauty.csv.gz", events), 2014)
    assert data.item_names is not None
    keys = np.asarray([int(name[1:]) for name in data.item_names])
    assert np.array_equal(keys[data.items], real.items)
    assert np.array_equal(data.offsets, real.offsets)


HEADER = "user_id,parent_asin,rating,timestamp\n"
GOOD = '{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", GOOD + "\n" + GOOD + '{"user_id": \n', "a.jsonl, line 4 is not JSON"),
        ("a.jsonl", GOOD + "[1]\n", "line 2 must be an object"),
        ("a.jsonl", GOOD + "{'user_id': 'u'}\n", "line 2 is not JSON"),
        (
            "a.jsonl",
            '{"user_id": "u", "asin": "i", "timestamp": 1}\n',
            "line 1.*parent_asin is mis",
        ),
        ("a.jsonl", '{"user_id": "u", "parent_asin": "i"}\n', "timestamp is missing"),
        ("a.jsonl", GOOD.replace('"u"', "7"), "line 1: user_id must be a text"),
        ("a.jsonl", GOOD.replace('"i"', '""'), "line 1: parent_asin must be a text"),
        ("a.jsonl", GOOD.replace("1}", "NaN}"), "line 1: timestamp must be a finite number"),
        ("a.jsonl", GOOD.replace("1}", "true}"), "timestamp must be a finite number, got True"),
        ("a.jsonl", GOOD.replace("1}", "1" * 400 + "}"), "timestamp must be a finite number"),
        ("a.jsonl", "", "holds no review"),
        (
            "a.csv",
            HEADER + "u,i,5.0,soon\n",
            "line 2: timestamp must be a finite number, got 'soon'",
        ),
        ("a.csv", HEADER + "u,i,5.0,1\nu,i\n", "line 3: expected 4 columns"),
        ("a.csv", HEADER + "u,,5.0,1\n", "line 2: parent_asin must be a text"),
        ("a.csv", "user_id,asin,rating,timestamp\nu,i,1,1\n", "parent_asin is missing"),
        ("a.csv", "UserId,ProductId,Rating,Timestamp\n", "line 1: expected the header user_id,"),
        ("a.csv", HEADER.replace("\n", ",history\n"), "part of a finished split"),
        ("a.csv", HEADER + "u,i,5.0,1\n", "no review left .* fewer than 5"),
        ("a.csv", HEADER, "holds no review"),
        ("a.parquet", "", "must end in .csv, .json or .jsonl"),
        ("a.csv.gz", HEADER, "damaged or no gzip file"),
    ],
)
def test_bad_files_are_explained(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_amazon(tmp_path / name, 2023)


def test_a_gzip_file_that_was_cut_off(tmp_path) -> None:
    rng = np.random.default_rng(0)  # random keys pack badly, so that lines come before the cut
    events = [(f"u{rng.integers(10**9)}", f"i{rng.integers(10**9)}", t) for t in range(5000)]
    path = reviews_2014(tmp_path / "reviews.json.gz", events)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"reviews\.json\.gz ends in the middle .* line [1-9]\d+"):
        load_amazon(path, 2014)


def test_a_gzip_file_with_a_wrong_checksum(tmp_path) -> None:
    path = ratings_2014(tmp_path / "ratings.csv.gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ratings\.csv\.gz is damaged or no gzip file"):
        load_amazon(path, 2014)


def test_missing_files_directories_and_bytes(tmp_path) -> None:
    good = ratings_2023(tmp_path / "a.csv")
    for name in ("none.csv", "none.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            load_amazon(tmp_path / name, 2023)
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        load_amazon(good, 2023, meta=tmp_path / "none.jsonl", min_count=3)
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        load_amazon(tmp_path / "d.csv", 2023)
    (tmp_path / "b.csv").write_bytes(b"u,i,1,1\nu,\xff,1,1\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_amazon(tmp_path / "b.csv", 2023)
    with pytest.raises(ValueError, match="expected 2023 or 2014, got 2018"):
        load_amazon(good, 2018)


class TestCommand:
    def test_fills_a_run(self, tmp_path, capsys) -> None:
        events = [
            (f"A{u:012}", f"B{(u + step) % 7:09}", step) for u in range(8) for step in range(6)
        ]
        source = ratings_2014(tmp_path / "ratings_a.csv", events)
        where = ["--run", str(tmp_path / "run")]
        assert main(["data", *where, "--amazon2014", str(source)]) == 0
        assert "8 users, 7 items, 48 interactions" in capsys.readouterr().out
        loaded = Interactions.load(tmp_path / "run" / "data")
        assert loaded.item_names == tuple(f"B{i:09}" for i in range(7))
        assert main(["data", *where, "--amazon2014", str(source), "--min-count", "7"]) == 2
        assert "fewer than 7" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "option", [["--meta", "m.json"], ["--min-count", "3"], ["--columns", "user,item"]]
    )
    def test_options_of_another_source(self, option, tmp_path, capsys) -> None:
        arguments = ["data", "--run", str(tmp_path), "--arrays", str(tmp_path), *option]
        assert main(arguments) == 2
        assert "belong to --amazon2023" in capsys.readouterr().err

    def test_a_mistake_is_one_sentence(self, tmp_path, capsys) -> None:
        arguments = ["data", "--run", str(tmp_path), "--amazon2023", str(tmp_path / "none.csv")]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "none.csv does not exist" in err
