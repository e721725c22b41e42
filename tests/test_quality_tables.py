"""Tables of benchmarks/quality.py's results: what they print, and what they refuse to print."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import BENCHMARKS
from quality_scripts import quality_modules

# NDCG@10 per method; the other metrics follow from it.
SCORES = {
    "popularity": 0.01,
    "teacher": 0.04,
    "teacher-unconstrained": 0.035,
    "reference": 0.0399,
    "kernel": 0.0399,
    "kernel-float32": 0.0399,
    "rescore": 0.04,
}


def report(
    seed: int = 0, tokenizer: str = "rkmeans3_dedup", plus: float | None = None, shift: float = 0.0
) -> dict[str, Any]:
    """An experiment's JSON, as far as tables read it."""
    scores = {name: score + shift for name, score in SCORES.items()}
    if plus is not None:
        scores |= dict.fromkeys(("student++", "student++-float32", "reference++"), plus)
    results = []
    for method, score in scores.items():
        row: dict[str, Any] = {"method": method, "ndcg_10": score, "note": ""}
        row |= {"recall_5": 2 * score, "ndcg_5": score / 2, "recall_10": 3 * score}
        if method not in ("popularity", "teacher"):
            share = score / scores["teacher"]
            row["recovery"] = {"ndcg_10": share}
            row["recovery_interval"] = {"ndcg_10": [share - 0.02, share + 0.02]}
        if method in ("teacher", "teacher-unconstrained", "kernel", "rescore", "student++"):
            row |= {"users_per_s": 1000.0 * (seed + 1), "how": "calls of 512 users"}
        results.append(row)
    where = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "torch": "2.11.0", "commit": "abc"}
    stages = {
        stage: {"wanted": f"--epochs 3 --seed {seed}", "where": where}
        for stage in ("teacher", "student", "evaluate", "speed")
    }
    setting = {"data": "amazon14_beauty", "tokenizer": tokenizer, "seed": seed, "split": "test"}
    setting |= {"users": 22363, "beams": 50, "sampled": False}
    pairs = {"kernel-float32": "reference", "student++-float32": "reference++"}
    differ = {kernel: {"from": reference, "users": 0} for kernel, reference in pairs.items()}
    made = {"kind": "quality", "machine": {}, "setting": setting, "stages": stages}
    return {**made, "users_that_differ": differ, "results": results}


def row_of(made: dict[str, Any], method: str) -> dict[str, Any]:
    return next(row for row in made["results"] if row["method"] == method)


@pytest.fixture(scope="module")
def tables() -> Iterator[SimpleNamespace]:
    for scripts in quality_modules():
        yield scripts.quality_tables


def line(text: str, *words: str) -> str:
    """The one line of a table with all these words."""
    (found,) = (line for line in text.splitlines() if all(word in line for word in words))
    return found


def test_one_seed_is_marked_and_has_intervals(tables: SimpleNamespace) -> None:
    text = tables.quality_tables([report()])["quality"]
    assert "amazon14_beauty, rkmeans3_dedup, one seed" in text
    assert line(text, "| popularity |").endswith("| 0.0100 | - | - |")
    student = line(text, "| student |")
    assert student.endswith("| 0.0798 | 0.0199 | 0.1197 | 0.0399 | 99.8% [97.7, 101.7] | 1,000 |")
    assert "student++" not in text
    assert "NVIDIA H200, torch 2.11.0, commit abc" in text


def test_seeds_have_mean_and_spread(tables: SimpleNamespace) -> None:
    reports = [report(seed, shift=0.001 * seed) for seed in (2, 0, 1)]
    text = tables.quality_tables(reports)["quality"]
    assert "amazon14_beauty, rkmeans3_dedup, 3 seeds" in text
    teacher = line(text, "| teacher, constrained |")
    assert "| 0.0410 ± 0.0010 |" in teacher
    assert teacher.endswith("| - | 2,000 |")
    shares = [(0.0399 + 0.001 * s) / (0.04 + 0.001 * s) for s in range(3)]
    assert f"| {sum(shares) / 3:.1%} ± 0.0 |" in line(text, "| student |")


