"""Two GPUs in one process: a model decodes on its own, whichever is current, and both give the same
bits. Skipped where there is one; see also the graphs of test_graphs_on_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from captured_graphs import fields, other_catalogue
from encoders import SPECS, fused_plan, module_of, requests
from parity import DTYPES, GPU_BACKENDS, PUBLISHED, require_sizes
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp_kernels import backends
from sidmlp_kernels.ops import operator
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)

PLACES = tuple(torch.device("cuda", index) for index in (0, 1))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # On tensor cores, whose launches depend on the batch, and what only plain kernels take.
    "published bf16": ("bf16", {**PUBLISHED, "k": 10, "excluded": 30}),
    "small fp32": ("fp32", {"k": 10, "excluded": 10}),
    "600 beams": ("fp32", {"codes_per_level": (40, 40, 40), "num_items": 5000, "num_beams": 600}),
}
BATCHES = (1, 5, 40)
TURNS = 20  # enough that launches on both devices meet


@pytest.fixture(autouse=True)
def _two_gpus(backend: str) -> Iterator[None]:  # after `backend`, which may skip or fail itself
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, one is there")
    with current(PLACES[0]):
        yield


@contextmanager
def current(place: torch.device) -> Iterator[None]:
    """With `place` as the current device, which must still be it at the end."""
    with torch.cuda.device(place):
        yield
        assert torch.cuda.current_device() == place.index


def problem_of(case: str, seed: int) -> tuple[Problem, torch.dtype]:
    dtype, sizes = CASES[case]
    return make_problem(seed=seed, batch=max(BATCHES), **sizes), DTYPES[dtype]


def calls_of(
    plan: DecodePlan, problem: Problem, dtype: torch.dtype, batch: int
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Each operator on requests of one batch size, with inputs on the plan's device."""
    place, part = plan.packed.device, problem.rows(range(batch))
    states, mask = part.states.to(place, dtype), part.mask.to(place)
    excluded = exclude_tensors(part.exclude, place)
    generator = torch.Generator().manual_seed(batch)
    context = torch.randn(batch, problem.spec.dim, generator=generator).to(place)
    prefix = torch.zeros(batch, 1, dtype=torch.int32, device=place)
    heads = list(plan.packed.heads), list(plan.packed.sizes), problem.spec.layer_norm_eps, 0
    level_logits = operator("level_logits", plan.backend)
    return {
        "decode_states": lambda: plan.decode_states(states, mask, *excluded),
        "beam_decode": lambda: plan.beam_decode(context, *excluded),
        "context_readout": lambda: [plan.context_readout(states, mask)],
        "level_logits": lambda: [level_logits(context, prefix, *heads)],
    }


def on_cpu(tensors: Sequence[Tensor], place: torch.device) -> list[Tensor]:
    assert all(tensor.device == place for tensor in tensors)
    return [tensor.cpu() for tensor in tensors]


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], where: str) -> None:
    assert len(got) == len(wanted)
    if len(got) == 4:
        assert_results_equal(got, wanted, where=where, wanted_is="cuda:0's")
    else:  # NaN where a request has no states
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32)), where


@pytest.mark.parametrize("case", CASES)
def test_operators(backend: str, case: str) -> None:
    """Every operator on each device with each device current: cuda:0's bits with cuda:0 current. A
    plan is made with the other device current, too."""
    problem, dtype = problem_of(case, 81)
    require_sizes(backend, problem, dtype)
    plans = []
    for place, other in zip(PLACES, PLACES[::-1], strict=True):
        with current(other):
            plans.append(problem.plan(backend, dtype, device=place))
    for batch in BATCHES:
        wanted: dict[str, list[Tensor]] = {}
        for plan in plans:
            own = plan.packed.device
            for name, call in calls_of(plan, problem, dtype, batch).items():
                for place in (own, *(p for p in PLACES if p != own)):
                    with current(place):
                        got = on_cpu(call(), own)
                    where = f"{name}, batch {batch} on {own}, {place} is current"
                    assert_same(got, wanted.setdefault(name, got), where)


