"""Edge semantics of the decode: empty, tiny, colliding, barred, non-finite."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from parity import (
    assert_within_bounds,
    decode,
    reference_decode,
    require_sizes,
    sanitized,
    score_errors,
)

from sidmlp_kernels import Recommendations, Recommender
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import (
    Problem,
    assert_results_equal,
    exclude_tensors,
    make_codes,
    make_problem,
)

FLOAT32_MAX = torch.finfo(torch.float32).max


def run(problem: Problem, plan: DecodePlan) -> tuple[torch.Tensor, ...]:
    """items, scores, codes, counts."""
    device = plan.packed.device
    excluded = exclude_tensors(problem.exclude, device)
    return plan.decode_states(problem.states.to(device), problem.mask.to(device), *excluded)


def assert_empty(results: tuple[torch.Tensor, ...], request: int) -> None:
    items, scores, codes, counts = (tensor[request] for tensor in results)
    assert int(counts) == 0
    assert bool((items == -1).all())
    assert bool((scores == -math.inf).all())
    assert bool((codes == -1).all())


@pytest.mark.parametrize("batch", sanitized([0, 1, 37, 256], [0, 1, 37]))
def test_batches(backend: str, device: torch.device, batch: int) -> None:
    problem = make_problem((12, 9, 5), seed=batch, dim=32, hidden_dim=48, batch=batch, excluded=4)
    items, scores, codes, counts = run(problem, problem.plan(backend, device=device))
    assert items.shape == scores.shape == (batch, 10)
    assert codes.shape == (batch, 10, 3)
    assert counts.shape == (batch,)
    kinds = [tensor.dtype for tensor in (items, scores, codes, counts)]
    assert kinds == [torch.int64, torch.float32, torch.int32, torch.int32]
    if batch:
        eps = score_errors(problem, torch.float32, problem.states)
        result = decode(problem.plan(backend, device=device), problem)
        assert_within_bounds(result, problem, eps, where=f"batch {batch}, {backend}")


@pytest.mark.parametrize("tokens", sanitized([0, 1, 12], [0, 12]))
def test_a_history_without_any_valid_state_gets_an_answer(
    backend: str, device: torch.device, tokens: int
) -> None:
    problem = make_problem(seed=1, batch=3)
    nothing = problem.replace(
        states=torch.full((3, tokens, 64), math.nan), mask=torch.zeros(3, tokens, dtype=torch.bool)
    )
    result = decode(problem.plan(backend, device=device), nothing)
    one = nothing.replace(states=torch.zeros(3, 1, 64), mask=torch.zeros(3, 1, dtype=torch.bool))
    wanted = reference_decode(one)
    assert torch.equal(result.items, wanted.items)
    assert result.counts.tolist() == [10] * 3
    torch.testing.assert_close(result.scores.double(), wanted.scores, rtol=0, atol=1e-4)


def test_masked_states_are_never_read(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=2, batch=9)
    plan = problem.plan(backend, device=device)
    wanted = run(problem, plan)
    assert bool(problem.states.isnan().any())
    for garbage in (0.0, 1.0, math.inf, FLOAT32_MAX):
        states = torch.where(problem.mask[..., None], problem.states, garbage)
        got = run(problem.replace(states=states), plan)
        assert_results_equal(got, wanted, where=f"{garbage} in masked states", wanted_is="NaN's")


@pytest.mark.sanitize
def test_a_catalogue_of_one_item(backend: str, device: torch.device) -> None:
    problem = make_problem((5, 3, 4), codes=torch.tensor([[4, 0, 2]]), num_beams=7)
    items, scores, codes, counts = run(problem, problem.plan(backend, device=device))
    assert counts.tolist() == [1] * 4
    assert items.tolist() == [[int(problem.item_ids[0])] + [-1] * 6] * 4
    assert codes[:, 0].tolist() == [[4, 0, 2]] * 4
    assert bool((codes[:, 1:] == -1).all())
    wanted = reference_decode(problem)
    torch.testing.assert_close(scores.cpu().double(), wanted.scores, rtol=0, atol=1e-4)


@pytest.mark.sanitize
def test_items_that_share_codes_come_in_catalogue_order(backend: str, device: torch.device) -> None:
    distinct = torch.tensor([[0, 1], [2, 2], [0, 2]])
    codes = distinct[torch.arange(60) % 3]
    problem = make_problem((3, 3), codes=codes, num_beams=50, unavailable=0.2, seed=3)
    items, scores, found, counts = run(problem, problem.plan(backend, device=device))
    positions = {int(item): n for n, item in enumerate(problem.item_ids)}
    stock = int(problem.available.sum())
    assert counts.tolist() == [min(50, stock)] * 4
    for row in range(4):
        count = int(counts[row])
        for leaf in distinct.tolist():
            own = [r for r in range(count) if found[row, r].tolist() == leaf]
            ranks = [positions[int(items[row, r])] for r in own]
            assert own == list(range(own[0], own[-1] + 1)), "a leaf's items stand together"
            assert ranks == sorted(ranks)
            assert len({float(scores[row, r]) for r in own}) == 1


@pytest.mark.sanitize
def test_k_cuts_within_a_leaf(backend: str, device: torch.device) -> None:
    codes = torch.zeros(9, 2, dtype=torch.int64)
    problem = make_problem((2, 2), codes=codes, num_beams=5, k=4)
    items, _, _, counts = run(problem, problem.plan(backend, device=device))
    assert counts.tolist() == [4] * 4
    assert items.tolist() == [problem.item_ids[:4].tolist()] * 4


class TestNonFinite:
    @pytest.mark.parametrize("value", sanitized([math.nan, math.inf, -math.inf], [math.nan]))
    def test_valid_states(self, backend: str, device: torch.device, value: float) -> None:
        problem = make_problem(seed=4, batch=6, full_histories=True)
        plan = problem.plan(backend, device=device)
        wanted = run(problem, plan)
        states = problem.states.clone()
        states[2, 5, 63] = value
        got = run(problem.replace(states=states), plan)
        assert_empty(got, 2)
        others = [0, 1, 3, 4, 5]
        assert_results_equal(
            [t[others] for t in got], [t[others] for t in wanted], where=f"{value} in request 2"
        )

    def test_states_that_overflow(self, backend: str, device: torch.device) -> None:
        problem = make_problem(seed=4, batch=2, full_histories=True)
        states = problem.states.clone()
        states[0] = FLOAT32_MAX
        assert_empty(run(problem.replace(states=states), problem.plan(backend, device=device)), 0)

    @pytest.mark.parametrize("value", sanitized([math.nan, math.inf], [math.inf]))
    def test_contexts(self, backend: str, device: torch.device, value: float) -> None:
        problem = make_problem(seed=4)
        plan = problem.plan(backend, device=device)
        context = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(device)
        wanted = plan.beam_decode(context)
        context[3, 17] = value
        got = plan.beam_decode(context)
        assert_empty(got, 3)
        others = [0, 1, 2, 4]
        assert_results_equal([t[others] for t in got], [t[others] for t in wanted], where=value)

    @pytest.mark.parametrize("level", [0, 1, 2])
    @pytest.mark.parametrize("dense", [False, True])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_logits(
        self, backend: str, device: torch.device, level: int, dense: bool, sign: int
    ) -> None:
        """One row of an output layer overflows: whoever's softmax reads it has no answer."""
        codes = make_codes((4, 5, 6), 400, torch.Generator().manual_seed(0))
        problem = make_problem((4, 5, 6), codes=codes, num_beams=200, seed=5, batch=9)
        weights = dict(problem.weights)
        name = f"heads.{level}.output.weight"
        weights[name] = weights[name].clone()
        weights[name][0] = sign * FLOAT32_MAX
        broken = problem.replace(weights=weights)
        plan = broken.plan(backend, device=device, dense=[dense] * 3)
        results = run(broken, plan)
        for request in range(9):
            assert_empty(results, request)
        assert not reference_decode(broken, torch.float32).counts.any()

    def test_logits_of_other_codes_are_never_read(self, backend: str, device: torch.device) -> None:
        """In "children" mode a code that continues no item, and an only child, need no logit."""
        codes = torch.tensor([[0, 0], [0, 1], [1, 2]])
        problem = make_problem((2, 4), codes=codes, num_beams=3, seed=6)
        weights = dict(problem.weights)
        weights["heads.1.output.weight"] = weights["heads.1.output.weight"].clone()
        weights["heads.1.output.weight"][2:] = FLOAT32_MAX  # 2: an only child; 3: of no item
        for dense in (False, True):
            flags = [True, dense]
            broken = problem.replace(weights=weights)
            got = run(problem, broken.plan(backend, device=device, dense=flags))
            wanted = run(problem, problem.plan(backend, device=device, dense=flags))
            assert_results_equal(got, wanted, where=f"dense {dense}")

    def test_a_nan_inside_the_readout(self, backend: str, device: torch.device) -> None:
        """Products that overflow both ways make a NaN before the ReLU, which must not hide it."""
        problem = make_problem(dim=80, seed=5)
        weights = dict(problem.weights)
        ffn = torch.zeros_like(weights["readout.ffn_in.weight"])
        ffn[:, 0], ffn[:, 64] = FLOAT32_MAX, -FLOAT32_MAX
        weights["readout.ffn_in.weight"] = ffn
        gain = torch.zeros_like(weights["readout.norm1.weight"])
        weights["readout.norm1.weight"] = gain
        weights["readout.norm1.bias"] = torch.full_like(gain, 2.0)  # inf - inf in every unit
        results = run(problem, problem.replace(weights=weights).plan(backend, device=device))
        for request in range(problem.batch):
            assert_empty(results, request)

    def test_scores_that_overflow(self, backend: str, device: torch.device) -> None:
        """A score that float32 cannot hold is no answer: never a result with score -inf."""
        problem = make_problem(seed=7, level_weights=(3e38, 1.0, 1.0))
        results = run(problem, problem.plan(backend, device=device))
        for request in range(problem.batch):
            assert_empty(results, request)


