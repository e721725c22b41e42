"""Amazon's ratings without a header: which column is the user is decided by the ids, or asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidmlp.cli import main
from sidmlp.data import Interactions, load_amazon

USERS = ("A2SUAM1J3GNN3B", "AO94DHGC771SJ", "#oc-R115TNMSPFT9I7", "A0148968UM59JS3Y8D1M")
PRODUCTS = ("B00005N7P0", "0528881469", "B0000A1G05", "080442957X")
PAIRS = [(user, PRODUCTS[(u + s) % 4]) for u, user in enumerate(USERS) for s in range(4)]


def ratings(path: Path, order: str, pairs=PAIRS) -> Path:
    rows = [pair if order == "user,item" else pair[::-1] for pair in pairs]
    lines = [f"{first},{second},5.0,{time}\n" for time, (first, second) in enumerate(rows)]
    path.write_text("".join(lines))
    return path


def sequences(data: Interactions) -> list[list[str]]:
    return [[data.key(i) for i in data.sequence(u)] for u in range(data.num_users)]


WANTED = [[item for user, item in PAIRS if user == name] for name in USERS]


@pytest.mark.parametrize("release", [2014, 2023])
@pytest.mark.parametrize("order", ["user,item", "item,user"])
def test_the_ids_tell(tmp_path, order, release) -> None:
    path = ratings(tmp_path / "Beauty.csv", order)
    assert sequences(load_amazon(path, release, min_count=1)) == WANTED


@pytest.mark.parametrize("order", ["user,item", "item,user"])
def test_lines_before_the_one_that_tells_are_kept(tmp_path, order) -> None:
    odd = [("somebody", "B00005N7P0"), ("A2SUAM1J3GNN3B", "thing"), *PAIRS]
    data = load_amazon(ratings(tmp_path / "a.csv", order, odd), 2014, min_count=1)
    assert sequences(data)[0] == ["B00005N7P0"]
    assert data.items.size == len(odd)


def test_ids_that_do_not_tell_must_be_explained(tmp_path) -> None:
    # Ten digits are a book to Amazon and a user to others: one column alone tells nothing.
    pairs = [("1234567890", "item1"), ("1234567891", "item2"), ("1234567890", "item2")]
    path = ratings(tmp_path / "a.csv", "user,item", pairs)
    with pytest.raises(ValueError, match=r"'1234567890' and 'item1'; say it with --columns user,i"):
        load_amazon(path, 2014, min_count=1)
    data = load_amazon(path, 2014, min_count=1, columns="user,item")
    assert sequences(data) == [["item1", "item2"], ["item2"]]
    data = load_amazon(path, 2014, min_count=1, columns="item,user")
    assert data.item_names == ("1234567890", "1234567891")


def test_a_line_the_other_way_round(tmp_path) -> None:
    path = ratings(tmp_path / "a.csv", "user,item")
    path.write_text(path.read_text() + "B00005N7P0,AO94DHGC771SJ,5.0,99\n")
    with pytest.raises(ValueError, match=r"line 17: expected user,item as in line 1, got 'B00005N"):
        load_amazon(path, 2014, min_count=1)
    assert load_amazon(path, 2014, min_count=1, columns="user,item").num_users == 5


def test_columns_where_they_are_known(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,parent_asin,rating,timestamp\nu,i,5.0,1\n")
    with pytest.raises(ValueError, match=r"has a header, .* leave --columns out"):
        load_amazon(path, 2023, columns="user,item")
    with pytest.raises(ValueError, match="expected user,item or item,user, got 'item'"):
        load_amazon(path, 2023, columns="item")
    (tmp_path / "a.json").write_text("{}\n")
    with pytest.raises(ValueError, match="has no columns"):
        load_amazon(tmp_path / "a.json", 2014, columns="user,item")


def test_the_command(tmp_path, capsys) -> None:
    pairs = [(f"u{u}", f"i{(u + s) % 6}") for u in range(6) for s in range(5)]
    path = ratings(tmp_path / "a.csv", "item,user", pairs)
    arguments = ["data", "--run", str(tmp_path / "run"), "--amazon2014", str(path)]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "say it with --columns user,item or --columns item,user" in err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--columns", "item,user"]) == 0
    loaded = Interactions.load(tmp_path / "run" / "data")
    assert loaded.item_names is not None
    assert set(loaded.item_names) == {f"i{i}" for i in range(6)}
