"""Results of a command replace the old ones together or not at all, the records last."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sidmlp.cli import main
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.cli.staging import staged
from sidmlp.data.files import write_atomically
from sidmlp.training.states import _write


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    with staged(run) as new:
        write(new.data / "old.txt", "old")
        new.finish("data", "1")
    with staged(run) as new:
        write(new.codes, "old codes")
        new.finish("tokenize", "2")
    return run


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(run: RunDirectory) -> dict[str, str]:
    files = [path for path in run.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(run.path)): path.read_text() for path in files}


def test_results_and_records_arrive(run: RunDirectory) -> None:
    assert set(contents(run)) == {"data/old.txt", "data.json", "codes.npy", "tokenize.json"}
    assert run.require("tokenize")["from"] == "1"
    with staged(run) as new:
        write(new.data / "new.txt", "new")
        new.finish("data", "3")
    assert set(contents(run)) == {"data/new.txt", "data.json", "codes.npy", "tokenize.json"}
    with pytest.raises(ValueError, match="was made before `sidmlp data` ran last"):
        run.require("tokenize")


def test_a_failure_changes_nothing(run: RunDirectory) -> None:
    before = contents(run)

    def fail() -> None:
        with staged(run) as new:
            write(new.data / "new.txt", "new")
            write(new.codes, "new codes")
            new.finish("data", "3")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert contents(run) == before


def test_nothing_is_left_of_a_run_that_never_was(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), staged(RunDirectory(tmp_path / "none")):
        raise OSError("full")
    assert not (tmp_path / "none").exists()


def test_killed_while_replacing_leaves_no_record(run: RunDirectory, monkeypatch) -> None:
    right = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == run.codes:
            raise KeyboardInterrupt
        right(source, target)

    def replace() -> None:
        with staged(run) as new:
            write(new.codes, "new codes")
            new.finish("tokenize", "3")
            monkeypatch.setattr(os, "replace", killed)

    with pytest.raises(KeyboardInterrupt):
        replace()
    monkeypatch.undo()
    assert run.require("data")["fingerprint"] == "1"
    with pytest.raises(ValueError, match="has no result of `sidmlp tokenize` yet"):
        run.require("tokenize")


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(run) -> None:
    left = run.path / f".new.{os.getpid()}"
    left.mkdir()
    write(left / "codes.npy", "half")
    with staged(run) as new:
        new.finish("tokenize", "3")
    assert run.require("tokenize")["fingerprint"] == "3"
    assert not left.exists()
    assert contents(run)["codes.npy"] != "half"


FULL = Path("/dev/full")  # a device on which every write fails as on a full disk


def write_much(path: Path) -> None:
    FULL.write_text("x" * 100_000)


def save_array(path: Path) -> None:
    with FULL.open("wb") as file:
        np.save(file, np.zeros(100_000))


def save_weights(path: Path) -> None:
    content = io.BytesIO()
    torch.save({"a": torch.zeros(100_000)}, content)
    _write(FULL, content)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("writer", [write_much, save_array, save_weights])
def test_a_full_disk_is_named_and_replaces_nothing(run, monkeypatch, capsys, writer) -> None:
    before = contents(run)

    def fail() -> None:
        with staged(run) as new:
            write_atomically(new.codes, writer)

    with pytest.raises(OSError, match="so nothing was replaced; make room") as caught:
        fail()
    assert caught.value.filename == str(run.codes)
    assert contents(run) == before

    def command(_: object) -> None:
        fail()

    monkeypatch.setattr("sidmlp.cli.export.run", command)
    assert main(["export", "--run", str(run.path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("sidmlp export: ")
    assert str(run.codes) in err


def test_other_errors_of_a_writer_are_left_alone(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "x", wrong)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="Not a directory, so nothing was replaced; mend that"),
        staged(RunDirectory(tmp_path / "file" / "run")),
    ):
        pass
