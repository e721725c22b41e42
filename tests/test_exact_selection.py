"""Tier 1: where scores are exact and tie massively, kernel and reference agree in every bit.

`make_grid_problem` makes logits that are multiples of 64, so float32 log-probabilities and their
sums are exact and equal scores are everywhere: items, their order, codes, scores and counts must be
those of the tie rule (higher score, then the lower parent rank, then the lower code).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import (
    DTYPES,
    ISAS,
    options_of,
    require_isa,
    require_sizes,
    sanitized,
    student_of,
    trie_of,
)

from sidmlp.beam import beam_decode
from sidmlp_kernels.spec import DecodeSpec
from sidmlp_kernels.testing import (
    Problem,
    assert_results_equal,
    exclude_tensors,
    make_grid_problem,
)

# Of dim and hidden_dim: as small as can be, and sizes that tensor cores take.
MULTIPLES = ((1, 2), (16, 32))
LEVEL_WEIGHTS = (1.0, 1.0, 0.0, -1.0, 2.0, 0.5, -0.25)
TEMPERATURES = (1.0, 1.0, 0.5, 2.0)


def reference(problem: Problem, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In float32, which is exact here."""
    found = beam_decode(
        student_of(problem, torch.float32),
        context,
        trie_of(problem),
        problem.k,
        problem.settings.num_beams,
        problem.exclude,
        **options_of(problem),
    )
    return tuple(getattr(found, field.name) for field in dataclasses.fields(found))


def kernel(
    problem: Problem,
    context: torch.Tensor,
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    plan = problem.plan(backend, dtype, device=device, **options)
    return plan.beam_decode(context.to(device), *exclude_tensors(problem.exclude, device))


@st.composite
def grid_problems(draw: st.DrawFn) -> tuple[Problem, torch.Tensor]:
    """Any catalogue of 1..60 or 1,000 items on 1..8 levels, any settings.

    A thousand is enough for a selector to fill up and cut in the middle of a level.
    """
    levels = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 12), min_size=levels, max_size=levels))
    items = draw(st.one_of(st.integers(1, 60), st.just(1000)))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, c, (items,), generator=generator) for c in sizes], 1)
    num_beams = draw(st.sampled_from((1, 2, 3, 5, 8, 13, 70)))
    settings = DecodeSpec(
        temperatures=tuple(draw(st.sampled_from(TEMPERATURES)) for _ in sizes),
        level_weights=tuple(draw(st.sampled_from(LEVEL_WEIGHTS)) for _ in sizes),
        num_beams=num_beams,
        normalisation=draw(st.sampled_from(("children", "codebook"))),
    )
    excluded = st.lists(st.integers(0, items + 3), max_size=60)
    return make_grid_problem(
        codes,
        sizes,
        settings=settings,
        k=draw(st.integers(1, num_beams)),
        seed=seed,
        blocks_per_head=draw(st.integers(1, 2)),
        available=torch.rand(items, generator=generator) < draw(st.sampled_from((1.0, 0.6))),
        exclude=[draw(excluded) for _ in range(3)],
        multiples=draw(st.sampled_from(MULTIPLES)),
    )


def test_any_catalogue_and_settings(backend: str, device: torch.device) -> None:
    # Triton compiles for each combination of sizes, seconds each.
    examples = 10 if backend == "triton" else 150

    @hypothesis.settings(max_examples=examples, deadline=None)
    @hypothesis.given(made=grid_problems(), data=st.data())
    def check(made: tuple[Problem, torch.Tensor], data: st.DataObject) -> None:
        problem, context = made
        levels = problem.spec.num_levels
        dense = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
        dtype = data.draw(st.sampled_from(list(DTYPES)))
        wanted = reference(problem, context)
        steps = wanted[1][wanted[1].isfinite()] * 8  # 64 / temperature 2 * weight 0.25
        assert torch.equal(steps, steps.round()), "the reference's scores are not exact"
        got = kernel(problem, context, backend, device, DTYPES[dtype], dense=dense)
        assert_results_equal(
            got, wanted, where=f"{backend} {dtype}, dense {dense}; {problem}", wanted_is="reference"
        )

    check()


