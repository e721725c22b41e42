"""Users per second of a run's teacher, student and both together, whole requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_directory import RunDirectory

if TYPE_CHECKING:
    from sidmlp.training import Execution

K = 10
ROUNDS, WARMUP = 200, 2


def measure_speed(
    directory: RunDirectory,
    methods: Sequence[str],
    beams: int,
    batch: int,
    seconds: float,
    plus: Path | None = None,
    execution: Execution | None = None,
) -> dict[str, dict[str, Any]]:
    """Of those methods that can be timed: users_per_s, batch, p50_us, p99_us of a call, and how.

    The same test users, drawn at random, for all; what they have is excluded. teacher: token ids to
    items on the kernel's device; kernel, rescore: ``Recommender.decode`` of the exported student;
    student++: that of the run directory ``plus``. seconds: about as long is each measured.
    execution: the device and, for the kernels, bfloat16 if its precision is bf16; fp32 on the CPU
    by default. The teacher runs in float32. Raises ValueError where the student is not exported.
    """
    from sidmlp.data import leave_last_out
    from sidmlp.evaluate import Questions
    from sidmlp.training import Execution

    from .artifacts import load_data

    execution = execution or Execution()
    data = load_data(directory)
    questions = Questions.of(leave_last_out(data).test).sample(batch, seed=0)
    calls: dict[str, tuple[str, str, Callable[[], object]]] = {}
    for method in methods:
        if method in ("kernel", "rescore"):
            calls[method] = _kernel(directory, questions, beams, execution, method == "rescore")
        elif method == "student++" and plus is not None:
            calls[method] = _kernel(RunDirectory(plus), questions, beams, execution, False)
        elif method in ("teacher", "teacher-unconstrained"):
            calls[method] = _teacher(directory, questions, beams, execution, method == "teacher")
    users = len(questions.targets)
    return {
        method: _timed(call, device, how, users, beams, seconds)
        for method, (device, how, call) in calls.items()
    }


def _timed(
    call: Callable[[], object], device: str, how: str, users: int, beams: int, seconds: float
) -> dict[str, Any]:
    from sidmlp_kernels.testing.timing import time_interleaved

    timing = time_interleaved(
        {"": call}, device=device, rounds=ROUNDS, warmup=WARMUP, max_seconds=seconds
    )[""]
    return {
        "users_per_s": users / timing.median * 1e6,
        "batch": users,
        "p50_us": timing.median,
        "p99_us": timing.p99,
        "calls": len(timing.samples),
        "how": f"{how}, calls of {users} users, {beams} beams, median",
    }


def _kernel(
    directory: RunDirectory, questions: Any, beams: int, execution: Execution, rescore: bool
) -> tuple[str, str, Callable[[], object]]:
    from .artifacts import load_data, load_teacher
    from .served import rescoring, served_student

    model, checkpoint = served_student(directory, execution)
    ids = load_data(directory).item_ids
    histories = [ids[history] for history in questions.exclude]
    batch = model.batch(histories)
    by = rescoring(model, checkpoint, load_teacher(directory))(batch) if rescore else None

    def call() -> object:
        return model.decode(batch, k=K, num_beams=beams, exclude=histories, rescore=by)

    dtype = str(model.dtype).removeprefix("torch.")
    how = f"`Recommender.decode` on {model.device.type}, {model.backend}, {dtype}"
    return model.device.type, how, call


def _teacher(
    directory: RunDirectory, questions: Any, beams: int, execution: Execution, constrained: bool
) -> tuple[str, str, Callable[[], object]]:
    from sidmlp.teacher import PrefixTable
    from sidmlp.teacher.search import beam_search

    from .artifacts import load_codes, load_teacher

    device = execution.device
    teacher, (codes, _) = load_teacher(directory).to(device), load_codes(directory)
    table = PrefixTable(codes, teacher.tokens.codes_per_level).to(device)
    ids, mask = (
        tensor.to(device) for tensor in teacher.tokens.batch_examples(questions.examples, codes)
    )

    def call() -> object:
        return beam_search(
            teacher,
            ids,
            mask,
            table,
            k=K,
            num_beams=beams,
            constrained=constrained,
            exclude=questions.exclude,
        )

    return device.type, f"the teacher's beam search in PyTorch on {device.type}, float32", call
