"""Training on a GPU: captured steps are ordinary steps, and what is learnt is what a CPU learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import skip_without_gpu
from test_execution import CODES, OPTIONS, SIZES, distilled, new_teacher, split, teacher

from sidmlp.cli.kernel_validation import kernel_decode
from sidmlp.distill import reference_decode
from sidmlp.metrics import ndcg_at_k
from sidmlp.teacher import PrefixTable
from sidmlp.teacher.train import histories, recommend, train_teacher
from sidmlp.training import Execution, LoopOptions, step

__all__ = ["split", "teacher"]  # fixtures


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> torch.device:
    if not torch.cuda.is_available():
        skip_without_gpu(request.config, "torch finds no CUDA device")
    return torch.device("cuda")


def losses(history) -> list[float]:
    return [record["loss"] for record in history]


def test_captured_steps_on_cuda_are_ordinary_ones(cuda, split, monkeypatch):
    found = []
    for ordinary in (3, 10**9):
        monkeypatch.setattr(step, "_ORDINARY_STEPS", ordinary)
        options = LoopOptions(**{**OPTIONS, "batch_size": 16})
        result = train_teacher(
            new_teacher(), split, CODES, options, execution=Execution(cuda), progress=False
        )
        found.append(losses(result.history))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_learns_on_cuda(cuda, split, precision):
    arguments = (split, CODES, LoopOptions(**OPTIONS))
    on_gpu = Execution(cuda, precision)
    found = train_teacher(new_teacher(), *arguments, execution=on_gpu, progress=False)
    want = train_teacher(new_teacher(), *arguments, progress=False)
    # Not the same batches: here examples of similar length share one.
    assert losses(found.history)[-1] == pytest.approx(losses(want.history)[-1], rel=0.1)


@pytest.mark.parametrize("make", [kernel_decode, reference_decode])
def test_student_learns_on_cuda(cuda, teacher, split, make):
    _, want = distilled(teacher, split, Execution())
    student, found = distilled(teacher, split, Execution(cuda, "bf16"), decode=make(CODES))
    teacher.cpu()
    assert losses(found.history)[-1] == pytest.approx(losses(want.history)[-1], rel=0.1)
    assert {p.device.type for p in student.parameters()} == {"cuda"}
    assert found.best_score > 0.3


def test_resumed_on_cuda_equals_uninterrupted(cuda, split, tmp_path):
    state = tmp_path / "state.pt"
    arguments = {"execution": Execution(cuda), "progress": False}

    class Stopped(Exception):
        pass

    def stop(facts: dict[str, float]) -> None:
        if facts["epoch"] == 3:
            raise Stopped

    options = LoopOptions(**{**OPTIONS, "epochs": 4})
    straight = train_teacher(new_teacher(0.1), split, CODES, options, **arguments)
    with pytest.raises(Stopped):
        train_teacher(
            new_teacher(0.1), split, CODES, options, state_file=state, log=stop, **arguments
        )
    resumed = train_teacher(new_teacher(0.1), split, CODES, options, state_file=state, **arguments)
    # Sums of gradients by atomic additions have no fixed order.
    assert losses(resumed.history) == pytest.approx(losses(straight.history), rel=1e-3)


@pytest.mark.parametrize("constrained", [True, False])
def test_search_on_cuda_is_that_on_a_cpu(cuda, teacher, split, constrained):
    table, seen = PrefixTable(CODES, SIZES), histories(split.test)
    found = []
    for execution in (Execution(), Execution(cuda)):
        teacher.to(execution.device)
        result = recommend(
            teacher,
            split.test,
            CODES,
            table,
            k=10,
            num_beams=12,
            constrained=constrained,
            exclude=seen,
            execution=execution,
        )
        found.append(result)
    teacher.cpu()
    assert torch.allclose(found[0].scores, found[1].scores, atol=1e-3)
    targets = torch.from_numpy(split.test.target_items())
    scores = [ndcg_at_k(result.items, targets, 10).mean for result in found]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert np.all(
        [not np.isin(row, had).any() for row, had in zip(found[1].items, seen, strict=True)]
    )
