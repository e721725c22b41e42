"""Many beams and wide codebooks on the tensor cores of a GPU (csrc/cuda/sm90/wide_beam.cuh)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from parity import (
    DTYPES,
    assert_within_bounds,
    decode,
    options_of,
    sanitized,
    score_errors,
    student_of,
    trie_of,
)

from sidmlp.beam import beam_decode
from sidmlp_kernels.ops.cuda_kernels import tensor_cores_why_not
from sidmlp_kernels.spec import DecodeSpec
from sidmlp_kernels.testing import (
    Problem,
    assert_results_equal,
    exclude_tensors,
    make_grid_problem,
    make_problem,
)

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)

# A batch for each way of cutting it among clusters, and a group that is not full.
BATCHES = (1, 2, 15, 16, 31, 67, 131, 133, 300)


def on_tensor_cores(problem: Problem, dtype: torch.dtype) -> Problem:
    reason = tensor_cores_why_not(problem.spec, dtype, problem.settings.num_beams)
    assert reason == "", "these tests are of the kernel that does not take the problem"
    return problem


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("normalisation", ["children", "codebook"])
@pytest.mark.parametrize("num_beams", [129, 200, 256, 257, 511, 512])
def test_exact_scores_and_their_ties(
    backend: str, device: torch.device, num_beams: int, normalisation: str, dense: bool
) -> None:
    """Scores are exact and mostly equal, so every bit is the reference's."""
    sizes = (24, 16, 10)
    codes = torch.cartesian_prod(*map(torch.arange, sizes))[::2].repeat(2, 1)
    settings = dataclasses.replace(
        DecodeSpec.for_levels(3),
        num_beams=num_beams,
        normalisation=normalisation,
        level_weights=(1.0, -1.0, 0.5),
    )
    generator = torch.Generator().manual_seed(num_beams)
    problem, context = make_grid_problem(
        codes,
        sizes,
        settings=settings,
        k=num_beams,
        batch=5,
        multiples=(16, 32),
        available=torch.rand(len(codes), generator=generator) < 0.8,
        exclude=[list(range(0, 3 * n, 3)) for n in (0, 5, 400, 1, 90)],
    )
    on_tensor_cores(problem, torch.bfloat16)
    found = beam_decode(
        student_of(problem, torch.float32),
        context,
        trie_of(problem),
        problem.k,
        num_beams,
        problem.exclude,
        **options_of(problem),
    )
    plan = problem.plan(backend, torch.bfloat16, device=device, dense=[True, dense, dense])
    got = plan.beam_decode(context.to(device), *exclude_tensors(problem.exclude, device))
    wanted = tuple(getattr(found, field.name) for field in dataclasses.fields(found))
    assert_results_equal(got, wanted, where=problem, wanted_is="reference")


CASES: dict[str, dict[str, Any]] = {
    "129 beams": {"codes_per_level": (40, 30, 20), "num_beams": 129},
    "512 beams, exclusion": {
        "codes_per_level": (40, 40, 40),
        "num_items": 5000,
        "num_beams": 512,
        "excluded": 200,
        "unavailable": 0.2,
    },
    "1025 codes": {"codes_per_level": (1025, 1025, 1025), "num_beams": 50},
    "8192 codes": {"codes_per_level": (8192, 8192, 8192), "num_items": 9000, "num_beams": 30},
    "nodes of thousands": {"codes_per_level": (3, 8192, 9), "num_items": 9000, "num_beams": 100},
    "beams and codes": {"codes_per_level": (2000, 40, 9), "num_items": 9000, "num_beams": 300},
    "H32": {"codes_per_level": (64, 64, 64), "hidden_dim": 32, "num_beams": 300},
    "H544": {"codes_per_level": (64, 64, 64), "hidden_dim": 544, "num_beams": 200},
    "H2048": {"codes_per_level": (1500, 64), "hidden_dim": 2048, "num_beams": 200},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("normalisation", ["children", "codebook"])
@pytest.mark.parametrize("case", sanitized(CASES, ["129 beams", "H32"]))
def test_results_are_within_the_bounds(
    backend: str, device: torch.device, case: str, normalisation: str, dtype: str
) -> None:
    """Against the reference in float64 (tier 3), with both forms of every level."""
    options = {"num_items": 3000, "batch": 3, "dim": 64, **CASES[case]}
    problem = make_problem(seed=len(case), normalisation=normalisation, **options)
    on_tensor_cores(problem, DTYPES[dtype])
    eps = score_errors(problem, DTYPES[dtype], problem.states)
    for dense in (False, True):
        plan = problem.plan(
            backend, DTYPES[dtype], device=device, dense=[dense] * problem.spec.num_levels
        )
        result = decode(plan, problem)
        assert_within_bounds(result, problem, eps, where=f"{case}, {dtype}, dense {dense}")


@pytest.mark.parametrize(
    "options",
    [
        {"codes_per_level": (300, 60, 20), "num_beams": 300, "hidden_dim": 512, "dim": 128},
        {"codes_per_level": (3000, 1500, 20), "num_beams": 40, "hidden_dim": 96},
        {"codes_per_level": (1025, 40, 20), "num_beams": 130, "normalisation": "codebook"},
    ],
)
def test_every_batch_gives_the_same_bits(
    backend: str, device: torch.device, options: dict[str, Any]
) -> None:
    """One block a request or a team of eight; and a neighbour without an answer."""
    problem = make_problem(seed=9, num_items=9000, batch=7, tokens=5, excluded=30, **options)
    on_tensor_cores(problem, torch.bfloat16)
    plan = problem.plan(backend, torch.bfloat16, device=device)

    def run(rows: Problem) -> tuple[torch.Tensor, ...]:
        excluded = exclude_tensors(rows.exclude, device)
        return plan.decode_states(rows.states.to(device), rows.mask.to(device), *excluded)

    states, mask = problem.states.clone(), problem.mask.clone()
    states[3, 0], mask[3, 0] = torch.nan, True
    problem = problem.replace(states=states, mask=mask)
    whole = run(problem)
    counts = whole[3].tolist()
    assert counts[3] == 0
    assert all(counts[:3] + counts[4:])
    for batch in BATCHES:
        rows = [(5 * batch + 3 * i) % 7 for i in range(batch)]
        got = run(problem.rows(rows))
        wanted = [tensor[rows] for tensor in whole]
        assert_results_equal(got, wanted, where=f"batch {batch}", wanted_is="those in 7")