def full_tree(sizes: tuple[int, ...], repeats: int = 1) -> torch.Tensor:
    """Every combination of codes, `repeats` items on each."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(repeats, 1)


def with_settings(levels: int, **changes: Any) -> DecodeSpec:
    return dataclasses.replace(DecodeSpec.for_levels(levels), **changes)


@pytest.mark.parametrize(
    ("num_beams", "normalisation"),
    sanitized(
        itertools.product([1, 7, 50, 512, 1000], ["children", "codebook"]),
        [(7, "children"), (50, "codebook"), (1000, "children")],
    ),
)
def test_full_tree(backend: str, device: torch.device, num_beams: int, normalisation: str) -> None:
    """Beams that cut through runs of hundreds of equal scores, and more beams than leaves."""
    settings = with_settings(3, num_beams=num_beams, normalisation=normalisation)
    codes = full_tree((8, 9, 8), repeats=2)
    problem, context = make_grid_problem(codes, (8, 9, 8), settings=settings, k=num_beams, batch=5)
    require_sizes(backend, problem)
    wanted = reference(problem, context)
    scores = wanted[1]
    if num_beams >= 50:
        assert int((scores[:, 1:] == scores[:, :-1]).sum()) > 5 * num_beams // 2, "ties are rare"
    assert_results_equal(kernel(problem, context, backend, device), wanted, where=problem)


@pytest.mark.parametrize(("multiples", "dtype"), [(MULTIPLES[0], "fp32"), (MULTIPLES[1], "bf16")])
@pytest.mark.parametrize("signs", ["+-+", "++-", "---", "-+-", "0-+"])
@pytest.mark.parametrize("num_beams", [3, 20, 60])
def test_negative_weights_switch_the_bound_off(
    backend: str,
    device: torch.device,
    num_beams: int,
    signs: str,
    multiples: tuple[int, int],
    dtype: str,
) -> None:
    """A child may score above its parent then: no beam may be left out early."""
    weights = tuple({"+": 1.0, "-": -1.0, "0": 0.0}[sign] for sign in signs)
    settings = with_settings(3, num_beams=num_beams, level_weights=weights)
    codes = full_tree((30, 31, 9))
    problem, context = make_grid_problem(
        codes, (30, 31, 9), settings=settings, k=num_beams, batch=5, multiples=multiples
    )
    got = kernel(problem, context, backend, device, DTYPES[dtype])
    assert_results_equal(got, reference(problem, context), where=f"{signs}; {problem}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_instruction_set(isa: str, dtype: str) -> None:
    require_isa(isa)
    settings = with_settings(4, num_beams=40, level_weights=(1.0, -1.0, 0.5, 1.0))
    codes = full_tree((5, 4, 6, 7))[::3]
    problem, context = make_grid_problem(
        codes, (5, 4, 6, 7), settings=settings, k=40, batch=20, blocks_per_head=2
    )
    got = kernel(problem, context, "cpu", torch.device("cpu"), DTYPES[dtype], isa=isa)
    assert_results_equal(got, reference(problem, context), where=f"{isa} {dtype}; {problem}")


@pytest.mark.parametrize("normalisation", ["children", "codebook"])
def test_everything_ties(backend: str, device: torch.device, normalisation: str) -> None:
    """Level weights of 0: parents in rank order, then codes, so leaves in lexicographic order."""
    settings = with_settings(3, num_beams=30, level_weights=(0.0,) * 3, normalisation=normalisation)
    codes = full_tree((4, 5, 3))
    shuffled = codes[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    problem, context = make_grid_problem(shuffled, (4, 5, 3), settings=settings, k=30)
    results = kernel(problem, context, backend, device)
    items, scores, found, counts = (tensor.cpu() for tensor in results)
    assert counts.tolist() == [30] * 3
    assert not scores.any()
    assert not scores.signbit().any(), "-0 must count, and come out, as +0"
    for row in found:
        assert torch.equal(row, codes[:30].int())
    assert torch.equal(shuffled[items[0]], codes[:30])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 20, 300])
@pytest.mark.parametrize("num_beams", [50, 100, 300, 512])
@pytest.mark.parametrize("dense", [False, True])
def test_more_equal_scores_than_a_selector_has_room_for(
    backend: str, device: torch.device, dense: bool, num_beams: int, batch: int, dtype: str
) -> None:
    """Thousands of candidates of a level tie, so no histogram of scores parts them, and their keys
    overflow what a kernel keeps at once."""
    sizes = (32, 32, 32)
    if backend == "triton" and (batch != 20 or num_beams != 50):
        pytest.skip("compiles for seconds, and has one way for all batches")
    settings = with_settings(3, num_beams=num_beams, level_weights=(0.0,) * 3)
    codes = full_tree(sizes)
    problem, context = make_grid_problem(
        codes, sizes, settings=settings, k=num_beams, batch=batch, multiples=(16, 32)
    )
    require_sizes(backend, problem, DTYPES[dtype])
    results = kernel(problem, context, backend, device, DTYPES[dtype], dense=[True, dense, dense])
    found, counts = results[2].cpu(), results[3].cpu()
    assert counts.tolist() == [num_beams] * batch
    assert torch.equal(found, codes[:num_beams].int().expand_as(found))


def test_negative_zero_counts_as_zero(backend: str, device: torch.device) -> None:
    """0 times a negative weight is -0: it must not come out, nor rank below a sum that is +0."""
    settings = with_settings(2, num_beams=12, level_weights=(-1.0, 1.0))
    problem, context = make_grid_problem(full_tree((6, 6)), (6, 6), settings=settings, k=12)
    got = kernel(problem, context, backend, device)
    assert_results_equal(got, reference(problem, context), where=problem)
    settings = with_settings(2, num_beams=12, level_weights=(-0.0, -0.0))
    problem, context = make_grid_problem(full_tree((6, 6)), (6, 6), settings=settings, k=12)
    got = kernel(problem, context, backend, device)
    assert not got[1].signbit().any()
    assert_results_equal(got, reference(problem, context), where=problem)


def test_a_wide_level_ties_by_code(backend: str, device: torch.device) -> None:
    """One beam with thousands of children: weight 0 keeps the lowest codes, in order."""
    codes = torch.arange(8192)[:, None].flip(0)
    settings = with_settings(1, num_beams=600, level_weights=(0.0,))
    problem, context = make_grid_problem(codes, (8192,), settings=settings, k=600)
    require_sizes(backend, problem)
    found = kernel(problem, context, backend, device)[2]
    assert found[0, :, 0].tolist() == list(range(600))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_give_the_same_bits(backend: str, device: torch.device, dtype: str) -> None:
    settings = with_settings(3, num_beams=100)
    problem, context = make_grid_problem(
        full_tree((8, 9, 8)), (8, 9, 8), settings=settings, k=100, batch=17
    )
    first = kernel(problem, context, backend, device, DTYPES[dtype])
    for run in range(5):
        again = kernel(problem, context, backend, device, DTYPES[dtype])
        assert_results_equal(again, first, where=f"run {run}", wanted_is="the first run")


def test_grid_logits_are_exact() -> None:
    """What the whole file rests on: float32 logits are multiples of 64, distinct per prefix."""
    codes = full_tree((8, 9, 8))
    problem, context = make_grid_problem(
        codes, (8, 9, 8), settings=with_settings(3), k=10, blocks_per_head=2
    )
    student = student_of(problem, torch.float32)
    prefix = codes[::7]
    for level, size in enumerate((8, 9, 8)):
        rows = student.logits(level, context[:1], prefix)
        assert torch.equal(rows / 64 * 2, (rows / 64 * 2).round())
        assert bool((rows.sort().values.diff(dim=1) >= 64).all())
        assert rows.shape[1] == size
        if level:
            assert len(rows.argmax(1).unique()) > 1, "earlier codes must matter"
    assert math.exp(-32) < torch.finfo(torch.float32).eps / 2
