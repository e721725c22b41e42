"""A request's result has the same bits whatever else is in the batch, wherever it stands, and
however many threads run, in parallel calls too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import DTYPES, ISAS, require_isa

from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

BATCHES = (*range(1, 41), 256)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads as it was, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(plan: DecodePlan, problem: Problem) -> tuple[torch.Tensor, ...]:
    device = plan.packed.device
    excluded = exclude_tensors(problem.exclude, device)
    return plan.decode_states(problem.states.to(device), problem.mask.to(device), *excluded)


def make(form: str = "factored", batch: int = 256) -> Problem:
    """Small, yet with every stage at work: both attention forms, dense and sparse levels, ties."""
    return make_problem(
        (17, 6, 5),
        seed=11,
        dim=40,
        attention_dim=24 if form == "factored" else 160,
        hidden_dim=50,
        blocks_per_head=2,
        num_items=300,
        batch=batch,
        tokens=9,
        num_beams=20,
        excluded=10,
        unavailable=0.1,
    )


@pytest.mark.parametrize("form", ["factored", "products"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size_gives_the_same_bits(
    backend: str, device: torch.device, dtype: str, form: str
) -> None:
    problem = make(form)
    plan = problem.plan(backend, DTYPES[dtype], device=device)
    whole = run(plan, problem)
    for size in BATCHES:
        rows = [(7 * size + 3 * i) % problem.batch for i in range(size)]
        part = run(plan, problem.rows(rows))
        wanted = [tensor[rows] for tensor in whole]
        assert_results_equal(part, wanted, where=f"batch {size}", wanted_is="those in 256")


def test_wide_students(backend: str, device: torch.device) -> None:
    """Widths of several column tiles, and batches around the block of 16 requests."""
    sizes = {"dim": 128, "attention_dim": 384, "ffn_dim": 1024, "hidden_dim": 512}
    problem = make_problem((256, 40, 30), seed=4, num_items=2000, batch=35, **sizes)
    plan = problem.plan(backend, device=device)
    whole = run(plan, problem)
    for size in (1, 2, 3, 5, 8, 13, 16, 17, 32):
        part = run(plan, problem.rows(range(size)))
        wanted = [tensor[:size] for tensor in whole]
        assert_results_equal(part, wanted, where=f"batch {size}", wanted_is="those in 35")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_instruction_set(dtype: str, isa: str) -> None:
    require_isa(isa)
    problem = make(batch=40)
    plan = problem.plan("cpu", DTYPES[dtype], isa=isa)
    whole = run(plan, problem)
    for size in (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 33):
        part = run(plan, problem.rows(range(size)))
        wanted = [tensor[:size] for tensor in whole]
        assert_results_equal(part, wanted, where=f"batch {size}", wanted_is="those in 40")


def test_positions_do_not_matter(backend: str, device: torch.device) -> None:
    problem = make(batch=37)
    plan = problem.plan(backend, device=device)
    whole = run(plan, problem)
    for seed in range(4):
        order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
        shuffled = run(plan, problem.rows(order))
        wanted = [tensor[order] for tensor in whole]
        assert_results_equal(shuffled, wanted, where=f"shuffle {seed}", wanted_is="unshuffled")


def test_a_neighbour_that_is_not_finite_changes_nothing(backend: str, device: torch.device) -> None:
    problem = make(batch=37).rows(range(1, 37))
    plan = problem.plan(backend, device=device)
    whole = run(plan, problem)
    for value, bad in itertools.product((torch.nan, torch.inf), (0, 5, 35)):
        states, mask = problem.states.clone(), problem.mask.clone()
        states[bad] = 0
        states[bad, 0, 3], mask[bad, 0] = value, True
        result = run(plan, problem.replace(states=states, mask=mask))
        assert int(result[3][bad]) == 0
        others = [b for b in range(36) if b != bad]
        assert_results_equal(
            [tensor[others] for tensor in result],
            [tensor[others] for tensor in whole],
            where=f"{value} in request {bad}",
            wanted_is="those without it",
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_counts_do_not_matter(dtype: str) -> None:
    problem = make(batch=70)
    plan = problem.plan("cpu", DTYPES[dtype])
    torch.set_num_threads(1)
    alone = {size: run(plan, problem.rows(range(size))) for size in (1, 2, 5, 16, 33, 70)}
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for size, wanted in alone.items():
            got = run(plan, problem.rows(range(size)))
            where = f"{count} threads, batch {size}"
            assert_results_equal(got, wanted, where=where, wanted_is="one thread's")


def test_parallel_calls_give_the_same_bits(backend: str, device: torch.device) -> None:
    """Threads that decode with plans of different sizes at once share no scratch."""
    problems = [
        make(batch=9),
        make("products", batch=20),
        make_problem((4,) * 5, seed=2, num_items=200, batch=5, tokens=30, num_beams=64),
        make_problem((900, 3), seed=3, batch=3, hidden_dim=200, num_beams=7),
    ]
    plans = [
        problem.plan(backend, dtype, device=device)
        for problem, dtype in zip(problems, [*DTYPES.values(), torch.float32], strict=True)
    ]
    wanted = [run(plan, problem) for plan, problem in zip(plans, problems, strict=True)]

    def work(thread: int) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        order = [(thread + turn) % len(plans) for turn in range(12)]
        return [(n, run(plans[n], problems[n])) for n in order]

    with ThreadPoolExecutor(max_workers=8) as pool:
        for results in pool.map(work, range(8)):
            for n, result in results:
                where = f"plan {n}"
                assert_results_equal(result, wanted[n], where=where, wanted_is="sequential")
