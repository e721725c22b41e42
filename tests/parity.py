"""Ties problems of sidmlp_kernels.testing to the reference, which shares no code with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from sidmlp import beam
from sidmlp.beam import Beams, Decoded, LevelOptions
from sidmlp.bounds import check_decode, decode_bounds
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels import backends
from sidmlp_kernels.ops.cuda_kernels import tensor_cores_why_not
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import PackedModel, Problem, exclude_tensors, rounding_floor
from sidmlp_kernels.trie import host_library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PUBLISHED: dict[str, Any] = {  # sizes for make_problem
    "codes_per_level": (256,) * 4,
    "dim": 128,
    "attention_dim": 384,
    "ffn_dim": 1024,
    "hidden_dim": 512,
    "tokens": 82,
    "num_items": 5000,
    "num_beams": 50,
}
ISAS = ("plain", "avx2", "avx512")

GPU_BACKENDS = [backend.name for backend in backends.BACKENDS if backend.device_type == "cuda"]


def float32_activations(backend: str, dtype: str, problem: Problem) -> bool:
    """Whether a decode keeps all activations in float32. Tensor cores take them in the dtype of the
    weights."""
    if backend == "cpu" or dtype == "fp32":
        return True
    beams = problem.settings.num_beams
    return backend == "cuda" and bool(tensor_cores_why_not(problem.spec, DTYPES[dtype], beams))


def require_isa(isa: str) -> None:
    """Skips the test where this processor lacks the instruction set."""
    needed = {
        "plain": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f"},
        "avx512bf16": {"avx512bf16"},
    }[isa]
    missing = needed - set(host_library().build_info()["instruction_sets"])
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")


def sanitized(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Parameters of a test; those `chosen` are run under compute-sanitizer, too (make sanitize)."""
    values = list(values)
    unknown = set(chosen) - set(values)
    assert not unknown, f"no parameters: {unknown}"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[pytest.mark.sanitize] if value in chosen else [],
        )
        for value in values
    ]


def require_sizes(backend: str, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
    """Skips the test where the backend says that it runs, but not these sizes."""
    beams = problem.settings.num_beams
    reason = backends.why_not(backend, problem.spec, dtype=dtype, num_beams=beams)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")


def student_of(problem: Problem, dtype: torch.dtype = torch.float64) -> Student:
    """The reference student with the problem's weights."""
    with torch.device("meta"):  # no time for an initialisation that nobody reads
        student = Student(StudentConfig(**asdict(problem.spec)))
    weights = {name: weight.to(dtype) for name, weight in problem.weights.items()}
    student.load_state_dict(weights, assign=True)
    return student.eval().requires_grad_(False)


def trie_of(problem: Problem) -> Trie:
    """The reference trie of the problem's catalogue."""
    return Trie.from_codes(
        problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
    )


def options_of(problem: Problem) -> dict[str, Any]:
    """The decode settings as the reference's functions take them."""
    return {
        "temperatures": problem.settings.temperatures,
        "level_weights": problem.settings.level_weights,
        "normalisation": problem.settings.normalisation,
    }


def reference_decode(problem: Problem, dtype: torch.dtype = torch.float64) -> Decoded:
    """The reference's answer in `dtype`."""
    return beam.decode_states(
        student_of(problem, dtype),
        problem.states.to(dtype),
        problem.mask,
        trie_of(problem),
        problem.k,
        problem.settings.num_beams,
        problem.exclude,
        **options_of(problem),
    )


def decode(plan: DecodePlan, problem: Problem, states: Tensor | None = None) -> Decoded:
    """The kernel's answer to the problem's requests, on the CPU."""
    device = plan.packed.device
    states = problem.states if states is None else states
    excluded = exclude_tensors(problem.exclude, device)
    results = plan.decode_states(states.to(device), problem.mask.to(device), *excluded)
    return Decoded(*(tensor.cpu() for tensor in results))


def score_errors(problem: Problem, dtype: torch.dtype, states: Tensor) -> list[float]:
    """For each level, what tier 2 allows a score to be off by: eps of `decode_bounds`."""
    students = student_of(problem), student_of(problem, dtype)
    with torch.no_grad():
        contexts = (
            students[0].context(states.double(), problem.mask),
            students[1].context(states.to(dtype), problem.mask),
        )
    options = options_of(problem)
    return level_errors(students, contexts, trie_of(problem), problem.settings.num_beams, options)


@torch.no_grad()
def level_errors(
    students: tuple[Student, Student],
    contexts: tuple[Tensor, Tensor],
    trie: Trie,
    num_beams: int,
    decode_options: dict[str, Any],
) -> list[float]:
    """eps of `decode_bounds`, from a student in float64 and in a kernel's dtype and their contexts.

    Both score the candidates of the exact beams; the largest difference of a level's term, doubled,
    and the rounding floor add up.
    """
    exact, dtype = students[0], contexts[1].dtype
    options = LevelOptions.make(trie.num_levels, **decode_options)
    beams = beam.root(contexts[0], torch.ones(len(contexts[0]), dtype=torch.bool))
    eps, total = [], 0.0
    for level in range(trie.num_levels):
        none = torch.zeros_like(beams.scores)
        start = Beams(none, beams.nodes, beams.codes, beams.live)
        pairs = zip(students, contexts, strict=True)
        own, theirs = (
            beam.expand(student, trie, level, context, start, options) for student, context in pairs
        )
        found = beam.expand(exact, trie, level, contexts[0], beams, options)
        exists = own.exists
        term, rough_term = own.scores[exists], theirs.scores[exists].double()
        total += 2 * float((term - rough_term).abs().max()) + rounding_floor(term, dtype)
        total += rounding_floor(found.scores[exists], torch.float32)
        eps.append(total)
        width = min(num_beams, found.scores[0].numel(), trie.num_nodes(level))
        beams = beam.select(found, beams, width, exact_ties=True)
    return eps


def assert_within_bounds(
    result: Decoded,
    problem: Problem,
    eps: Sequence[float],
    *,
    where: str,
    states: Tensor | None = None,
    exact: Student | PackedModel | None = None,
) -> None:
    """AssertionError unless MUST <= result <= MAY and every rule of a decode holds (tier 3)."""
    exact = student_of(problem) if exact is None else exact
    states = problem.states if states is None else states
    trie = trie_of(problem)
    bounds = decode_bounds(
        exact,  # type: ignore[arg-type]  # PackedModel answers like a Student
        exact.context(states.double(), problem.mask),
        trie,
        problem.settings.num_beams,
        list(eps),
        k=problem.k,
        exclude=problem.exclude,
        **options_of(problem),
    )
    faults = check_decode(result, bounds, trie, exclude=problem.exclude)
    assert not faults, "\n".join([f"{where}, eps {eps} ({problem})", *faults[:10]])
