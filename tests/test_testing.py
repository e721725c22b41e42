"""The toolkit that judges kernels: it must catch what it is there to catch."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import skip_without_gpu

import sidmlp_kernels.testing
from sidmlp_kernels.testing import (
    Timing,
    assert_bounded,
    assert_results_equal,
    exclude_tensors,
    make_codes,
    make_problem,
    rounding_floor,
    time_interleaved,
)

EXACT = torch.tensor([[1.0, -2.0], [3.0, 0.1]], dtype=torch.float64)


def bounded(got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor = EXACT) -> None:
    assert_bounded(
        got, same_dtype, exact, dtype=torch.float32, what="context", where="here, seed 7"
    )


class TestBound:
    def test_the_floor_is_what_one_addition_costs(self) -> None:
        assert rounding_floor(EXACT, torch.float64) < 1e-15
        assert 0 < rounding_floor(EXACT, torch.float32) < 1e-6
        assert 1e-3 < rounding_floor(EXACT, torch.bfloat16) < 0.1
        assert rounding_floor(EXACT[:0], torch.bfloat16) == 0
        assert rounding_floor(EXACT * torch.inf, torch.bfloat16) == 0

    def test_twice_the_error_of_pytorch_passes(self) -> None:
        same = EXACT + 1e-4
        bounded(EXACT - 1.9e-4, same)
        with pytest.raises(AssertionError, match="exceeds"):
            bounded(EXACT - 2.1e-4, same)

    def test_the_message_names_everything(self) -> None:
        got = EXACT.clone()
        got[1, 0] += 0.5
        with pytest.raises(AssertionError) as caught:
            bounded(got, EXACT + 1e-3)
        message = str(caught.value)
        for part in ("context", "5.000e-01", "1.000e-03", "float32", "[2, 2]", "seed 7"):
            assert part in message
        assert "first at [1, 0]: got 3.5, wanted 3.0" in message

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_values_that_are_not_finite_must_match(self, value: float) -> None:
        broken = EXACT.clone()
        broken[0, 1] = value
        bounded(broken, broken, broken)
        for pair in ((broken, EXACT), (EXACT, broken)):
            with pytest.raises(AssertionError, match=r"finite on one side.*\[0, 1\]"):
                bounded(pair[0], EXACT, pair[1])

    def test_shapes_must_match(self) -> None:
        with pytest.raises(AssertionError, match="shapes"):
            bounded(EXACT[:1], EXACT)

    def test_nothing_to_compare(self) -> None:
        bounded(EXACT[:0], EXACT[:0], EXACT[:0])


class TestEquality:
    RESULT = (
        torch.tensor([[3, -1]]),
        torch.tensor([[0.0, -torch.inf]]),
        torch.tensor([[[1, 2], [-1, -1]]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
    )

    def test_equal_bits_pass(self) -> None:
        assert_results_equal(self.RESULT, [t.clone() for t in self.RESULT], where="here")

    @pytest.mark.parametrize("name", ["items", "scores", "codes", "counts"])
    def test_one_value_that_differs(self, name: str) -> None:
        other = [t.clone() for t in self.RESULT]
        other[["items", "scores", "codes", "counts"].index(name)].flatten()[0] += 1
        with pytest.raises(AssertionError, match=rf"{name}: 1 of .* first at \[0.*here"):
            assert_results_equal(other, self.RESULT, where="here")

    def test_the_sign_of_zero_is_a_bit(self) -> None:
        other = (self.RESULT[0], self.RESULT[1] * -1.0, *self.RESULT[2:])
        with pytest.raises(AssertionError, match="scores: 2 of 2"):
            assert_results_equal(other, self.RESULT, where="here")

    def test_dtypes_and_shapes(self) -> None:
        other = (self.RESULT[0], self.RESULT[1].double(), *self.RESULT[2:])
        with pytest.raises(AssertionError, match=r"scores: torch\.float64"):
            assert_results_equal(other, self.RESULT, where="here")


class TestProblems:
    def test_a_seed_is_a_problem(self) -> None:
        one, same, other = (make_problem(seed=seed, excluded=3) for seed in (4, 4, 5))
        assert torch.equal(one.codes, same.codes)
        assert one.exclude == same.exclude
        assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
        torch.testing.assert_close(one.states, same.states, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(one.codes, other.codes)

    def test_masked_states_are_poisoned_and_only_they(self) -> None:
        problem = make_problem(batch=20)
        assert torch.equal(problem.states.isnan().all(-1), ~problem.mask)
        lengths = problem.mask.sum(1)
        assert lengths[0] == 0
        assert lengths[1] == 12
        last = 11 - problem.mask.flip(1).long().argmax(1)
        assert bool((lengths < last + 1).any()), "masks have holes"

    def test_catalogues_have_collisions_and_only_children(self) -> None:
        problem = make_problem()
        statistics = problem.catalogue.statistics()
        assert 0 < statistics.items_sharing_codes < problem.catalogue.num_items
        assert 0 < statistics.levels[-1].only_child_share < 1
        codes = make_codes((3, 5), 100, torch.Generator().manual_seed(0))
        assert codes.max(0).values.tolist() == [2, 4]

    def test_rows(self) -> None:
        problem = make_problem(batch=5, excluded=2)
        some = problem.rows([4, 0])
        assert some.exclude == (problem.exclude[4], problem.exclude[0])
        assert torch.equal(some.mask, problem.mask[[4, 0]])

    def test_exclude_tensors(self) -> None:
        ids, offsets = exclude_tensors([[5, 1], None, [], [7, 7, 2]])
        assert ids.tolist() == [1, 5, 2, 7, 7]
        assert offsets.tolist() == [0, 2, 2, 2, 5]

    def test_dense_overrides_the_plans_choice(self) -> None:
        plan = make_problem().plan(dense=[True, False, True])
        assert [level.dense for level in plan.levels] == [True, False, True]


class TestTiming:
    def test_medians_and_tails(self) -> None:
        timing = Timing.of([float(n) for n in range(1, 101)])
        assert timing.median == 50.5
        assert timing.p99 == 100.0

    def test_variants_take_turns(self) -> None:
        calls: list[str] = []
        variants = {"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.002)}
        found = time_interleaved(variants, rounds=3, warmup=1)
        assert len(calls) == 4
        assert len(found["a"].samples) == 3
        assert found["b"].median >= 2000 > found["a"].median
        assert "median" in str(found["a"])

    def test_time_is_limited(self) -> None:
        slow = {"a": lambda: time.sleep(0.01)}
        found = time_interleaved(slow, rounds=10_000, warmup=0, max_seconds=0.02)
        assert len(found["a"].samples) < 10

    def test_nothing_to_time(self) -> None:
        with pytest.raises(ValueError, match=r"at least one variant.*got 0"):
            time_interleaved({})

    def test_device_time(self, cuda: torch.device) -> None:
        matrix = torch.randn(2048, 2048, device=cuda)
        found = time_interleaved({"product": lambda: matrix @ matrix}, device=cuda, rounds=5)
        assert found["product"].median > 10


def test_a_missing_gpu_is_a_skip_or_a_failure() -> None:
    for required, outcome in ((False, pytest.skip.Exception), (True, pytest.fail.Exception)):
        config = SimpleNamespace(getoption=lambda name, value=required: value)
        with pytest.raises(outcome, match="no device"):
            skip_without_gpu(config, "no device")  # type: ignore[arg-type]


def test_the_toolkit_does_not_know_the_reference() -> None:
    for file in Path(sidmlp_kernels.testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "sidmlp"], file
