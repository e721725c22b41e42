"""Training does not depend on held-out items: change these, and every loss stays the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from test_execution import CODES, OPTIONS, new_teacher

from sidmlp.data import Interactions, Split, leave_last_out
from sidmlp.distill import DistillOptions, distill, make_student
from sidmlp.teacher.train import train_teacher
from sidmlp.training import LoopOptions

LOOP = LoopOptions(**{**OPTIONS, "epochs": 2})


def changed(*from_the_end: int) -> Split:
    """Everybody walks round a circle of items; the items at these places are others instead."""
    rng = np.random.default_rng(0)
    walks = (rng.integers(30, size=(40, 1)) + np.arange(7)) % 30
    for place in from_the_end:
        walks[:, -place] = (walks[:, -place] + 11) % 30
    offsets = np.arange(41) * 7
    return leave_last_out(Interactions(walks.reshape(-1), offsets, np.arange(30)))


def teacher_losses(split: Split, targets: int) -> list[float]:
    result = train_teacher(
        new_teacher(), split, CODES, LOOP, targets_per_history=targets, progress=False
    )
    return [record["loss"] for record in result.history]


def student_losses(split: Split) -> list[float]:
    teacher = new_teacher()
    student = make_student(teacher, num_heads=2, hidden_dim=16, dropout=0.0)
    result = distill(student, teacher, split, CODES, DistillOptions(), LOOP, progress=False)
    return [record["loss"] for record in result.history]


@pytest.mark.parametrize("targets", [1, 3, 8])
def test_the_teacher_learns_nothing_of_them(targets: int) -> None:
    losses = teacher_losses(changed(), targets)
    assert teacher_losses(changed(1), targets) == losses
    assert teacher_losses(changed(1, 2), targets) == losses
    assert teacher_losses(changed(3), targets) != losses


def test_the_student_learns_nothing_of_them() -> None:
    losses = student_losses(changed())
    assert student_losses(changed(1, 2)) == losses
    assert student_losses(changed(3)) != losses
