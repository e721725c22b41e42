"""A decode in two launches, the users' first stage in one of its own: the bits of one launch.

Sizes are such that tensor cores take them; every cut of both launches (first_stage_shape.h) is
among the batches.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity import DTYPES, PUBLISHED, sanitized
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp_kernels.ops import operator
from sidmlp_kernels.ops.cuda_kernels import two_launches_why_not
from sidmlp_kernels.plan import DecodePlan, make_plan
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

on_cuda = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
halves = pytest.mark.parametrize("dtype", ["bf16", "fp16"])

BATCHES = (1, 2, 15, 16, 17, 32, 33, 64, 65, 67, 128, 129, 133, 300, 512, 513, 600, 1030)
SIZES: dict[str, dict[str, Any]] = {
    "small": {"dim": 64, "hidden_dim": 96, "num_items": 400, "num_beams": 20},
    "odd codes": {"codes_per_level": (17, 6, 5), "dim": 48, "num_heads": 3, "hidden_dim": 160},
    "one level": {"codes_per_level": (203,), "hidden_dim": 32, "num_beams": 40},
    "codebook": {"codes_per_level": (40, 30, 20), "normalisation": "codebook", "num_beams": 25},
    "published": {**PUBLISHED, "k": 10, "tokens": 20},
    "wide": {"codes_per_level": (1000, 90), "hidden_dim": 1024, "dim": 128, "num_items": 2000},
    "widest": {"codes_per_level": (64, 70), "hidden_dim": 2048, "dim": 128, "num_items": 900},
}


def problem_of(case: str, batch: int = 70, **options: Any) -> Problem:
    sizes = {"codes_per_level": (16, 12, 9), "excluded": 5, "tokens": 9}
    return make_problem(seed=61, **{**sizes, **SIZES[case], "batch": batch, **options})


def plans(problem: Problem, device: torch.device, dtype: str) -> tuple[DecodePlan, DecodePlan]:
    """In one launch and in two."""
    one, two = (
        problem.plan("cuda", DTYPES[dtype], device=device, launches=number) for number in (1, 2)
    )
    assert (one.launches, two.launches) == (1, 2)
    return one, two


def inputs_of(problem: Problem, device: torch.device) -> list[Tensor]:
    """What decode_states takes, on the device."""
    excluded = exclude_tensors(problem.exclude, device)
    return [problem.states.to(device), problem.mask.to(device), *excluded]


def captured(plan: DecodePlan, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.decode_states(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = plan.decode_states(*inputs)
    return graph, results


@on_cuda
@halves
@pytest.mark.parametrize("case", sanitized(SIZES, ["small", "odd codes"]))
def test_the_bits_of_one_launch(backend: str, device: torch.device, case: str, dtype: str) -> None:
    problem = problem_of(case)
    one, two = plans(problem, device, dtype)
    for states_dtype in {torch.float32, DTYPES[dtype]}:
        states, mask, *excluded = inputs_of(problem, device)
        states = states.to(states_dtype)
        wanted = one.decode_states(states, mask, *excluded)
        got = two.decode_states(states, mask, *excluded)
        assert int(wanted[3].max()) > 0
        assert_results_equal(got, wanted, where=f"{case}, states {states_dtype}")
    context = one.context_readout(*inputs_of(problem, device)[:2])
    assert_results_equal(
        two.beam_decode(context, *excluded), one.beam_decode(context, *excluded), where=case
    )


@on_cuda
@halves
def test_every_batch_gives_the_same_bits(backend: str, device: torch.device, dtype: str) -> None:
    """Also those of one launch."""
    problem = problem_of("small", max(BATCHES))
    one, two = plans(problem, device, dtype)
    whole = one.decode_states(*inputs_of(problem, device))
    contexts = one.context_readout(*inputs_of(problem, device)[:2])
    excluded = exclude_tensors(problem.exclude, device)
    whole_contexts = one.beam_decode(contexts, *excluded)
    for batch in BATCHES:
        rows = [(7 * batch + 3 * i) % problem.batch for i in range(batch)]
        part = problem.rows(rows)
        got = two.decode_states(*inputs_of(part, device))
        wanted = [tensor[rows] for tensor in whole]
        assert_results_equal(got, wanted, where=f"batch {batch}, states")
        got = two.beam_decode(contexts[rows], *exclude_tensors(part.exclude, device))
        wanted = [tensor[rows] for tensor in whole_contexts]
        assert_results_equal(got, wanted, where=f"batch {batch}, contexts")


@on_cuda
@halves
def test_contexts_at_any_address_and_requests_that_are_not_finite(
    backend: str, device: torch.device, dtype: str
) -> None:
    problem = problem_of("small")
    one, two = plans(problem, device, dtype)
    context = one.context_readout(*inputs_of(problem, device)[:2])
    memory = torch.full((context.numel() + 9,), math.nan, device=device)
    place = memory[5 : 5 + context.numel()].view(context.shape).copy_(context)
    assert_results_equal(two.beam_decode(place), one.beam_decode(context), where="an odd address")
    for value in (math.nan, math.inf):
        place[11, 3] = value
        got = two.beam_decode(place)
        assert int(got[3][11]) == 0
        assert_results_equal(got, one.beam_decode(place), where=f"{value} in request 11")


@on_cuda
@pytest.mark.parametrize("batch", [8, 70, 600])
def test_graph_replays(backend: str, device: torch.device, batch: int) -> None:
    """A captured graph keeps the second launch's early begin, and replays follow one another."""
    problem = problem_of("published", batch)
    one, two = plans(problem, device, "bf16")
    fresh = inputs_of(problem, device)
    static = [tensor.clone() for tensor in fresh]
    graph, results = captured(two, static)
    for turn in range(4):
        order = torch.roll(torch.arange(batch), turn).tolist()
        turned = inputs_of(problem.rows(order), device)
        for tensor, value in zip(static, turned, strict=True):
            tensor.copy_(value)
        for _ in range(5):
            graph.replay()
        assert_results_equal(results, one.decode_states(*turned), where=f"replay {turn}")