class TestBarredItems:
    def test_scores_do_not_change(self, backend: str, device: torch.device) -> None:
        """Whatever is barred, the others keep the bits of their scores."""
        problem = make_problem((6, 5, 4), num_items=90, num_beams=200, seed=8)
        free = run(problem, problem.plan(backend, device=device))
        barred = make_problem(
            (6, 5, 4), num_items=90, num_beams=200, seed=8, excluded=40, unavailable=0.3
        )
        barred = problem.replace(available=barred.available, exclude=barred.exclude)
        got = run(barred, barred.plan(backend, device=device))
        out = {int(item) for item in problem.item_ids[~barred.available]}
        assert out
        for row in range(4):
            hidden = out | set(barred.exclude[row])
            pairs = zip(free[0][row].tolist(), free[1][row].tolist(), strict=True)
            wanted = [pair for pair in pairs if pair[0] >= 0 and pair[0] not in hidden]
            count = int(got[3][row])
            found = zip(got[0][row, :count].tolist(), got[1][row, :count].tolist(), strict=True)
            assert list(found) == wanted

    def test_a_barred_leaf_is_no_candidate(self, backend: str, device: torch.device) -> None:
        """The cut at the last level holds num_beams leaves that may be recommended."""
        codes = torch.cartesian_prod(*map(torch.arange, (6, 5, 4)))
        problem = make_problem((6, 5, 4), codes=codes, num_beams=8, seed=9)
        best = reference_decode(problem).items[:, :5]
        hidden = problem.replace(exclude=tuple(tuple(row) for row in best.tolist()))
        result = decode(problem.plan(backend, device=device), hidden)
        assert result.counts.tolist() == [8] * 4
        eps = score_errors(hidden, torch.float32, hidden.states)
        assert_within_bounds(result, hidden, eps, where=f"five best excluded, {backend}")

    @pytest.mark.sanitize
    def test_excluding_everything(self, backend: str, device: torch.device) -> None:
        problem = make_problem(seed=10)
        everything = tuple(problem.item_ids.tolist())
        only_two = problem.replace(exclude=((), everything, (), everything))
        results = run(only_two, problem.plan(backend, device=device))
        assert_empty(results, 1)
        assert_empty(results, 3)
        assert results[3].tolist() == [10, 0, 10, 0]

    def test_nothing_in_stock(self, backend: str, device: torch.device) -> None:
        problem = make_problem(seed=10)
        sold_out = problem.replace(available=torch.zeros(500, dtype=torch.bool))
        results = run(sold_out, sold_out.plan(backend, device=device))
        for request in range(4):
            assert_empty(results, request)

    def test_repeated_and_unknown_ids(self, backend: str, device: torch.device) -> None:
        problem = make_problem(seed=11)
        best = reference_decode(problem).items[:, 0].tolist()
        once = problem.replace(exclude=tuple((item,) for item in best))
        often = problem.replace(
            exclude=tuple((item, 0, item, item, 2**62, -(2**62), 5) for item in best)
        )
        plan = problem.plan(backend, device=device)
        got, wanted = run(often, plan), run(once, plan)
        assert_results_equal(got, wanted, where="repeated and unknown ids", wanted_is="each once")
        for row, item in enumerate(best):
            assert item not in wanted[0][row].tolist()


