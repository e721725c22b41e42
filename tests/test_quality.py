"""benchmarks/quality.py end to end on a toy data set: stages, resuming, bundles, its report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quality_scripts import quality_modules, toy_arguments
from small_runs import save_walks

from sidmlp.cli import main
from sidmlp.training import Execution

NAME = "walks-walk-seed0"
PLUS = "--hidden 24 --heads 2 --epochs 2"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    yield from quality_modules()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_walks(tmp_path_factory.mktemp("quality") / "walks")


@pytest.fixture(scope="module")
def done(scripts: SimpleNamespace, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished experiment, its JSON and its bundle."""
    folder = tmp_path_factory.mktemp("done")
    arguments = toy_arguments(data, folder, "--state", str(folder / "state"))
    assert scripts.quality.main(arguments) == 0
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / f"quality-{NAME}.json").read_text())


def test_the_report_says_what_was_measured(done: Path) -> None:
    report = report_of(done)
    assert report["kind"] == "quality"
    assert report["complete"]
    setting = report["setting"]
    assert (setting["data"], setting["tokenizer"], setting["seed"]) == ("walks", "walk", 0)
    assert (setting["users"], setting["beams"], setting["sampled"]) == (30, 10, False)
    assert setting["codes"]["codes_per_level"] == [4, 3, 3]
    assert set(report["stages"]) == {"tokenize", "teacher", "student", "evaluate", "speed"}
    for mark in report["stages"].values():
        assert mark["where"]["commit"] == "abc"
        assert mark["seconds"] >= 0
    rows = {row["method"]: row for row in report["results"]}
    assert set(rows) == {
        "popularity",
        "teacher",
        "teacher-unconstrained",
        "reference",
        "kernel",
        "kernel-float32",
        "rescore",
    }
    for row in rows.values():
        for metric, (low, high) in row["interval"].items():
            assert 0 <= low <= row[metric] <= high <= 1
    share = rows["kernel"]["recovery"]["ndcg_10"]
    assert share == pytest.approx(rows["kernel"]["ndcg_10"] / rows["teacher"]["ndcg_10"])
    low, high = rows["kernel"]["recovery_interval"]["ndcg_10"]
    assert low <= share <= high
    assert "name no item" in rows["teacher-unconstrained"]["note"]
    for name in ("teacher", "kernel", "rescore"):
        assert rows[name]["users_per_s"] > 0
    # On the CPU the kernel as it is served is the one in float32, and both are the reference's.
    assert report["users_that_differ"]["kernel-float32"] == {"from": "reference", "users": 0}
    assert rows["kernel"]["ndcg_10"] == rows["reference"]["ndcg_10"]


def test_it_measures_what_the_command_measures(done: Path) -> None:
    run = done / "work" / NAME
    names = "popularity,teacher,teacher-unconstrained,reference,kernel"
    evaluate = ["--methods", names, "--rescore", "teacher", "--beams", "10", "--device", "cpu"]
    assert main(["evaluate", "--run", str(run), *evaluate]) == 0
    quality = json.loads((run / "evaluate.json").read_text())["quality"]
    rows = {row["method"]: row for row in report_of(done)["results"]}
    for method, values in quality.items():
        for metric in ("recall_5", "ndcg_5", "recall_10", "ndcg_10"):
            assert rows[method][metric] == pytest.approx(values[metric]), (method, metric)


def test_weights_are_what_was_measured(done: Path) -> None:
    for name in ("teacher", "student"):
        weights = torch.load(done / "work" / NAME / f"{name}.pt", weights_only=True)["weights"]
        assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}


