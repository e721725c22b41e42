"""Triton's kernels in its interpreter, on the CPU: what they compute, not how fast.

pytest does not collect this file by itself: test_triton_interpreter.py runs it in a process of its
own, since TRITON_INTERPRET must be set before any kernel is imported. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py

Problems are small and tiles smaller, so that every loop runs several times. Weights are float32 and
float16: bfloat16 is silently wrong in the interpreter (Triton 3.6). What depends on the compiler or
on the order of a GPU's threads cannot show here: test_kernel_*.py run the same backend on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from parity import (
    DTYPES,
    assert_within_bounds,
    decode,
    options_of,
    reference_decode,
    score_errors,
    student_of,
    trie_of,
)
from torch import Tensor
from triton.runtime import interpreter

from sidmlp import beam
from sidmlp_kernels import backends
from sidmlp_kernels.ops.library import load, operator
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.spec import DecodeSpec
from sidmlp_kernels.testing import (
    Problem,
    assert_bounded,
    assert_results_equal,
    exclude_tensors,
    make_grid_problem,
    make_problem,
)

FLOAT32_MAX = float(torch.finfo(torch.float32).max)

# Inputs that are not finite make NumPy warn where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def allow_ranges_of_tensors(patch: Callable[..., None]) -> Callable[..., None]:
    """NumPy 2.4 no longer makes an int of an array of one element, which `range(tensor)` asks for
    in the interpreter of Triton 3.6."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


interpreter._patch_lang_tensor = allow_ranges_of_tensors(interpreter._patch_lang_tensor)

assert load("triton") == "", load("triton")

from sidmlp_kernels.ops.triton import launch, tiles  # noqa: E402