@on_cuda
def test_late_inputs_and_launches_that_follow(backend: str, device: torch.device) -> None:
    """The first launch waits for what the stream does before it, and what comes after the second
    waits for both, so that they may share memory."""
    problem = problem_of("published", 300)
    one, two = plans(problem, device, "bf16")
    states, mask, *excluded = inputs_of(problem, device)
    wanted = one.decode_states(states, mask, *excluded)
    late = torch.zeros_like(states)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # cycles
    late.copy_(states)
    results = [two.decode_states(late, mask, *excluded) for _ in range(20)]
    late.zero_()
    for turn, got in enumerate(results):
        assert_results_equal(got, wanted, where=f"call {turn}")


@on_cuda
def test_two_streams_at_once(backend: str, device: torch.device) -> None:
    problem = problem_of("published", 140)
    one, two = plans(problem, device, "bf16")
    parts = [problem.rows(range(70)), problem.rows(range(70, 140))]
    inputs = [inputs_of(part, device) for part in parts]
    wanted = [one.decode_states(*own) for own in inputs]
    streams = [torch.cuda.Stream() for _ in parts]
    results: list[list[Any]] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(30):
        for stream, own, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(two.decode_states(*own))
    torch.cuda.synchronize()
    for n, found in enumerate(results):
        for got in found:
            assert_results_equal(got, wanted[n], where=f"stream {n}")


@on_cuda
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_a_workspace_that_begins_as_garbage(backend: str, device: torch.device, byte: int) -> None:
    problem = problem_of("odd codes")
    one, two = plans(problem, device, "fp16")
    inputs = inputs_of(problem, device)
    wanted = one.decode_states(*inputs)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    filled = [
        torch.full((size,), byte, dtype=torch.uint8, device=device)
        for size in (*(512,) * 4096, 1 << 20, 4 << 20, 16 << 20)
    ]
    del filled
    assert_results_equal(two.decode_states(*inputs), wanted, where=f"bytes {byte:#04x}")