def test_finished_stages_are_skipped_and_other_arguments_refused(
    scripts: SimpleNamespace, data: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report_of(done)["stages"]
    assert scripts.quality.main(toy_arguments(data, done)) == 0
    assert capsys.readouterr().out.count("was finished earlier") == 5
    assert report_of(done)["stages"] == before
    assert scripts.quality.main(toy_arguments(data, done, "--student", "--hidden 24")) == 1
    assert "student was finished with" in capsys.readouterr().err


def test_a_bundle_goes_on_elsewhere(
    scripts: SimpleNamespace,
    data: Path,
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = list((done / "state").iterdir())
    assert [part.name for part in parts] == [f"{NAME}.tar.00"]
    shutil.copytree(done / "state", tmp_path / "state")
    arguments = toy_arguments(data, tmp_path, "--state", str(tmp_path / "state"))
    assert scripts.quality.main(arguments) == 0
    assert capsys.readouterr().out.count("was finished earlier") == 5
    assert report_of(tmp_path)["results"] == report_of(done)["results"]


def test_only_answers_of_another_student_are_asked_again(
    scripts: SimpleNamespace,
    data: Path,
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(done / "work", tmp_path / "work", symlinks=True)
    stages = tmp_path / "work" / NAME / "stages.json"
    marks = json.loads(stages.read_text())
    del marks["stages"]["student"]
    stages.write_text(json.dumps(marks))
    arguments = toy_arguments(data, tmp_path, "--student", "--hidden 24 --restart")
    assert scripts.quality.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    asked = [line.split(": ")[1] for line in said if line.startswith(f"{NAME}: ")]
    assert "teacher was finished earlier" in asked
    assert [name for name in ("popularity", "teacher", "reference", "kernel") if name in asked] == [
        "reference",
        "kernel",
    ]
    # A GPU's answers, in another number format, would not be taken for these.
    kept = json.loads((tmp_path / "work" / NAME / "answers.json").read_text())
    assert all("cpu" in kept[name]["made_from"] for name in kept if name != "popularity")


def test_some_methods_are_asked_elsewhere(
    scripts: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--state", str(tmp_path / "state")]
    few = toy_arguments(data, tmp_path, *state, "--methods", "teacher,kernel")
    assert scripts.quality.main(few) == 0
    report = report_of(tmp_path)
    assert {row["method"] for row in report["results"]} == {"teacher", "kernel"}
    assert "evaluate" not in report["stages"]
    shutil.rmtree(tmp_path / "work")
    assert scripts.quality.main(toy_arguments(data, tmp_path, *state)) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{NAME}: reference" in said
    assert said.count(f"{NAME}: teacher") == 1
    report = report_of(tmp_path)
    assert {row["method"] for row in report["results"]} >= {"teacher", "kernel", "reference"}
    assert "evaluate" in report["stages"]
    assert scripts.quality.main([*few, "--methods", "oracle"]) == 1


def test_more_processes_answer_the_same(
    scripts: SimpleNamespace, data: Path, done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "work", tmp_path / "work")
    run = tmp_path / "work" / NAME
    with np.load(done / "work" / NAME / "ranks.npz") as archive:
        want = archive["reference"]
    for name in ("ranks.npz", "answers.json"):
        (run / name).unlink()
    forget_evaluation(run)
    evaluate = ["--stages", "evaluate", "--methods", "reference", "--device", "cpu"]
    arguments = toy_arguments(data, tmp_path, *evaluate, "--jobs", "3")
    assert scripts.quality.main(arguments) == 0
    with np.load(run / "ranks.npz") as archive:
        assert archive.files == ["reference"]
        assert np.array_equal(archive["reference"], want)


def test_processes_end_when_time_is_up(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.quality_jobs.Questions, "of", lambda share: 60.0)
    monkeypatch.setattr(scripts.quality_jobs, "partial", lambda *_, **__: time.sleep)
    examples = type("Examples", (), {"__len__": lambda _: 4, "take": lambda *_: 0})()
    questions = SimpleNamespace(examples=examples)
    began = time.monotonic()
    run = scripts.quality_settings.RunDirectory(tmp_path)
    with pytest.raises(scripts.quality_stages.TimeUp), scripts.quality_stages.time_limit(3):
        scripts.quality_jobs.ask_in_processes(run, "reference", questions, 10, Execution(), 2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--users", "7"], "was asked with 30 users, this call asks with 7"),
        (["--beams", "12"], "was asked with 10 beams, this call asks with 12"),
    ],
)
def test_answers_to_other_questions_are_not_mixed(
    scripts: SimpleNamespace,
    data: Path,
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    shutil.copytree(done / "work", tmp_path / "work")
    forget_evaluation(tmp_path / "work" / NAME)
    evaluate = ["--stages", "evaluate", "--methods", "kernel"]
    assert scripts.quality.main(toy_arguments(data, tmp_path, *evaluate, *more)) == 1
    assert words in capsys.readouterr().err


def test_answers_of_an_earlier_student_are_left_out(
    scripts: SimpleNamespace, data: Path, done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "work", tmp_path / "work")
    forget_evaluation(tmp_path / "work" / NAME)
    path = tmp_path / "work" / NAME / "answers.json"
    answers = json.loads(path.read_text())
    answers["reference"]["made_from"][-1] = "another student"
    path.write_text(json.dumps(answers))
    evaluate = ["--stages", "evaluate", "--methods", "kernel"]
    assert scripts.quality.main(toy_arguments(data, tmp_path, *evaluate)) == 0
    report = report_of(tmp_path)
    assert not report["complete"]
    assert "reference" not in {row["method"] for row in report["results"]}


def forget_evaluation(run: Path) -> None:
    marks = json.loads((run / "stages.json").read_text())
    del marks["stages"]["evaluate"]
    (run / "stages.json").write_text(json.dumps(marks))


@pytest.mark.parametrize("jobs", [["--jobs", "0"], ["--jobs", "2"]])
def test_processes_that_cannot_be(
    scripts: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    jobs: list[str],
) -> None:
    assert scripts.quality.main(toy_arguments(data, tmp_path, "--device", "auto", *jobs)) == 1
    assert "jobs: expected at least 1" in capsys.readouterr().err


def test_a_stage_that_runs_out_of_time_goes_on(
    scripts: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--state", str(tmp_path / "state"), "--progress"]
    slow = toy_arguments(data, tmp_path, *state, "--teacher", "--dim 16 --epochs 400")
    assert scripts.quality.main([*slow, "--stage-seconds", "teacher=1.5"]) == 3
    assert "teacher is not finished after" in capsys.readouterr().out
    # On a machine where only the bundle arrives.
    shutil.rmtree(tmp_path / "work")
    assert scripts.quality.main([*slow, "--stage-seconds", "teacher=1.5"]) == 3
    progress = tmp_path / "work" / NAME / "teacher-progress.pt"
    done = torch.load(progress, weights_only=True)["result"]
    assert done["epochs"] > 1
    marks = json.loads((tmp_path / "work" / NAME / "stages.json").read_text())
    assert marks["seconds_before"]["teacher"] >= 2.5
    assert "teacher" not in marks["stages"]


def test_a_second_student_has_a_directory_and_rows_of_its_own(
    scripts: SimpleNamespace,
    data: Path,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    # Any student takes the way of the student++; its encoder is tested where it is trained.
    monkeypatch.setitem(scripts.quality_settings.DEFAULTS, "plus", "")
    shutil.copytree(done / "state", tmp_path / "state")
    plus = ["--stages", "tokenize,teacher,student,plus,evaluate,speed", "--plus", PLUS]
    arguments = toy_arguments(data, tmp_path, "--state", str(tmp_path / "state"), *plus)
    assert scripts.quality.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("was finished earlier") == 3
    assert f"{NAME}: kernel\n" not in said  # its answer was kept
    before, report = report_of(done), report_of(tmp_path)
    rows = {row["method"]: row for row in report["results"]}
    assert {"student++", "student++-float32", "reference++", "rescore++"} <= set(rows)
    assert report["users_that_differ"]["student++-float32"] == {"from": "reference++", "users": 0}
    assert rows["student++"]["users_per_s"] > 0
    assert "ndcg_10" in rows["student++"]["recovery"]
    assert set(report["training"]) == {"teacher", "student", "plus"}
    for row in before["results"]:
        assert rows[row["method"]]["ndcg_10"] == row["ndcg_10"]
    record = json.loads((tmp_path / "work" / NAME / "plus" / "distill.json").read_text())
    assert record["fingerprint"] in report["stages"]["plus"]["made_from"]
    # The run directories are those of the command line.
    run = tmp_path / "work" / NAME
    assert main(["report", "--run", str(run), "--plus", str(run / "plus")]) == 0
    made = json.loads((run / "report" / "report.json").read_text())
    for method in ("teacher", "kernel", "rescore", "student++"):
        assert made["quality"][method]["ndcg_10"] == pytest.approx(rows[method]["ndcg_10"])
        assert made["speed"][method]["users_per_s"] == rows[method]["users_per_s"]
    # And elsewhere, where links have to be made anew.
    shutil.rmtree(tmp_path / "work")
    assert scripts.quality.main(arguments) == 0
    assert capsys.readouterr().out.count("was finished earlier") == 6
    tables = scripts.quality_tables.quality_tables([report_of(tmp_path)])
    assert "| student++ |" in tables["quality"]
    assert "student++, of the teacher" in tables["quality-goals"]


def test_it_explains_itself(scripts: SimpleNamespace) -> None:
    text = scripts.quality.parser().format_help()
    assert all(stage in text for stage in scripts.quality_settings.STAGES)


def test_no_time_is_left(scripts: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    assert scripts.quality.main(toy_arguments(data, tmp_path, "--seconds", "5")) == 3
    assert not (tmp_path / "out").exists()


def test_own_tokenizers(scripts: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    tokenize = "--codes 4,4 --dim 4 --latent 4 --hidden 8 --epochs 3"
    arguments = toy_arguments(data, tmp_path, "--tokenizer", "rqvae", "--tokenize", tokenize)
    assert scripts.quality.main([*arguments, "--stages", "tokenize"]) == 0
    record = json.loads((tmp_path / "work" / "walks-rqvae-seed0" / "tokenize.json").read_text())
    assert record["tokenizer"] == "rqvae"
    assert record["duplicates"] == "level"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--tokenizer", "nonsense"], "expected one of rqvae, opq, rkmeans, walk, got 'nonsense'"),
        (["--data", "/no/such/folder"], "a directory with sequences.npz"),
        (["--stages", "teach"], "expected some of tokenize"),
        (["--teacher", "--dim none"], "sidmlp train-teacher: argument --dim"),
        (["--stage-seconds", "teacher"], "expected STAGE=SECONDS"),
        (["--stages", "student"], "no result of `sidmlp tokenize` yet"),
        (["--stages", "evaluate"], "no result of `sidmlp tokenize` yet"),
        (["--beams", "5"], "expected at least 10"),
    ],
)
def test_mistakes(
    scripts: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    changes: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert scripts.quality.main([*toy_arguments(data, tmp_path), *changes]) == 1
    assert words in capsys.readouterr().err


class TestRanks:
    def test_metrics_of_ranks(self, scripts: SimpleNamespace) -> None:
        values = scripts.quality_answers.per_user(np.array([0, 1, 4, 5, 9, 10], dtype=np.uint8))
        gain = 1 / np.log2([2, 3, 6, 7, 11])
        np.testing.assert_allclose(values[:, 0], [1, 1, 1, 0, 0, 0])
        np.testing.assert_allclose(values[:, 1], [*gain[:3], 0, 0, 0])
        np.testing.assert_allclose(values[:, 2], [1, 1, 1, 1, 1, 0])
        np.testing.assert_allclose(values[:, 3], [*gain, 0])

    def test_intervals_are_of_the_same_users(self, scripts: SimpleNamespace) -> None:
        ranks = np.random.default_rng(0).integers(0, 11, 400).astype(np.uint8)
        rows = scripts.quality_answers.measured({"teacher": ranks, "kernel": ranks.copy()})
        own = rows[1]
        assert own["recovery"]["ndcg_10"] == 1
        assert own["recovery_interval"]["ndcg_10"] == [1, 1]
        mean, (low, high) = own["recall_10"], own["interval"]["recall_10"]
        expected = 1.96 * np.sqrt(mean * (1 - mean) / 400)
        assert high - low == pytest.approx(2 * expected, rel=0.15)


class TestBundles:
    def test_parts_and_what_is_missing(
        self, scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = scripts.quality_state
        monkeypatch.setattr(state, "PART_BYTES", 4096)
        run = tmp_path / "run"
        (run / "plus").mkdir(parents=True)
        (run / "codes.npy").write_bytes(bytes(range(256)) * 40)
        (run / "plus" / "student.pt").write_bytes(b"plus")
        (run / "features.npy").write_bytes(b"not carried")
        parts = state.pack(run, tmp_path / "out", "one")
        assert len(parts) > 2
        assert all(part.stat().st_size <= 4096 for part in parts)
        assert state.unpack(tmp_path / "out", "one", tmp_path / "back")
        back = sorted(path.name for path in (tmp_path / "back").rglob("*") if path.is_file())
        assert back == ["codes.npy", "student.pt"]
        assert (tmp_path / "back" / "codes.npy").read_bytes() == (run / "codes.npy").read_bytes()
        assert not state.unpack(tmp_path / "out", "another", tmp_path / "back")
        parts[1].unlink()
        with pytest.raises(ValueError, match="a part is missing or damaged"):
            state.unpack(tmp_path / "out", "one", tmp_path / "back")

    def test_weights_beyond_half_precision(self, scripts: SimpleNamespace, tmp_path: Path) -> None:
        path = tmp_path / "teacher.pt"
        torch.save({"config": {}, "weights": {"w": torch.tensor([1e6, 1.0])}}, path)
        with pytest.raises(ValueError, match="within float16's range, got 1000000"):
            scripts.quality_state.halve_weights(path)
