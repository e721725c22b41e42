"""Logs of trainings: what of every epoch is kept, on resuming too, and TensorBoard's files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from small_runs import STUDENT, TEACHER, small_run

from sidmlp.cli import main
from sidmlp.reporting import TrainingLog, read_log
from sidmlp.reporting.training_log import SCALARS

FACTS = {"loss": 2.0, "learning_rate": 1e-3, "gradient_norm": 0.5, "seconds": 1.5}


def test_every_epoch_is_kept(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "logs" / "teacher.json")
    log({"epoch": 1.0, **FACTS})
    log({"epoch": 2.0, **FACTS, "score": 0.25})
    first, second = read_log(log.path)
    assert first == {"epoch": 1.0, **FACTS}
    assert second == {"epoch": 2.0, **FACTS, "score": 0.25}


def test_going_on_supersedes_and_beginning_anew_replaces(tmp_path: Path) -> None:
    path = tmp_path / "student.json"
    for epoch in (1.0, 2.0, 3.0):
        TrainingLog(path)({"epoch": epoch, **FACTS})
    # Interrupted between the log and the state: epoch 3 is done and told again.
    TrainingLog(path)({"epoch": 3.0, **FACTS, "loss": 1.0})
    assert [(facts["epoch"], facts["loss"]) for facts in read_log(path)] == [(1, 2), (2, 2), (3, 1)]
    TrainingLog(path)({"epoch": 1.0, **FACTS})
    assert [facts["epoch"] for facts in read_log(path)] == [1]


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.json")
    log({"epoch": 1.0, **FACTS, "gradient_norm": math.inf})
    assert "gradient_norm" not in read_log(log.path)[0]


def test_no_log_is_empty_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    assert read_log(path) == []
    for text in ('{"epoch": 1}', "[1]", '[{"loss": 1}]', "[{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"log\.json"):
            read_log(path)


class Writer:
    """Takes down what SummaryWriter is told."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None:
        pass


def test_scalars_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidmlp.reporting.training_log.summary_writer", lambda: Writer)
    monkeypatch.setattr(Writer, "made", [])
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "of an earlier training").touch()
    log = TrainingLog(tmp_path / "log.json", folder)
    log({"epoch": 1.0, **FACTS})
    log({"epoch": 2.0, **FACTS, "score": 0.25})
    assert not folder.exists()
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step) == (str(folder), 1)
    assert {tag for tag, _, _ in writer.scalars} == set(SCALARS.values())
    assert ("validation NDCG@10", 0.25, 2) in writer.scalars
    assert ("learning rate", 1e-3, 1) in writer.scalars
    TrainingLog(tmp_path / "log.json", folder)({"epoch": 3.0, **FACTS})
    assert Writer.made[-1].purge_step == 3


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the package tensorboard is not installed",
    )
    log = TrainingLog(tmp_path / "log.json", tmp_path / "events")
    for epoch in (1.0, 2.0):
        log({"epoch": epoch, **FACTS, "score": epoch / 8})
    log.close()
    found = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(found.Tags()["scalars"]) == set(SCALARS.values())
    scores = found.Scalars("validation NDCG@10")
    assert [(event.step, event.value) for event in scores] == [(1, 0.125), (2, 0.25)]


def test_without_tensorboard_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    TrainingLog(tmp_path / "log.json")
    with pytest.raises(ModuleNotFoundError) as error:
        TrainingLog(tmp_path / "log.json", tmp_path / "events")
    assert error.value.name == "tensorboard"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("logs"), upto="tokenize")


class TestCommands:
    def test_refused_before_anything_is_trained(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        assert main(["train-teacher", "--run", str(run), *TEACHER, "--tensorboard"]) == 2
        assert "the package tensorboard is not installed" in capsys.readouterr().err
        assert not (run / "teacher-progress.pt").exists()

    def test_both_trainings_write(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sidmlp.reporting.training_log.summary_writer", lambda: Writer)
        monkeypatch.setattr(Writer, "made", [])
        assert main(["train-teacher", "--run", str(run), *TEACHER, "--tensorboard"]) == 0
        assert main(["distill", "--run", str(run), *STUDENT, "--tensorboard"]) == 0
        teacher, student = Writer.made
        assert (teacher.folder, student.folder) == (
            str(run / "tensorboard" / "teacher"),
            str(run / "tensorboard" / "student"),
        )
        for writer, epochs in ((teacher, 3), (student, 2)):
            seen = {(tag, step) for tag, _, step in writer.scalars}
            assert seen == {(tag, e) for tag in SCALARS.values() for e in range(1, epochs + 1)}