@pytest.mark.parametrize("num_beams", [61, 512, 60_000])
def test_more_beams_than_leaves(backend: str, device: torch.device, num_beams: int) -> None:
    codes = torch.cartesian_prod(*map(torch.arange, (3, 4, 5)))
    problem = make_problem((3, 4, 5), codes=codes, num_beams=num_beams, k=61, seed=12)
    require_sizes(backend, problem)
    result = decode(problem.plan(backend, device=device), problem)
    assert result.counts.tolist() == [60] * 4
    assert bool((result.items[:, 60] == -1).all())
    wanted = sorted(problem.item_ids.tolist())
    assert all(sorted(row) == wanted for row in result.items[:, :60].tolist())


class TestPublicApi:
    """The same semantics through Recommender, where inputs need not be contiguous."""

    def make(self, backend: str) -> tuple[Problem, Recommender]:
        problem = make_problem(seed=13, batch=6)
        return problem, Recommender(problem.student, problem.catalogue, backend=backend)

    def test_inputs_need_not_be_contiguous(self, backend: str, device: torch.device) -> None:
        problem, model = self.make(backend)
        states, mask = problem.states.to(device), problem.mask.to(device)
        wanted = model.decode_states(states, mask, k=10, num_beams=10)
        strided = states.transpose(0, 2).contiguous().transpose(0, 2)
        wide = torch.full((6, 24), True, device=device)
        wide[:, ::2] = mask
        assert not strided.is_contiguous()
        assert not wide[:, ::2].is_contiguous()
        got = model.decode_states(strided, wide[:, ::2], k=10, num_beams=10)
        assert_results_equal(_results(got), _results(wanted), where="strided states and mask")
        with_grad = states.clone().requires_grad_()
        got = model.decode_states(with_grad, mask, k=10, num_beams=10)
        assert_results_equal(_results(got), _results(wanted), where="states that need gradients")

    def test_exclusions_of_any_kind(self, backend: str, device: torch.device) -> None:
        problem, model = self.make(backend)
        states, mask = problem.states.to(device), problem.mask.to(device)
        free = model.decode_states(states, mask, k=5, num_beams=10)
        best = free.items[:, 0].tolist()
        ragged = [[best[0]], (), None, np.array([7, best[3], best[3]]), torch.tensor([best[4]]), []]
        got = model.decode_states(states, mask, k=5, num_beams=10, exclude=ragged)
        problem = problem.replace(
            exclude=((best[0],), (), (), (best[3], best[3], 7), (best[4],), ())
        )
        plan = dataclasses.replace(problem.plan(backend, device=device), k=5)
        assert_results_equal(_results(got), run(problem, plan), where="ragged exclusion")

    def test_parity(self, backend: str, device: torch.device) -> None:
        problem, model = self.make(backend)
        found = model.decode_states(
            problem.states.to(device), problem.mask.to(device), k=10, num_beams=10
        )
        eps = score_errors(problem, torch.float32, problem.states)
        assert_within_bounds(found, problem, eps, where=f"Recommender, {backend}")
        assert found.catalogue_version == problem.catalogue.version


def _results(found: Recommendations) -> tuple[torch.Tensor, ...]:
    return found.items, found.scores, found.codes, found.counts