assert launch.INTERPRETED, "kernels were imported without TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def small_tiles_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend as one of the CPU, with the smallest tiles."""
    known = tuple(
        dataclasses.replace(known, device_type="cpu", why_not=lambda sizes: "")
        if known.name == "triton"
        else known
        for known in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", known)
    set_tiles(monkeypatch)


def set_tiles(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Every row of the table gets tiles of 16 in every direction, but for `changes`."""
    smallest = {field.name: 16 for field in dataclasses.fields(tiles.Tiles)}
    values = {**smallest, "warps": 1, "stages": 1, "row_tile": 64, "select": 32, **changes}
    rows = [dataclasses.replace(row, tiles=tiles.Tiles(**values)) for row in tiles.TABLE]
    monkeypatch.setattr(tiles, "TABLE", tuple(rows))


def small_problem(codes_per_level: Sequence[int] = (5, 4, 6), **changes: Any) -> Problem:
    """Two requests, the first without any valid state; 20 tokens are two tiles, widths of 24 and 20
    are two and a half."""
    sizes = {"dim": 24, "hidden_dim": 20, "ffn_dim": 40, "tokens": 20, "num_items": 80, "batch": 2}
    return make_problem(codes_per_level, **{**sizes, **changes})


def run(problem: Problem, plan: DecodePlan) -> tuple[Tensor, ...]:
    return plan.decode_states(problem.states, problem.mask, *exclude_tensors(problem.exclude))


def assert_empty(results: Sequence[Tensor], request: int) -> None:
    items, scores, codes, counts = results
    assert int(counts[request]) == 0
    assert bool((items[request] == -1).all())
    assert bool((scores[request] == -math.inf).all())
    assert bool((codes[request] == -1).all())


CASES: dict[str, dict[str, Any]] = {
    "L1": {"codes_per_level": (37,), "num_beams": 20},
    "L2, only children": {"codes_per_level": (5, 30), "num_items": 20, "batch": 3},
    "L3": {"codes_per_level": (5, 40, 5), "num_items": 300, "k": 4},
    "L8": {"codes_per_level": (2, 4, 3, 2, 17, 2, 3, 2), "num_beams": 12},
    "products": {"attention_dim": 40, "num_heads": 1, "ffn_dim": 33},
    "18 heads": {"dim": 36, "num_heads": 18, "codes_per_level": (4, 3)},
    "blocks 3": {"blocks_per_head": 3, "codes_per_level": (4, 9)},
    "codebook": {"normalisation": "codebook", "codes_per_level": (4, 50, 6)},
    "temperatures": {"temperatures": (0.5, 1.7, 3.0), "level_weights": (1.0, -0.5, 0.7)},
    "stock and exclusion": {"unavailable": 0.4, "excluded": 60, "num_beams": 16},
    "more beams than leaves": {"num_items": 12, "num_beams": 30, "k": 25},
    "several chunks": {"codes_per_level": (9, 8, 6), "num_items": 250, "num_beams": 50},
    "greedy": {"num_beams": 1, "batch": 3},
}
SPARSE_TOO = ("L3", "L8", "blocks 3", "temperatures", "several chunks")
HALF = ("L3", "products", "blocks 3", "codebook")


@functools.cache
def problem_of(case: str) -> Problem:
    return small_problem(seed=sorted(CASES).index(case), **CASES[case])


@pytest.mark.parametrize(
    ("case", "dense"),
    [*((case, True) for case in CASES), *((case, False) for case in SPARSE_TOO)],
)
def test_decode(case: str, dense: bool) -> None:
    problem = problem_of(case)
    plan = problem.plan("triton", dense=[dense] * problem.spec.num_levels)
    result = decode(plan, problem)
    eps = score_errors(problem, torch.float32, problem.states)
    assert eps[-1] < 1e-3, f"eps {eps} says nothing: this is no test"
    assert_within_bounds(result, problem, eps, where=f"{case}, dense {dense}")
    wanted = decode(problem.plan("cpu"), problem)
    assert torch.equal(result.counts, wanted.counts)
    assert int(result.counts.min()) > 0


@pytest.mark.parametrize("states_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", HALF)
def test_decode_with_half_precision(case: str, states_dtype: str) -> None:
    problem = problem_of(case)
    states = problem.states.to(DTYPES[states_dtype])
    result = decode(problem.plan("triton", torch.float16), problem, states)
    eps = score_errors(problem, torch.float16, states)
    assert_within_bounds(result, problem, eps, where=f"{case}, fp16", states=states)


@pytest.mark.parametrize("states_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("attention_dim", [24, 72], ids=["factors", "products"])
def test_context_readout(attention_dim: int, dtype: str, states_dtype: str) -> None:
    problem = small_problem(attention_dim=attention_dim, batch=3, seed=3)
    plan = problem.plan("triton", DTYPES[dtype])
    assert (plan.packed.readout[2].numel() > 0) == (attention_dim == 24)
    states = problem.states.to(DTYPES[states_dtype])
    rough = torch.promote_types(DTYPES[dtype], states.dtype) if dtype == "fp32" else DTYPES[dtype]
    with torch.no_grad():
        exact = student_of(problem).context(states.double(), problem.mask)
        same_dtype = student_of(problem, rough).context(states.to(rough), problem.mask)
    assert_bounded(
        plan.context_readout(states, problem.mask),
        same_dtype,
        exact,
        dtype=rough,
        what="context",
        where=f"{dtype} weights, {states_dtype} states; {problem}",
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("level", "blocks"), [(0, 1), (1, 2), (7, 1)])
def test_level_logits(level: int, blocks: int, dtype: str) -> None:
    codes = (2, 4, 3, 2, 5, 2, 3, 17)
    problem = small_problem(codes, blocks_per_head=blocks, seed=level)
    packed = problem.packed(DTYPES[dtype])
    generator = torch.Generator().manual_seed(level)
    context = torch.randn(5, 24, generator=generator)
    prefix = torch.stack([torch.randint(0, c, (5,), generator=generator) for c in codes], 1)
    prefix = prefix[:, :level].contiguous()
    heads = (list(packed.heads), list(packed.sizes), problem.spec.layer_norm_eps, 0)
    logits = operator("level_logits", "triton")(context, prefix.int(), *heads)
    with torch.no_grad():
        exact, rough = (
            student_of(problem, kind).logits(level, context.to(kind), prefix)
            for kind in (torch.float64, DTYPES[dtype])
        )
    assert_bounded(
        logits, rough, exact, dtype=DTYPES[dtype], what="logits", where=f"level {level}, {dtype}"
    )
    if level:
        broken = prefix.int()
        broken[1, 0], broken[3, level - 1] = -1, codes[level - 1]
        got = operator("level_logits", "triton")(context, broken, *heads)
        whole = [0, 2, 4]
        assert torch.equal(got[whole], logits[whole])
        assert bool(got[[1, 3]].isnan().all())


# ---- exact scores, ties everywhere ----


def grid_problems() -> Iterator[tuple[str, Problem, Tensor]]:
    tree = torch.cartesian_prod(*map(torch.arange, (5, 8, 3))).repeat(2, 1)
    children = DecodeSpec.for_levels(3)
    codebook = dataclasses.replace(children, normalisation="codebook")
    weighted = dataclasses.replace(children, level_weights=(1.0, -0.25, 2.0))
    warm = dataclasses.replace(children, temperatures=(2.0, 0.5, 1.0))
    short = [[5, 3, 3, 99], [], list(range(0, 240, 2))]
    for name, settings, beams, k, exclude in (
        ("cut", children, 7, 7, None),
        ("codebook", codebook, 11, 3, short),
        ("weighted", weighted, 24, 24, short),
        ("warm, several chunks", warm, 50, 50, None),
        ("everything", children, 130, 121, short),
    ):
        settings = dataclasses.replace(settings, num_beams=beams)
        made = make_grid_problem(tree, (5, 8, 3), settings=settings, k=k, seed=k, exclude=exclude)
        yield name, *made
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 2, 4, 1, 2, 3, 20, 2)
    codes = torch.stack([torch.randint(0, c, (90,), generator=generator) for c in sizes], 1)
    stock = torch.rand(90, generator=generator) < 0.7
    yield (
        "eight levels, blocks 2",
        *make_grid_problem(
            codes,
            sizes,
            settings=dataclasses.replace(DecodeSpec.for_levels(8), num_beams=9),
            k=9,
            batch=2,
            blocks_per_head=2,
            available=stock,
        ),
    )


GRID = {name: (problem, context) for name, problem, context in grid_problems()}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", GRID)
def test_ties_are_broken_as_the_reference_does(name: str, dense: bool) -> None:
    problem, context = GRID[name]
    if dense or problem.settings.num_beams >= 50:  # fewer requests, for time
        problem, context = problem.rows([0]), context[:1]
    found = beam.beam_decode(
        student_of(problem, torch.float32),
        context,
        trie_of(problem),
        problem.k,
        problem.settings.num_beams,
        problem.exclude,
        **options_of(problem),
    )
    wanted = tuple(getattr(found, field.name) for field in dataclasses.fields(found))
    plans = [
        problem.plan(backend, dense=[dense] * problem.spec.num_levels)
        for backend in ("triton", "cpu")
    ]
    excluded = exclude_tensors(problem.exclude)
    got, theirs = (plan.beam_decode(context, *excluded) for plan in plans)
    where = f"{name}, dense {dense}; {problem}"
    assert_results_equal(got, wanted, where=where, wanted_is="the reference")
    assert_results_equal(got, theirs, where=where, wanted_is="the CPU backend")


# ---- how the work is cut changes no bit ----


def test_groups_and_programs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem((5, 20), batch=4, excluded=9, seed=5)
    plan = problem.plan("triton")
    heads = (list(plan.packed.heads), list(plan.packed.sizes), problem.spec.layer_norm_eps, 0)
    context = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([[3], [-1], [0], [5]], dtype=torch.int32)  # two are no codes
    wanted: list[Tensor] = []
    for group, one_program in ((1, False), (3, False), (16, False), (2, True)):
        monkeypatch.setattr("sidmlp_kernels.ops.triton.tiles.GROUPS", ((0, group),))
        if one_program:  # it takes group after group
            monkeypatch.setattr(launch, "MAX_WORKSPACE", 1)
        results = [
            *run(problem, plan),
            plan.context_readout(problem.states, problem.mask),
            operator("level_logits", "triton")(context, prefix, *heads).nan_to_num(7.0),
        ]
        wanted = wanted or results
        for got, first in zip(results, wanted, strict=True):
            assert torch.equal(got, first), f"groups of {group}, one program: {one_program}"
    assert [bool((row == 7.0).all()) for row in wanted[-1]] == [False, True, False, True]


def test_tiles_as_the_table_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test with tiles of a GPU: most of their rows and columns are masked here."""
    small = small_problem(seed=6)
    wanted = run(small, small.plan("triton"))
    monkeypatch.undo()
    known = tuple(dataclasses.replace(b, why_not=lambda sizes: "") for b in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", known)
    result = decode(small.plan("triton"), small)
    eps = score_errors(small, torch.float32, small.states)
    assert_within_bounds(result, small, eps, where="tiles of the table")
    assert torch.equal(result.items, wanted[0])


def test_an_operator_answers_as_its_plan() -> None:
    problem = small_problem((5, 4), excluded=9, seed=7)
    plan = problem.plan("triton")
    readout, heads = list(plan.packed.readout), list(plan.packed.heads)
    trie = plan.snapshot.trie_tensors("cpu")
    eps, excluded = problem.spec.layer_norm_eps, exclude_tensors(problem.exclude)
    sizes = list(plan.packed.sizes)
    settings = (10, 10, False, [1.0] * 2, [1.0] * 2, [int(p.dense) for p in plan.levels], 1, 0)
    state = (problem.states, problem.mask)
    got = operator("decode_states", "triton")(
        *state, readout, heads, trie, *excluded, sizes, eps, *settings
    )
    assert_results_equal(got, run(problem, plan), where="operator", wanted_is="the plan's")
    context = operator("context_readout", "triton")(*state, readout, sizes, eps, 0)
    assert torch.equal(context, plan.context_readout(*state))
    got = operator("beam_decode", "triton")(context, heads, trie, *excluded, sizes, eps, *settings)
    wanted = plan.beam_decode(context, *excluded)
    assert_results_equal(got, wanted, where="operator", wanted_is="the plan's")
    cpu = problem.plan("cpu")
    assert torch.equal(got[0], cpu.beam_decode(context, *excluded)[0])


# ---- edges ----


def test_an_empty_batch() -> None:
    problem = small_problem().rows([])
    plan = problem.plan("triton")
    shapes = [list(t.shape) for t in run(problem, plan)]
    assert shapes == [[0, 10], [0, 10], [0, 10, 3], [0]]
    assert plan.context_readout(problem.states, problem.mask).shape == (0, 24)


@pytest.mark.parametrize("tokens", [0, 20])
def test_a_history_without_any_valid_state_gets_an_answer(tokens: int) -> None:
    problem = small_problem(seed=8).replace(
        states=torch.full((1, tokens, 24), math.nan),
        mask=torch.zeros(1, tokens, dtype=torch.bool),
        exclude=((),),
    )
    result = decode(problem.plan("triton"), problem)
    one = problem.replace(states=torch.zeros(1, 1, 24), mask=torch.zeros(1, 1, dtype=torch.bool))
    wanted = reference_decode(one)
    assert torch.equal(result.items, wanted.items)
    assert result.counts.tolist() == [10]
    torch.testing.assert_close(result.scores.double(), wanted.scores, rtol=0, atol=1e-4)


def test_masked_states_are_never_read() -> None:
    problem = small_problem((5, 6), batch=2, seed=9)
    plan = problem.plan("triton")
    wanted = run(problem, plan)
    assert bool(problem.states.isnan().any())
    for garbage in (0.0, math.inf):
        states = torch.where(problem.mask[..., None], problem.states, garbage)
        got = run(problem.replace(states=states), plan)
        assert_results_equal(got, wanted, where=f"{garbage} in masked states", wanted_is="NaN's")


def test_states_that_are_not_finite() -> None:
    problem = small_problem((5, 6), batch=3, full_histories=True, seed=10)
    plan = problem.plan("triton")
    wanted = run(problem, plan)
    states = problem.states.clone()
    states[0, 5, 23], states[2, 19, 0] = math.nan, -math.inf
    got = run(problem.replace(states=states), plan)
    for request in (0, 2):
        assert_empty(got, request)
    assert_results_equal([t[1:2] for t in got], [t[1:2] for t in wanted], where="request 1")
    broken = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    broken[1, 17] = math.inf
    got = plan.beam_decode(broken)
    assert_empty(got, 1)
    assert int(got[3][0]) == 10


@pytest.mark.parametrize(("level", "dense"), [(0, True), (1, True), (1, False), (2, False)])
def test_logits_that_are_not_finite(level: int, dense: bool) -> None:
    """One row of an output layer overflows: whoever's softmax reads it has no answer."""
    codes = torch.cartesian_prod(*map(torch.arange, (3, 4, 3)))
    problem = small_problem((3, 4, 3), codes=codes, num_beams=40, seed=11, batch=1)
    weights = dict(problem.weights)
    name = f"heads.{level}.output.weight"
    weights[name] = weights[name].clone()
    weights[name][0] = FLOAT32_MAX
    broken = problem.replace(weights=weights)
    assert_empty(run(broken, broken.plan("triton", dense=[dense] * 3)), 0)
    assert not reference_decode(broken, torch.float32).counts.any()


def test_logits_of_other_codes_are_never_read() -> None:
    """In "children" mode a code that continues no item, and an only child, need no logit."""
    codes = torch.tensor([[0, 0], [0, 1], [1, 2]])
    problem = small_problem((2, 4), codes=codes, num_beams=3, seed=12, batch=1)
    weights = dict(problem.weights)
    weights["heads.1.output.weight"] = weights["heads.1.output.weight"].clone()
    weights["heads.1.output.weight"][2:] = FLOAT32_MAX  # 2: an only child; 3: of no item
    broken = problem.replace(weights=weights)
    for dense in (False, True):
        got = run(problem, broken.plan("triton", dense=[True, dense]))
        wanted = run(problem, problem.plan("triton", dense=[True, dense]))
        assert_results_equal(got, wanted, where=f"dense {dense}")


def test_scores_that_overflow() -> None:
    problem = small_problem(seed=13, level_weights=(3e38, 1.0, 1.0), batch=1)
    assert_empty(run(problem, problem.plan("triton")), 0)


def test_k_cuts_within_a_leaf() -> None:
    """Items that share codes come in catalogue order; those out of stock and excluded do not."""
    codes = torch.tensor([[0, 1], [2, 2], [0, 2]])[torch.arange(60) % 3]
    problem = small_problem((3, 3), codes=codes, num_beams=30, k=27, unavailable=0.3, excluded=30)
    got, wanted = (run(problem, problem.plan(backend)) for backend in ("triton", "cpu"))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2])
    assert torch.equal(got[3], wanted[3])
    result = reference_decode(problem)
    assert torch.equal(got[0], result.items)
    assert 20 < int(got[3].max()) <= 27


def test_excluding_everything() -> None:
    problem = small_problem((4, 5), seed=14)
    everything = tuple(problem.item_ids.tolist())
    results = run(problem.replace(exclude=((), everything)), problem.plan("triton"))
    assert results[3].tolist() == [10, 0]
    assert_empty(results, 1)
    odd = (2**62, -(2**62), everything[3], everything[3], 5)
    got = run(problem.replace(exclude=(odd, ())), problem.plan("triton"))
    wanted = run(problem.replace(exclude=(everything[3:4], ())), problem.plan("triton"))
    assert_results_equal(got, wanted, where="repeated and unknown ids", wanted_is="each once")
