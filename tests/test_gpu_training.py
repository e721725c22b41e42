"""Training on a GPU: captured steps are ordinary steps, and what is learnt is what a CPU learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import skip_without_gpu
from test_execution import CODES, OPTIONS, SIZES, distilled, new_teacher, split, teacher

from sidmlp.cli.kernel_validation import kernel_decode
from sidmlp.data import TokenSpec, TokenTable
from sidmlp.distill import DistillOptions, make_student, reference_decode, train_student
from sidmlp.distill_encoder import make_encoder, state_error, train_encoder
from sidmlp.lessons import take_lessons
from sidmlp.metrics import ndcg_at_k
from sidmlp.teacher import PrefixTable
from sidmlp.teacher.train import histories, recommend, train_teacher
from sidmlp.training import Execution, LoopOptions, step
from sidmlp.training.features import FeatureTable

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
        options = LoopOptions(**{**OPTIONS, "batch_size": 16}, ema=0.9)
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


def test_captured_steps_draw_anew_on_cuda(cuda, split):
    """Dropout of activations and of history items: what a graph draws differs from step to step."""
    table = TokenTable(TokenSpec.for_codes(SIZES, max_items=4), split.train, CODES, cuda)
    index = torch.full((4096,), int(table.lengths.argmax()), device=cuda)
    table.batch(index, 4, dropout=0.5)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        _, mask = table.batch(index, 4, dropout=0.5)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(mask.sum(1).cpu())
    # Of three items each stays with one half, the latest always.
    assert all(abs(float(kept.float().mean()) - (2 + 3 * 2.5)) < 0.2 for kept in seen)
    assert not torch.equal(*seen)
    options = LoopOptions(**{**OPTIONS, "batch_size": 16}, ema=0.9)
    teacher, thinned = new_teacher(dropout=0.1), {"history_dropout": 0.3}
    found = train_teacher(
        teacher, split, CODES, options, execution=Execution(cuda), progress=False, **thinned
    )
    assert losses(found.history)[-1] < 0.8 * losses(found.history)[0]


def test_compiled_training_on_cuda_is_ordinary_training(cuda, split):
    found = []
    for compiles in (False, True):
        execution = Execution(cuda, compile=compiles)
        options = LoopOptions(**OPTIONS)
        result = train_teacher(
            new_teacher(), split, CODES, options, execution=execution, progress=False
        )
        found.append(losses(result.history))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("make", [kernel_decode, reference_decode])
def test_student_learns_on_cuda(cuda, teacher, split, make):
    _, want = distilled(teacher, split, Execution())
    student, found = distilled(teacher, split, Execution(cuda, "bf16"), decode=make(CODES))
    teacher.cpu()
    assert losses(found.history)[-1] == pytest.approx(losses(want.history)[-1], rel=0.1)
    assert {p.device.type for p in student.parameters()} == {"cuda"}
    assert found.best_score > 0.3


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("joint", [False, True])
def test_own_encoder_and_its_student_learn_on_cuda(
    cuda, teacher, split, monkeypatch, joint, resident
):
    """Both stages, with features on the GPU and, as where they do not fit, brought there."""
    monkeypatch.setattr(FeatureTable, "fits", staticmethod(lambda features, device: resident))
    options, errors, ends = LoopOptions(**{**OPTIONS, "epochs": 6}), [], []
    for execution in (Execution(), Execution(cuda, "bf16")):
        lessons = take_lessons(teacher, split, CODES, execution=execution, progress=False)
        encoder = make_encoder(teacher, num_layers=2, hidden_dim=32)
        arguments = {"execution": execution, "progress": False}
        train_encoder(encoder, lessons, options, **arguments)
        errors.append(state_error(encoder, lessons, execution).mse)
        if not joint:
            lessons = lessons.read_by(encoder, **arguments)
        student = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32, dropout=0.0)
        result = train_student(
            student,
            lessons,
            DistillOptions(),
            options,
            together_with=encoder if joint else None,
            decode=kernel_decode(CODES),
            **arguments,
        )
        ends.append(losses(result.history)[-1])
        assert result.best_score > 0.2
    teacher.cpu()
    assert errors[1] == pytest.approx(errors[0], rel=0.3)
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


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
