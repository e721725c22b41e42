"""`sidmlp sweep`: its settings, its runs, resuming, the table, the choice by validation."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from small_runs import STUDENT, small_run

from sidmlp import distill as distillation
from sidmlp.cli import main
from sidmlp.cli.sweep_grid import PUBLISHED, combinations, label, values
from sidmlp.training import TrainingFailed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("sweep"), upto="train-teacher")


def sweep(run: Path, *arguments: str) -> int:
    return main(["sweep", "--run", str(run), *STUDENT, *arguments])


def refused(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert sweep(run, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


GRID = {"hidden": ("8", "16"), "lr": ("0.1", "0.2", "0.3")}


class TestGrid:
    def test_grid_is_every_combination(self) -> None:
        found = list(combinations(GRID, "grid", None, 0))
        assert len(found) == 6
        assert found[0] == {"hidden": "8", "lr": "0.1"}
        assert len({label(setting) for setting in found}) == 6

    def test_axes_vary_one_thing_at_a_time(self) -> None:
        found = list(combinations(GRID, "axes", None, 0))
        assert found[0] == {}
        assert [len(setting) for setting in found[1:]] == [1] * 5
        assert label({}) == "base"

    def test_random_is_a_part_of_the_grid_that_the_seed_decides(self) -> None:
        found = list(combinations(GRID, "random", 4, 1))
        every = list(combinations(GRID, "grid", None, 0))
        assert len(found) == 4
        assert all(setting in every for setting in found)
        assert found == list(combinations(GRID, "random", 4, 1))
        assert list(combinations(GRID, "random", 99, 1)) != every
        assert len(list(combinations(GRID, "random", 99, 1))) == 6

    def test_published_ranges(self) -> None:
        assert PUBLISHED["hidden"][0] == "128"
        assert PUBLISHED["hidden"][-1] == "2048"
        assert PUBLISHED["attention"] == ("128", "256", "512")

    @pytest.mark.parametrize("text", ["hidden", "=1", "hidden=", "hidden=8,,16", "hidden=8,8"])
    def test_no_values(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            values(text)

    def test_a_label_is_no_path(self) -> None:
        assert label({"name": "../a b"}) == "name=.._a_b"


def test_two_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(run, "--set", "hidden=8,16") == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [row["setting"] for row in found["runs"]] == [{"hidden": "8"}, {"hidden": "16"}]
    scores = [row["validation_ndcg@10"] for row in found["runs"]]
    assert found["best"] == scores.index(max(scores))
    table = (run / "sweep" / "sweep.md").read_text()
    assert f"**{max(scores):.4f}**" in table
    best = found["runs"][found["best"]]["setting"]["hidden"]
    assert f"best on validation: hidden={best}" in printed
    for row, hidden in zip(found["runs"], (8, 16), strict=True):
        own = run / "sweep" / f"hidden={hidden}"
        record = json.loads((own / "distill.json").read_text())
        assert record["validation_ndcg@10"] == row["validation_ndcg@10"]
        assert json.loads((own / "setting.json").read_text())["hidden"] == hidden
        assert (own / "student.pt").is_file()
        assert (own / "teacher.pt").is_symlink()
    # A run of the sweep is a run directory like any other.
    assert main(["export", "--run", str(run / "sweep" / f"hidden={best}")]) == 0
    config = json.loads((run / "sweep" / f"hidden={best}" / "student" / "config.json").read_text())
    assert config["student"]["hidden_dim"] == int(best)
    assert not (run / "distill.json").exists()


def test_finished_runs_are_skipped(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(run, "--set", "hidden=8,16") == 0
    first = (run / "sweep" / "sweep.json").read_text()
    monkeypatch.setattr(
        distillation, "train_student", lambda *a, **k: pytest.fail("it was trained")
    )
    capsys.readouterr()
    assert sweep(run, "--set", "hidden=8,16") == 0
    assert (run / "sweep" / "sweep.json").read_text() == first
    assert capsys.readouterr().out.count("finished earlier") == 2
    # Other settings in common are another sweep.
    assert "epochs=2, this sweep has 3" in refused(
        capsys, run, "--set", "hidden=8,16", "--epochs", "3"
    )


def test_an_interrupted_sweep_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distillation.train_student
    calls: list[int] = []

    def second_stops(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **keywords)

    monkeypatch.setattr(distillation, "train_student", second_stops)
    out = ["--out", str(run / "interrupted"), "--set", "alpha=0.2,0.8"]
    assert sweep(run, *out) == 130
    assert json.loads((run / "interrupted" / "sweep.json").read_text())["of"] == 2
    assert sweep(run, *out) == 0
    assert len(calls) == 3
    runs = json.loads((run / "interrupted" / "sweep.json").read_text())["runs"]
    assert all("validation_ndcg@10" in row for row in runs)


def test_a_setting_that_fails_is_named_and_the_others_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distillation.train_student

    def fails_for_8(student, *arguments, **keywords):
        if student.config.hidden_dim == 8:
            raise TrainingFailed("student: the loss is nan in epoch 1")
        return whole(student, *arguments, **keywords)

    monkeypatch.setattr(distillation, "train_student", fails_for_8)
    out = run / "failing"
    assert sweep(run, "--out", str(out), "--set", "hidden=8,16") == 0
    found = json.loads((out / "sweep.json").read_text())
    assert found["best"] == 1
    assert "loss is nan" in found["runs"][0]["failed"]
    assert "loss is nan" in (out / "sweep.md").read_text()
    assert sweep(run, "--out", str(run / "all failing"), "--set", "hidden=8") == 2


def test_features_are_shared_unless_the_examples_differ(run: Path) -> None:
    assert sweep(run, "--set", "hidden=8,16") == 0
    assert (run / "sweep" / "hidden=8" / "features").resolve() == (run / "features").resolve()
    assert sweep(run, "--out", str(run / "seeds"), "--set", "seed=0,1") == 0
    own = [run / "seeds" / f"seed={seed}" / "features" for seed in (0, 1)]
    assert not any(folder.is_symlink() for folder in own)
    kinds = ["--set", "feature-precision=fp32,bf16"]
    assert sweep(run, "--out", str(run / "kinds"), *kinds) == 0
    assert not (run / "kinds" / "feature-precision=bf16" / "features").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "hiden=8,16"], "unrecognized arguments: --hiden=8"),
        (["--set", "hidden=8,x"], "expected a whole number of at least 1, got 'x'"),
        (["--set", "seed=0,-1"], "expected a whole number of at least 0, got '-1'"),
        # These would be refused at their turn, after the runs before them.
        (["--set", "tau=1,0"], "tau=0: tau must be positive"),
        (["--set", "lr=0.1,-1"], "lr=-1: learning_rate must be positive"),
        (["--set", "heads=2,3"], "heads=3: num_heads: expected a divisor of attention_dim 16"),
        (["--set", "run=a,b"], "no setting of a student"),
        (["--set", "hidden=8", "--set", "hidden=16"], "given twice"),
        ([], "nothing to sweep"),
        (["--set", "hidden=8", "--search", "random"], "--runs and --search random"),
        (["--set", "hidden=8", "--runs", "3"], "--runs and --search random"),
    ],
)
def test_mistakes(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, run, *arguments)


def test_no_teacher_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path, upto="tokenize")
    assert "`sidmlp train-teacher --run" in refused(capsys, run, "--set", "hidden=8")


def test_another_teacher_outdates_the_runs(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("sweep", "seeds", "*failing"))
    assert sweep(own, "--set", "hidden=8") == 0
    record = json.loads((own / "train-teacher.json").read_text())
    (own / "train-teacher.json").write_text(json.dumps({**record, "fingerprint": "another"}))
    # Its progress is of the other teacher, which the training loop says.
    assert sweep(own, "--set", "hidden=8") == 2
    assert sweep(own, "--set", "hidden=8", "--restart") == 0