@on_cuda
def test_a_recommender_and_its_graphs(backend: str, device: torch.device) -> None:
    problem = problem_of("published", 8)
    models = [
        sk.Recommender(
            problem.student,
            problem.catalogue,
            device=device,
            dtype="bfloat16",
            backend="cuda",
            launches=number,
        )
        for number in (1, 2)
    ]
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted, got = (model.decode_states(states, mask, num_beams=50) for model in models)
    assert torch.equal(got.items, wanted.items)
    assert torch.equal(got.scores, wanted.scores)
    decoder = models[1].capture((8,), problem.states.shape[1], num_beams=50)
    again = decoder.decode_states(states.bfloat16(), mask)
    wanted = models[0].decode_states(states.bfloat16(), mask, num_beams=50)
    assert torch.equal(again.items, wanted.items)
    assert torch.equal(again.scores, wanted.scores)
    with pytest.raises(ValueError, match=r"launches: expected 1 on backend cuda, got 2 \(.*beams"):
        models[1].decode_states(states, mask, num_beams=2000)


@on_cuda
def test_the_operator_refuses_what_has_one_launch(backend: str, device: torch.device) -> None:
    """Whatever the batch is."""
    problem = problem_of("small")
    plan = problem.plan("cuda", torch.float32, device=device)
    *settings, launches, isa = plan._decode_args
    for batch in (0, 5):
        context = torch.zeros(batch, problem.spec.dim, device=device)
        with pytest.raises(RuntimeError, match=r"launches: expected 1, got 2 \(float32"):
            operator("beam_decode", "cuda")(
                context, *plan._heads_catalogue, None, None, *settings, launches + 1, isa
            )


def settings_of(problem: Problem) -> dict[str, Any]:
    levels = len(problem.spec.codes_per_level)
    return {
        "k": problem.k,
        "num_beams": problem.settings.num_beams,
        "temperatures": (1.0,) * levels,
        "level_weights": (1.0,) * levels,
    }


@halves
def test_a_plan_says_how_many_launches(dtype: str) -> None:
    problem = problem_of("published", 1)
    given = (problem.packed(DTYPES[dtype]), problem.catalogue.snapshot(), "cuda")
    one, two = (make_plan(*given, **settings_of(problem), launches=n) for n in (1, 2))
    assert "launches 1," in str(one)
    assert "launches 2," in str(two)
    assert one.cuts != two.cuts
    assert all(cut.group <= cut.cluster for cut in two.cuts), "a request a block, nothing shared"
    assert (one._decode_args[-2], two._decode_args[-2]) == (1, 2)
    assert "launches 1," in str(problem.plan("cpu"))


def test_where_there_is_one_launch_only() -> None:
    problem = problem_of("small", 1)
    snapshot, settings = problem.catalogue.snapshot(), settings_of(problem)
    packed = problem.packed(torch.bfloat16)
    with pytest.raises(ValueError, match=r"launches: expected 1 or 2, got 3"):
        make_plan(packed, snapshot, "cuda", **settings, launches=3)
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=rf"launches: .* on backend {backend}, got 2 \(the cu"):
            make_plan(packed, snapshot, backend, **settings, launches=2)
    with pytest.raises(ValueError, match=r"got 2 \(its plain kernel decodes: float32"):
        make_plan(problem.packed(), snapshot, "cuda", **settings, launches=2)
    with pytest.raises(ValueError, match=r"launches: expected 1 on backend cpu, got 2"):
        sk.Recommender(problem.student, problem.catalogue, backend="cpu", launches=2)
    odd = problem_of("small", 1, attention_dim=40, num_heads=5, dim=80)
    assert two_launches_why_not(problem.spec, torch.bfloat16, 20) == ""
    assert two_launches_why_not(odd.spec, torch.bfloat16, 20).startswith("its plain readout")
