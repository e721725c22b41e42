"""Run directories for further students of a teacher that is there already."""

from __future__ import annotations

import os
from pathlib import Path

from .run_directory import RunDirectory

# What a student is made from: the record of each step, and its files.
SHARED = ("data.json", "data", "tokenize.json", "codes.npy", "train-teacher.json", "teacher.pt")


def student_run(run: RunDirectory, path: Path, *, share_features: bool = True) -> RunDirectory:
    """A run directory at ``path`` with ``run``'s data, codes and teacher, and students of its own.

    They are relative links, so both directories have to move together; a step that is done anew in
    ``run`` outdates the students here, too. share_features: what the teacher says about the
    training examples is kept once, in ``run``. Raises ValueError where ``run`` has no teacher, or
    ``path`` holds a file of its own in the place of a link.
    """
    run.require("train-teacher")
    path.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        _link(run.path / name, path / name)
    if share_features:
        run.features.mkdir(exist_ok=True)
        _link(run.features, path / run.features.name)
    return RunDirectory(path)


def _link(target: Path, link: Path) -> None:
    text = os.path.relpath(target.resolve(), link.parent.resolve())
    if link.is_symlink():
        if os.readlink(link) == text:
            return
        link.unlink()
    elif link.exists():
        raise ValueError(
            f"{link} is no link to {target}, as a further student's would be; choose an empty "
            f"directory"
        )
    link.symlink_to(text)
