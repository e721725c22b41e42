"""`sidmlp report`: its files agree with the records, and what is missing or outdated is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from small_runs import STUDENT, small_run

from sidmlp.cli import main
from sidmlp.reporting.curves import draw_curves
from sidmlp.reporting.summary import METHODS, recovery, summary_of, table

pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with everything measured, and its report."""
    found = small_run(tmp_path_factory.mktemp("report"))
    arguments = ["--run", str(found), "--speed", "--seconds", "0.05", "--batch", "8"]
    assert main(["report", *arguments]) == 0
    return found


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to break."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_the_files_say_what_was_measured(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    measured = json.loads((run / "evaluate.json").read_text())
    assert report["quality"] == measured["quality"]
    assert (report["split"], report["beams"], report["users"]) == ("test", 10, None)
    quality = measured["quality"]
    assert set(report["recovery"]) == {"reference", "kernel", "rescore"}
    for method, shares in report["recovery"].items():
        for metric, share in shares.items():
            assert share == quality[method][metric] / quality["teacher"][metric]
    timed = ("teacher", "teacher-unconstrained", "kernel", "rescore")
    assert set(report["speed"]) == set(timed)
    assert all(report["speed"][method]["batch"] == 8 for method in timed)
    page = (run / "report" / "report.md").read_text()
    for method, values in quality.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {METHODS[method]} |"))
        assert f"| {values['ndcg_10']:.4f} |" in line
        if method in report["recovery"]:
            assert f"| {report['recovery'][method]['ndcg_10']:.1%} |" in line
        if method in timed:
            assert line.endswith(f"| {report['speed'][method]['users_per_s']:,.0f} |")
    assert "of its beams name no item." in page
    assert "Not measured: student++" in page


def test_curves_of_both_trainings(run: Path) -> None:
    report = json.loads((run / "report" / "report.json").read_text())
    for name, command in (("teacher", "train-teacher"), ("student", "distill")):
        assert (run / "report" / f"{name}.png").read_bytes().startswith(PNG)
        record = json.loads((run / f"{command}.json").read_text())
        facts = report["training"][name]
        assert facts["validation_ndcg@10"] == record["validation_ndcg@10"]
        assert facts["epochs"] == record["epochs"]
        assert facts["seconds"] > 0
        logged = json.loads((run / "logs" / f"{name}.json").read_text())
        assert [f["loss"] for f in logged] == [f["loss"] for f in record["history"]]
        assert {"learning_rate", "gradient_norm", "seconds"} <= set(logged[0])


def test_without_logs_the_record_is_drawn(copy: Path) -> None:
    shutil.rmtree(copy / "logs")
    assert main(["report", "--run", str(copy)]) == 0
    report = json.loads((copy / "report" / "report.json").read_text())
    assert report["training"]["teacher"]["seconds"] is None
    assert (copy / "report" / "teacher.png").read_bytes().startswith(PNG)


def test_a_second_student_gets_a_row(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--run", str(copy), "--set", "hidden=24", *STUDENT]) == 0
    other = copy / "sweep" / "hidden=24"
    plus = ["--run", copy, "--plus", other]
    assert "sidmlp evaluate" in refused(capsys, *plus)
    assert main(["export", "--run", str(other)]) == 0
    evaluate = ["evaluate", "--run", str(other), "--methods", "kernel"]
    assert main(evaluate) == 0
    assert "other beams" in refused(capsys, *plus)
    assert main([*evaluate, "--beams", "10"]) == 0
    sample = ["--beams", "10", "--users", "9"]
    assert main([*evaluate, *sample, "--seed", "1"]) == 0
    assert "other users" in refused(capsys, *plus)
    mine = ["evaluate", "--run", str(copy), "--methods", "kernel", *sample]
    assert main(mine) == 0
    assert "other seed" in refused(capsys, *plus)
    assert main([*evaluate, *sample]) == 0
    assert main(["report", *map(str, plus)]) == 0
    report = json.loads((copy / "report" / "report.json").read_text())
    own = json.loads((other / "evaluate.json").read_text())["quality"]["kernel"]
    assert report["quality"]["student++"] == own
    assert (copy / "report" / "student++.png").read_bytes().startswith(PNG)


class TestMistakes:
    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no run directory" in refused(capsys, "--run", tmp_path / "nothing")

    def test_nothing_measured(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / "evaluate.json").unlink()
        assert "run `sidmlp evaluate --run" in refused(capsys, "--run", copy)

    @pytest.mark.parametrize(
        ("value", "words"), [(None, "ndcg_10=None"), (1.5, "ndcg_10=1.5"), ("x", "ndcg_10='x'")]
    )
    def test_a_metric_that_is_missing_or_none(
        self, copy: Path, value: object, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = json.loads((copy / "evaluate.json").read_text())
        found["quality"]["kernel"]["ndcg_10"] = value
        (copy / "evaluate.json").write_text(json.dumps(found))
        err = refused(capsys, "--run", copy)
        assert f"kernel has {words}" in err

    def test_results_of_an_earlier_student(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["distill", "--run", str(copy), *STUDENT, "--restart", "--seed", "5"]
        assert main(arguments) == 0
        err = refused(capsys, "--run", copy)
        assert "evaluate.json was measured before `sidmlp distill` ran last" in err
        assert main(["export", "--run", str(copy)]) == 0
        assert main(["evaluate", "--run", str(copy), "--methods", "kernel", "--beams", "10"]) == 0
        assert "speed.json was measured before `sidmlp distill`" in refused(capsys, "--run", copy)

    def test_without_matplotlib_the_package_is_named(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert "'.[report]'" in refused(capsys, "--run", copy)

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no epoch to draw"):
            draw_curves(tmp_path / "a.png", "teacher", [])


def test_a_teacher_that_finds_nothing_has_no_shares() -> None:
    none = dict.fromkeys(("recall_5", "ndcg_5", "recall_10", "ndcg_10"), 0.0)
    quality = {"teacher": none, "kernel": {**none, "ndcg_10": 0.5}}
    assert recovery(quality) == {"kernel": {}}
    assert "| 0.5000 | - | - |" in table(summary_of(quality, {}, {}))
