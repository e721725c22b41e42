"""Where the commands leave their results for each other: a directory with one JSON file a command.

``COMMAND.json`` says what the command made, of which fingerprint, and from which. A command that
builds on an outdated result is refused instead of mixing two experiments.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from sidmlp.data.files import read_json, write_json

# Each command and the one whose result it reads.
PARENTS = {
    "data": None,
    "tokenize": "data",
    "train-teacher": "tokenize",
    "distill": "train-teacher",
    "export": "distill",
}


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """``--run``, which every step has."""
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/default"),
        metavar="DIR",
        help="directory that holds this experiment; each command finds the earlier results there",
    )


class RunDirectory:
    """Paths of an experiment's files, and the record of what was made from what."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.codes = path / "codes.npy"
        self.teacher = path / "teacher.pt"
        self.teacher_progress = path / "teacher-progress.pt"
        self.features = path / "features"
        self.student = path / "student.pt"
        self.encoder = path / "encoder.pt"  # an SID-MLP++ student's own
        self.encoder_progress = path / "encoder-progress.pt"
        self.encoder_features = path / "encoder-features"
        self.student_progress = path / "student-progress.pt"
        self.checkpoint = path / "student"

    def log(self, name: str) -> Path:
        """What the training of ``name`` ("teacher", "student") said of every epoch."""
        return self.path / "logs" / f"{name}.json"

    def fingerprints(self) -> dict[str, str]:
        """Of every command whose result is there and up to date."""
        found = {}
        for command in PARENTS:
            try:
                found[command] = self.require(command)["fingerprint"]
            except ValueError:
                continue
        return found

    def finish(self, command: str, fingerprint: str, **facts: Any) -> None:
        """Records that ``command`` has made its result."""
        parent = PARENTS[command]
        made_from = None if parent is None else self.require(parent)["fingerprint"]
        write_json(self._record(command), {"fingerprint": fingerprint, "from": made_from, **facts})

    def require(self, command: str) -> dict[str, Any]:
        """The record of ``command``; ValueError says what to run when it is missing or outdated."""
        parent = PARENTS[command]
        upstream = None if parent is None else self.require(parent)["fingerprint"]
        remedy = f"run `sidmlp {command} --run {self.path}`"
        if not self._record(command).is_file():
            raise ValueError(f"{self.path} has no result of `sidmlp {command}` yet; {remedy}")
        record = read_json(self._record(command))
        if not isinstance(record, dict) or not {"fingerprint", "from"} <= set(record):
            raise ValueError(f"{self._record(command)} is no record of a command; {remedy} again")
        if record["from"] != upstream:
            raise ValueError(
                f"the result of `sidmlp {command}` in {self.path} was made before "
                f"`sidmlp {parent}` ran last; {remedy} again"
            )
        return record

    def exported(self) -> Path:
        """The checkpoint of ``sidmlp export``; ValueError where there is no current one."""
        named = self.require("export")["directory"]
        return self.checkpoint if named is None else Path(named)

    def restart_teacher(self) -> None:
        """Forgets how far the teacher's training is."""
        self.teacher_progress.unlink(missing_ok=True)

    def restart_student(self) -> None:
        """Forgets how far distillation is, and what the teacher said."""
        self.encoder_progress.unlink(missing_ok=True)
        shutil.rmtree(self.features, ignore_errors=True)
        self.restart_second_stage()

    def restart_second_stage(self) -> None:
        """Forgets how far the student's training is, and the states of its own encoder."""
        self.student_progress.unlink(missing_ok=True)
        shutil.rmtree(self.encoder_features, ignore_errors=True)

    def _record(self, command: str) -> Path:
        return self.path / f"{command}.json"
