"""Amazon's product files: texts of every release, and what becomes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from test_amazon import ratings_2014, ratings_2023, reviews_2014, write

from sidmlp.cli import main
from sidmlp.data import Interactions, load_amazon
from sidmlp.tokenizers import load_texts


class TestTitles:
    def test_2023_from_json_lines(self, tmp_path) -> None:
        rows = [
            {"main_category": "Games", "title": "A  Game\n", "parent_asin": "B00A", "price": None},
            {"main_category": "Games", "title": None, "parent_asin": "B00C"},
            {"main_category": "Games", "title": "Other", "parent_asin": "B00Y"},
        ]
        meta = write(tmp_path / "meta_a.jsonl.gz", "\n".join(map(json.dumps, rows)))
        data = load_amazon(ratings_2023(tmp_path / "a.csv"), 2023, meta=meta, min_count=3)
        assert [data.title(i) for i in range(3)] == ["A Game", "B00C", "0001B"]

    def test_2014_from_python_literals(self, tmp_path) -> None:
        rows = [
            {"asin": "0001B", "title": 'It\'s "soap"', "related": {"also_bought": ["B00A"]}},
            {"asin": "B00A", "categories": [["Beauty"]], "price": 1.5},
        ]
        meta = write(tmp_path / "meta_a.json.gz", "".join(f"{row!r}\n" for row in rows))
        data = load_amazon(reviews_2014(tmp_path / "a.json"), 2014, meta=meta, min_count=3)
        assert [data.title(i) for i in range(3)] == ["B00A", "B00C", 'It\'s "soap"']

    def test_calls_and_names_are_no_literals(self, tmp_path) -> None:
        meta = write(tmp_path / "m.json", "{'asin': 'B00A'}\n{'asin': open('x')}\n")
        with pytest.raises(ValueError, match=r"m\.json, line 2 is not JSON"):
            load_amazon(reviews_2014(tmp_path / "a.json"), 2014, meta=meta, min_count=3)

    def test_the_file_of_another_release(self, tmp_path) -> None:
        meta = write(tmp_path / "m.json", '{"asin": "B00A", "title": "x"}\n')
        with pytest.raises(ValueError, match="line 1: expected a product with parent_asin"):
            load_amazon(ratings_2023(tmp_path / "a.csv"), 2023, meta=meta, min_count=3)

    def test_a_file_about_other_products(self, tmp_path) -> None:
        meta = write(tmp_path / "m.jsonl", '{"parent_asin": "B00Y", "title": "x"}\n')
        with pytest.raises(ValueError, match=r"has none of the 3 products, such as 'B00A'; name"):
            load_amazon(ratings_2023(tmp_path / "a.csv"), 2023, meta=meta, min_count=3)

    @pytest.mark.parametrize("key", [["B00A"], None, 7, ""])
    def test_a_product_that_is_no_text(self, tmp_path, key) -> None:
        good = json.dumps({"asin": "B00A"})
        meta = write(tmp_path / "m.json", f"{good}\n\n{json.dumps({'asin': key})}\n")
        with pytest.raises(ValueError, match=r"m\.json, line 3: asin must be a text that is not"):
            load_amazon(reviews_2014(tmp_path / "a.json"), 2014, meta=meta, min_count=3)

    @pytest.mark.parametrize("line", ["{[]: 1}", "[" * 10_000, "{'asin': " + "1" * 5000 + "}"])
    def test_lines_that_no_parser_takes(self, tmp_path, line) -> None:
        meta = write(tmp_path / "m.json", line + "\n")
        with pytest.raises(ValueError, match=r"m\.json, line 1 is not JSON"):
            load_amazon(reviews_2014(tmp_path / "a.json"), 2014, meta=meta, min_count=3)


# What the releases say of one product, and what of it is kept.
ROWS = {
    2014: {
        "asin": "B00A",
        "title": "Soap",
        "brand": "Acme",
        "categories": [["Beauty", "Bath"], ["Gifts"]],
        "description": "It's  soap.",
        "price": 1.5,
    },
    2018: {
        "asin": "B00A",
        "title": "Soap",
        "brand": "Acme",
        "category": ["Beauty", "Bath", "Gifts"],
        "description": ["It's", "soap."],
        "feature": ["Clean", "White"],
        "image": ["http://x"],
    },
    2023: {
        "parent_asin": "B00A",
        "title": "Soap",
        "store": "Acme",
        "categories": ["Beauty", "Bath", "Gifts"],
        "description": ["It's soap."],
        "features": ["Clean", "White"],
        "images": [{"large": "http://x"}],
        "details": {"Brand": "x"},
    },
}
KEPT = {
    "title": "Soap",
    "brand": "Acme",
    "categories": "Beauty Bath Gifts",
    "description": "It's soap.",
    "features": "Clean White",
}


class TestTexts:
    @pytest.mark.parametrize("release", ROWS)
    def test_every_release_gives_the_same_texts(self, tmp_path, release) -> None:
        row = ROWS[release]
        line = repr(row) if release == 2014 else json.dumps(row)
        meta = write(tmp_path / "meta.json.gz", line + "\n")
        reviews = (ratings_2023 if release == 2023 else reviews_2014)(
            tmp_path / ("a.csv" if release == 2023 else "a.json")
        )
        data = load_amazon(reviews, max(2014, release // 2023 * 2023), meta=meta, min_count=3)
        wanted = dict(KEPT)
        if release == 2014:
            del wanted["features"]
        assert data.texts is not None
        place = [data.key(i) for i in range(3)].index("B00A")
        assert {"title": data.title(place), **data.texts[place]} == wanted
        assert [text for i, text in enumerate(data.texts) if i != place] == [{}, {}]

        data.save(tmp_path / "saved")
        path = tmp_path / "saved" / "texts.jsonl.gz"
        found = load_texts(path, Interactions.load(tmp_path / "saved"))
        assert found[place] == " ".join(wanted.values())
        assert load_texts(path, data, ["brand"])[place] == "Acme"
        assert [text for i, text in enumerate(found) if i != place] == ["", ""]

    def test_data_without_texts_removes_older_ones(self, tmp_path) -> None:
        meta = write(tmp_path / "m.json", json.dumps(ROWS[2018]) + "\n")
        reviews = reviews_2014(tmp_path / "a.json")
        load_amazon(reviews, 2014, meta=meta, min_count=3).save(tmp_path / "saved")
        assert (tmp_path / "saved" / "texts.jsonl.gz").exists()
        load_amazon(reviews, 2014, min_count=3).save(tmp_path / "saved")
        assert not (tmp_path / "saved" / "texts.jsonl.gz").exists()


class TestCommands:
    def test_from_meta_to_codes(self, tmp_path, capsys) -> None:
        items = [f"B{i:09}" for i in range(8)]
        events = [(f"A{u:012}", items[(u + s) % 8], s) for u in range(8) for s in range(6)]
        source = ratings_2014(tmp_path / "ratings.csv", events)
        rows = [
            {"asin": a, "title": f"Item {i}", "brand": "xy"[i % 2]} for i, a in enumerate(items)
        ]
        meta = write(tmp_path / "meta.json", "\n".join(map(json.dumps, rows)))
        where = ["--run", str(tmp_path / "run")]
        read = ["data", *where, "--amazon2014", str(source)]
        small = ["tokenize", *where, "--codes", "2", "--dim", "4", "--backend", "torch"]
        assert main(read) == 0
        capsys.readouterr()
        assert main([*small, "--texts"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "came without texts; name a file, or read the data again" in err
        assert main([*read, "--meta", str(meta)]) == 0
        assert main([*small, "--texts", "--text-fields", "brand"]) == 0
        record = json.loads((tmp_path / "run" / "tokenize.json").read_text())
        assert record["source"] == "texts"
        assert record["codes_per_level"] == [2, 4]  # two brands of four items each
        capsys.readouterr()
        assert main([*small, "--texts", "--text-fields", "price"]) == 2
        assert (
            "no line has the field 'price'; the fields are brand, title" in capsys.readouterr().err
        )

    def test_texts_of_arrays(self, tmp_path) -> None:
        import numpy as np

        np.savez(tmp_path / "sequences.npz", items=np.arange(8) % 4, offsets=np.asarray([0, 4, 8]))
        path = tmp_path / "item_text.jsonl.gz"
        rows = [{"item_id": i, "title": f"t{i}", "brand": "xy"[i % 2], "n": 1} for i in range(4)]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        where = ["--run", str(tmp_path / "run")]
        assert main(["data", *where, "--arrays", str(tmp_path)]) == 0
        small = ["--codes", "2", "--dim", "2", "--backend", "torch", "--text-fields", "brand"]
        assert main(["tokenize", *where, *small, "--texts"]) == 0
        codes = np.load(Path(where[1]) / "codes.npy")
        assert codes[0, 0] == codes[2, 0] != codes[1, 0] == codes[3, 0]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "item_text.jsonl.gz, line 1 is not JSON"),
            ('{"title": "x"}', "line 1: expected item_id, a whole number, got None"),
            ('{"item_id": "0"}', "line 1: expected item_id, a whole number, got '0'"),
        ],
    )
    def test_damaged_texts_of_arrays(self, tmp_path, capsys, line, message) -> None:
        import numpy as np

        np.savez(tmp_path / "sequences.npz", items=np.arange(8) % 4, offsets=np.asarray([0, 4, 8]))
        (tmp_path / "item_text.jsonl.gz").write_bytes(gzip.compress(line.encode()))
        assert main(["data", "--run", str(tmp_path / "run"), "--arrays", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()