@pytest.mark.parametrize("case", CASES)
def test_plans_in_turn(backend: str, case: str) -> None:
    """Launches on both devices under way at once, none of them waited for."""
    problem, dtype = problem_of(case, 82)
    require_sizes(backend, problem, dtype)
    plans = [problem.plan(backend, dtype, device=place) for place in PLACES]
    calls = [calls_of(plan, problem, dtype, max(BATCHES))["decode_states"] for plan in plans]
    wanted = on_cpu(calls[0](), PLACES[0])
    found: list[tuple[int, Sequence[Tensor]]] = []
    for turn in range(TURNS):
        with current(PLACES[turn // 2 % 2]):
            found.append((turn % 2, calls[turn % 2]()))
    for turn, (index, results) in enumerate(found):
        assert_same(on_cpu(results, PLACES[index]), wanted, f"turn {turn} on {PLACES[index]}")


def test_side_streams(backend: str) -> None:
    """A stream of a device is current while the other device is, and inputs arrive late on it."""
    problem, dtype = problem_of("published bf16", 83)
    require_sizes(backend, problem, dtype)
    wanted: list[Tensor] = []
    for own, other in zip(PLACES, PLACES[::-1], strict=True):
        plan = problem.plan(backend, dtype, device=own)
        real, mask = problem.states.to(own, dtype), problem.mask.to(own)
        plan.decode_states(real, mask)
        states, side = torch.zeros_like(real), torch.cuda.Stream(own)
        torch.cuda.synchronize(own)
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # cycles, about 0.05 s
            states.copy_(real)
            with current(other):
                got = plan.decode_states(states, mask)
            assert not side.query(), "the operator waited for the device"
        side.synchronize()
        wanted = wanted or on_cpu(got, own)
        assert_same(on_cpu(got, own), wanted, f"side stream of {own}")


def recommender(problem: Problem, backend: str, place: torch.device) -> sk.Recommender:
    return sk.Recommender(problem.student, problem.catalogue, None, place, "bfloat16", backend)


def test_graphs(backend: str) -> None:
    """Graphs of both devices by turns, with cuda:0 current as with cuda:1: what decode_states
    answers on cuda:0, before and after a swap."""
    problem, dtype = problem_of("published bf16", 84)
    require_sizes(backend, problem, dtype)
    models = [recommender(problem, backend, place) for place in PLACES]
    settings: dict[str, Any] = {"k": 10, "num_beams": 50}
    decoders = []
    for model, other in zip(models, PLACES[::-1], strict=True):
        with current(other):
            decoders.append(model.capture(BATCHES, problem.states.shape[1], **settings))
    inputs = [
        [problem.states.to(place, torch.bfloat16), problem.mask.to(place)] for place in PLACES
    ]
    for catalogue in (None, other_catalogue(problem, 1)):
        if catalogue is not None:
            for model in models:
                model.swap(catalogue)
        for batch in (*BATCHES, 3):
            rows = [[tensor[:batch] for tensor in own] for own in inputs]
            wanted = on_cpu(fields(models[0].decode_states(*rows[0], **settings)), PLACES[0])
            found = []
            for turn in range(8):
                with current(PLACES[turn // 2 % 2]):
                    found.append(decoders[turn % 2].decode_states(*rows[turn % 2]))
            for turn, got in enumerate(found):
                where = f"replay {turn} of batch {batch}"
                assert_same(on_cpu(fields(got), PLACES[turn % 2]), wanted, where)


FUSED = ("relu, two layers", "sizes of wgmma", "sizes of mma, gated", "four roles")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["throughput", "cluster4"])
@pytest.mark.parametrize("name", FUSED)
def test_encoders(backend: str, name: str, form: str, dtype: str) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, 20, 33)
    wanted: list[Tensor] = []
    for own, other in zip(PLACES, PLACES[::-1], strict=True):
        plan = fused_plan(spec, backend, own, DTYPES[dtype], form)
        given = ids.to(own), mask.to(own)
        for place in (own, other):
            with current(place):
                states = plan(*given)
            got = on_cpu([states.float()], own)
            wanted = wanted or got
            assert_same(got, wanted, f"{name} on {own}, {place} is current")


def test_token_ids_to_items(backend: str) -> None:
    """Recommender.batch and decode on cuda:1 while cuda:0 is current, and the other way round."""
    codes, items = (16, 16, 16), 40
    tokens = sk.TokenSpec.for_codes(codes, max_items=6)
    t5 = sk.T5Spec(2, 128, 3, 64, 192, tokens.vocab_size)
    problem = make_problem(codes, seed=85, dim=128, hidden_dim=128, num_items=items)
    encoder = module_of(t5)
    if reason := backends.encoder_why_not(backend, t5, torch.bfloat16):
        pytest.skip(f"backend {backend}: {reason}")
    known = problem.item_ids.tolist()
    histories = [known[begin : begin + begin % 7] for begin in range(24)]
    wanted: list[Tensor] = []
    for own, other in zip(PLACES, PLACES[::-1], strict=True):
        for place in (own, other):
            with current(place):
                model = sk.Recommender(
                    problem.student,
                    problem.catalogue,
                    encoder,
                    own,
                    "bfloat16",
                    backend,
                    tokens=tokens,
                )
                batch = model.batch(histories)
                assert batch.ids.device == own
                got = on_cpu(fields(model.decode(batch, k=8, num_beams=20)), own)
            wanted = wanted or got
            assert_same(got, wanted, f"on {own}, {place} is current")
