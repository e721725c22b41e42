"""Random sizes, settings and batches, each from a seed that a failure names.

A thousand on "cuda", sixty on the CPU; triton compiles every new shape for seconds and has the
sizes of test_kernel_parity.py. Sizes are drawn so that most problems are small and every width,
number of codes and number of beams comes up, though not the largest of all at once.

Every request must keep the rules of a result. A GPU's float32 answer must agree with the CPU's;
requests that do not, for a near tie say, and otherwise a few of every batch are judged by the
float64 bounds of the packed weights (tier 3). eps: as in test_kernel_parity.py, from ordinary
PyTorch in the dtype of the backend's activations, over 16 requests of the same kind, since the
largest error of few numbers is a matter of luck.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from parity import assert_within_bounds, decode, score_errors
from torch import Tensor

from sidmlp.beam import Decoded
from sidmlp_kernels.testing import (
    PackedModel,
    Problem,
    assert_results_equal,
    exclude_tensors,
    make_problem,
)

TOLERANCE = 1e-4  # far above float32 rounding of these scores, far below most gaps between them
EPS_REQUESTS = 16
JUDGED = 2  # requests of a batch that the bounds judge
DEAREST = 27e6  # multiply-adds of one request's logits

# Around the 8 and 16 rows of tiles.
BATCHES = (*range(4), 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 70)


@dataclass(frozen=True)
class Draw:
    """One random call: `problem` has the requests, `pool` EPS_REQUESTS more of the same kind."""

    problem: Problem
    pool: Problem
    dtype: torch.dtype
    states_dtype: torch.dtype
    dense: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{self.dtype}, states {self.states_dtype}, dense {self.dense}; {self.problem}"

    def states(self, problem: Problem) -> Tensor:
        return problem.states.to(self.states_dtype)


def draw(seed: int) -> Draw:
    """The problem of a seed."""
    rng = random.Random(seed)

    def spread(low: int, high: int) -> int:
        """Small numbers as often as large ones."""
        return min(high, int(low * (high / low) ** rng.random() + rng.random()))

    while True:
        levels = rng.randint(1, 5)
        codes = tuple(spread(2, 300) for _ in range(levels))
        hidden = 32 * spread(1, 24) if rng.random() < 0.8 else rng.randint(9, 300)
        beams = spread(1, 128)
        if beams * hidden * max(codes) * levels <= DEAREST:
            break
    heads = rng.choice((1, 2, 4, 8))
    batch = rng.choice(BATCHES)
    tuned = rng.random() < 0.3
    pool = make_problem(
        codes,
        seed=seed,
        dim=8 * spread(2, 32),
        attention_dim=heads * rng.randint(1, 48),
        num_heads=heads,
        ffn_dim=rng.randint(8, 300),
        hidden_dim=hidden,
        blocks_per_head=rng.choice((1, 1, 1, 2, 3)),
        num_items=spread(1, 3000),
        batch=batch + EPS_REQUESTS,
        tokens=spread(1, 60),
        num_beams=beams,
        k=rng.choice((1, beams, rng.randint(1, beams))),
        normalisation=rng.choice(("children", "children", "codebook")),
        temperatures=[rng.choice((0.5, 1.0, 1.7)) for _ in codes] if tuned else None,
        level_weights=[rng.choice((1.0, -0.5, 0.0, 2.0)) for _ in codes] if tuned else None,
        unavailable=rng.choice((0.0, 0.0, 0.3, 0.9)),
        excluded=rng.choice((0, 0, 1, 20, 200)),
    )
    order = list(range(batch + EPS_REQUESTS))
    rng.shuffle(order)  # so that the request without a state is not always the first
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    return Draw(
        problem=pool.rows(order[:batch]),
        pool=pool.rows(order[batch:]),
        dtype=dtype,
        states_dtype=rng.choice((dtype, torch.float32)),
        dense=tuple(rng.random() < 0.5 for _ in codes),
    )


def assert_rules(result: Decoded, problem: Problem) -> None:
    """What holds for every result whatever its scores are."""
    ids = problem.item_ids.tolist()
    code_of = dict(zip(ids, problem.codes.tolist(), strict=True))
    stocked = {item for item, stock in zip(ids, problem.available.tolist(), strict=True) if stock}
    for row, excluded in enumerate(problem.exclude):
        count = int(result.counts[row])
        assert 0 <= count <= problem.k, f"request {row}: count {count}"
        items, codes = result.items[row].tolist(), result.codes[row].tolist()
        found = items[:count]
        assert len(set(found)) == count, f"request {row}: an item twice"
        assert stocked - set(excluded) >= set(found), f"request {row}: items that are barred"
        assert codes[:count] == [code_of[item] for item in found], f"request {row}: codes"
        assert set(items[count:]) <= {-1}, f"request {row}: items past the count"
        assert bool((result.codes[row, count:] == -1).all()), f"request {row}: codes past the count"
        scores = result.scores[row]
        assert bool(scores[:count].isfinite().all()), f"request {row}: scores"
        assert bool((scores[:count].diff() <= 0).all()), f"request {row}: scores do not descend"
        assert bool((scores[count:] == -torch.inf).all()), f"request {row}: scores past the count"


def disagreeing(got: Decoded, wanted: Decoded) -> list[int]:
    """Requests whose counts or scores differ, or whose items do where scores are far apart."""
    real = wanted.scores.isfinite()
    gap = torch.where(real, got.scores - wanted.scores, 0.0).abs()
    bad = (got.counts != wanted.counts) | ~(gap.amax(1) <= TOLERANCE)
    far = real.clone()
    far[:, -1] = False  # it may be tied with the first that was cut
    if far.shape[1] > 1:
        step = wanted.scores[:, :-1] - wanted.scores[:, 1:] > 2 * TOLERANCE
        far[:, :-1] &= step
        far[:, 1:] &= step
    bad |= (far & (got.items != wanted.items)).any(1)
    return bad.nonzero().flatten().tolist()


def check(seed: int, backend: str, device: torch.device) -> None:
    drawn = draw(seed)
    problem = drawn.problem
    states = drawn.states(problem)
    plan = problem.plan(backend, drawn.dtype, device=device, dense=drawn.dense)
    result = decode(plan, problem, states)
    assert result.items.shape == (problem.batch, problem.k)
    assert_rules(result, problem)
    if not problem.batch:
        return
    rows = sorted(random.Random(seed).sample(range(problem.batch), min(JUDGED, problem.batch)))
    if backend != "cpu" and drawn.dtype == torch.float32:
        rows = disagreeing(result, decode(problem.plan("cpu"), problem, states))
    if not rows:
        return
    part = problem.rows(rows)
    own = Decoded(result.items[rows], result.scores[rows], result.codes[rows], result.counts[rows])
    activations = torch.float32 if backend == "cpu" else drawn.dtype
    eps = score_errors(drawn.pool, activations, drawn.states(drawn.pool))
    exact = PackedModel(problem.packed(drawn.dtype))
    assert_within_bounds(own, part, eps, where=f"rows {rows}", states=states[rows], exact=exact)


def check_invariance(seed: int, backend: str, device: torch.device) -> None:
    drawn = draw(seed)
    problem = drawn.problem
    plan = problem.plan(backend, drawn.dtype, device=device, dense=drawn.dense)

    def run(rows: list[int]) -> tuple[Tensor, ...]:
        part = problem.rows(rows)
        excluded = exclude_tensors(part.exclude, device)
        states, mask = drawn.states(part).to(device), part.mask.to(device)
        return tuple(tensor.cpu() for tensor in plan.decode_states(states, mask, *excluded))

    everyone = list(range(problem.batch))
    whole = run(everyone)
    assert_results_equal(run(everyone), whole, where="again", wanted_is="the first run's")
    order = random.Random(seed).sample(everyone, len(everyone))
    wanted = [tensor[order] for tensor in whole]
    assert_results_equal(run(order), wanted, where=f"order {order}", wanted_is="unshuffled")
    for row in everyone:
        wanted = [tensor[row : row + 1] for tensor in whole]
        assert_results_equal(run([row]), wanted, where=f"row {row} alone", wanted_is="the batch's")


def groups(cuda: int, cpu: int, size: int) -> list[object]:
    """(backend, seeds), so many seeds of each backend, `size` a test (a fifth on the CPU)."""
    return [
        pytest.param(backend, range(first, first + step), id=f"{backend}-{first}")
        for backend, total, step in (("cuda", cuda, size), ("cpu", cpu, size // 5))
        for first in range(0, total, step)
    ]


def run_seeds(function: object, seeds: range, backend: str, device: torch.device) -> None:
    for seed in seeds:
        try:
            function(seed, backend, device)  # type: ignore[operator]
        except Exception as error:
            raise AssertionError(f"seed {seed}, {backend}: {draw(seed)}\n{error}") from error


@pytest.mark.parametrize(("backend", "seeds"), groups(1000, 60, 100), indirect=["backend"])
def test_decodes(backend: str, device: torch.device, seeds: range) -> None:
    run_seeds(check, seeds, backend, device)


@pytest.mark.parametrize(("backend", "seeds"), groups(40, 8, 20), indirect=["backend"])
def test_a_request_has_the_same_bits_in_any_batch(
    backend: str, device: torch.device, seeds: range
) -> None:
    run_seeds(check_invariance, seeds, backend, device)