def test_goals(tables: SimpleNamespace) -> None:
    good, bad = report(plus=0.039), report(tokenizer="rqvae3_dedup", shift=-0.01, plus=0.02)
    text = tables.quality_tables([good, bad])["quality-goals"]
    assert line(text, "rkmeans3_dedup: teacher").endswith("| 0.0365 | 0.0400 | met |")
    assert line(text, "rqvae3_dedup: teacher").endswith("| 0.0365 | 0.0300 | **missed** |")
    assert line(text, "rkmeans3_dedup: student, of").endswith("| 99.6% | 99.75% | met |")
    assert line(text, "rqvae3_dedup: student++, of").endswith("| 97.0% | 66.67% | **missed** |")
    assert line(text, "rqvae3_dedup: student, kernel").endswith("| 0; 0 users differ | met |")
    assert line(text, "rqvae3_dedup: student++, kernel").endswith("| 0; 0 users differ | met |")
    row_of(good, "kernel-float32")["recall_10"] += 0.0001
    text = tables.quality_tables([good])["quality-goals"]
    assert line(text, "student, kernel").endswith("**missed** |")


def test_one_seed_timed_is_enough(tables: SimpleNamespace) -> None:
    reports = [report(0), report(1), report(2)]
    for made in reports[:2]:
        del made["stages"]["speed"]
        for row in made["results"]:
            row.pop("users_per_s", None)
    text = tables.quality_tables(reports)["quality"]
    assert line(text, "|  | student |").endswith("| 3,000 |")
    assert "users/s, of the seeds that were timed: calls of 512 users." in text
    reports[1]["stages"]["plus"] = {**reports[1]["stages"]["teacher"], "wanted": "--a"}
    reports[2]["stages"]["plus"] = {**reports[2]["stages"]["teacher"], "wanted": "--b"}
    with pytest.raises(ValueError, match="expected the plus of"):
        tables.quality_tables(reports)


def remove(made: dict[str, Any], method: str) -> None:
    made["results"].remove(row_of(made, method))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda r: remove(r, "rescore"), "seed 1: expected results of rescore, got none"),
        (lambda r: remove(r, "teacher"), "expected results of teacher"),
        (lambda r: remove(r, "reference"), "expected results of reference"),
        (lambda r: row_of(r, "kernel").pop("ndcg_5"), "expected ndcg_5 of kernel, got None"),
        (lambda r: row_of(r, "kernel").pop("users_per_s"), "expected users_per_s of kernel"),
        (lambda r: row_of(r, "rescore").pop("recovery"), "recovery.ndcg_10 of rescore"),
        (lambda r: row_of(r, "teacher").update(ndcg_10=float("nan")), "ndcg_10 of teacher, got na"),
        (lambda r: r["setting"].pop("beams"), "expected setting.beams, got none"),
        (lambda r: r["setting"].update(beams=20), "expected the beams of"),
        (lambda r: r["setting"].update(seed=0), "expected one experiment a seed, got [0, 0]"),
        (
            lambda r: r["stages"]["teacher"].update(wanted="--epochs 9 --seed 1"),
            "expected the teacher of",
        ),
        (
            lambda r: r["results"].append({**row_of(r, "kernel"), "method": "student++"}),
            "seed 0: expected results of student++, got none",
        ),
    ],
)
def test_what_is_missing_is_named(tables: SimpleNamespace, broken: Any, words: str) -> None:
    reports = [report(0), report(1)]
    assert tables.quality_tables(copy.deepcopy(reports))
    broken(reports[1])
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        tables.quality_tables(reports)
    assert words in str(error.value)
    assert "amazon14_beauty, rkmeans3_dedup" in str(error.value)


def test_documents_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        make_tables = importlib.import_module("make_tables")
    page = tmp_path / "page.md"
    empty = "<!-- table:quality -->\n<!-- /table -->\n"
    page.write_text(empty)
    results = tmp_path / "results"
    results.mkdir()
    arguments = ["--results", str(results)]
    assert make_tables.main(["--check", str(page), *arguments]) == 0  # not measured yet
    for seed in (0, 1):
        path = results / f"quality-amazon14_beauty-rkmeans3_dedup-seed{seed}.json"
        path.write_text(json.dumps(report(seed)))
    assert make_tables.main(["--check", str(page), *arguments]) == 1
    assert make_tables.main(["--update", str(page), *arguments]) == 0
    assert "amazon14_beauty, rkmeans3_dedup, 2 seeds" in page.read_text()
    assert make_tables.main(["--check", str(page), *arguments]) == 0
    broken = report(1)
    remove(broken, "rescore")
    path.write_text(json.dumps(broken))
    capsys.readouterr()
    assert make_tables.main(["--update", str(page), *arguments]) == 1
    assert "expected results of rescore" in capsys.readouterr().err
