"""Launches on CUDA streams: late inputs, graphs, and streams and threads that decode at once.

Every comparison is of bits: with what the same plan answers alone, one launch after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from parity import GPU_BACKENDS, PUBLISHED, require_sizes
from torch import Tensor

from sidmlp_kernels.ops.library import Results
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)

# With scratch in shared memory, and with more than a multiprocessor holds.
SIZES: dict[str, dict[str, Any]] = {
    "published": {**PUBLISHED, "k": 10, "excluded": 30},
    "600 beams": {"codes_per_level": (40, 40, 40), "num_items": 5000, "num_beams": 600},
}
TURNS = 30  # enough that launches of two streams meet


def inputs_of(problem: Problem, device: torch.device) -> list[Tensor]:
    """What decode_states takes, on the device."""
    excluded = exclude_tensors(problem.exclude, device)
    return [problem.states.to(device), problem.mask.to(device), *excluded]


def halves(problem: Problem) -> tuple[Problem, Problem]:
    """Two problems of different requests."""
    middle = problem.batch // 2
    return problem.rows(range(middle)), problem.rows(range(middle, problem.batch))


def side_streams(count: int) -> list[torch.cuda.Stream]:
    """Streams that wait for what the current one has yet to do."""
    streams = [torch.cuda.Stream() for _ in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    return streams


def assert_all_equal(results: Sequence[Sequence[Tensor]], wanted: Results, where: str) -> None:
    for turn, got in enumerate(results):
        assert_results_equal(got, wanted, where=f"{where}, launch {turn}", wanted_is="alone")


def test_the_current_stream_is_used(backend: str, device: torch.device) -> None:
    """Inputs arrive late on a side stream: a launch elsewhere would read what was there before."""
    problem = make_problem(seed=31, batch=20)
    plan = problem.plan(backend, device=device)
    real, mask = problem.states.to(device), problem.mask.to(device)
    wanted = plan.decode_states(real, mask)
    states = torch.zeros_like(real)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
        states.copy_(real)
        got = plan.decode_states(states, mask)
        assert not side.query(), "the operator waited for the device"
    side.synchronize()
    assert_results_equal(got, wanted, where="side stream")


@pytest.mark.parametrize("case", SIZES)
def test_graph_replay_with_changed_inputs(backend: str, device: torch.device, case: str) -> None:
    problem = make_problem(seed=32, **SIZES[case], batch=8)
    require_sizes(backend, problem)
    plan = problem.plan(backend, device=device)
    ids, offsets = exclude_tensors([[int(item)] for item in problem.item_ids[:8]], device)
    inputs = [problem.states.to(device), problem.mask.to(device), ids, offsets]
    static = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.decode_states(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = plan.decode_states(*static)
    for turn in range(3):
        order = torch.roll(torch.arange(8), turn).to(device)
        fresh = [inputs[0][order], inputs[1][order], ids.roll(3 * turn), offsets]
        for tensor, value in zip(static, fresh, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_results_equal(results, plan.decode_states(*fresh), where=f"replay {turn}")


@pytest.mark.parametrize("case", SIZES)
def test_two_streams_at_once(backend: str, device: torch.device, case: str) -> None:
    """Launches of one plan that overlap share no scratch."""
    problem = make_problem(seed=36, **SIZES[case], batch=40)
    require_sizes(backend, problem)
    plan = problem.plan(backend, device=device)
    inputs = [inputs_of(half, device) for half in halves(problem)]
    wanted = [plan.decode_states(*own) for own in inputs]
    results: list[list[Results]] = [[], []]
    streams = side_streams(2)
    for _ in range(TURNS):
        for stream, own, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(plan.decode_states(*own))
    torch.cuda.synchronize()
    for n, (found, own) in enumerate(zip(results, wanted, strict=True)):
        assert_all_equal(found, own, f"{case}, stream {n}")


@pytest.mark.parametrize("case", SIZES)
def test_two_threads_with_a_stream_each(backend: str, device: torch.device, case: str) -> None:
    """The very first calls of a plan, too, may come from two threads: its width is no other's."""
    problem = make_problem(seed=37, **(SIZES[case] | {"hidden_dim": 88}), batch=40)
    require_sizes(backend, problem)
    plan = problem.plan(backend, device=device)
    inputs = [inputs_of(half, device) for half in halves(problem)]
    streams = side_streams(2)

    def work(n: int) -> list[Results]:
        with torch.cuda.stream(streams[n]):
            return [plan.decode_states(*inputs[n]) for _ in range(TURNS)]

    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(work, range(2)))
    torch.cuda.synchronize()
    for n, found in enumerate(results):
        assert_all_equal(found, plan.decode_states(*inputs[n]), f"{case}, thread {n}")


@pytest.mark.parametrize("case", SIZES)
def test_graph_replays_beside_eager_calls(backend: str, device: torch.device, case: str) -> None:
    """One plan, captured on one stream and called on another: neither touches the other's memory,
    and each replay reads the inputs of its time."""
    problem = make_problem(seed=38, **SIZES[case], batch=16)
    require_sizes(backend, problem)
    plan = problem.plan(backend, device=device)
    captured, eager = (inputs_of(half, device) for half in halves(problem))
    turned = [captured[0].flip(0), captured[1].flip(0), *captured[2:]]
    wanted = [plan.decode_states(*captured), plan.decode_states(*turned)]
    wanted_eager = plan.decode_states(*eager)
    static = [tensor.clone() for tensor in captured]
    side, other = side_streams(2)
    with torch.cuda.stream(side):
        plan.decode_states(*static)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = plan.decode_states(*static)
    replayed: list[list[Tensor]] = []
    called: list[Results] = []
    for turn in range(TURNS):
        with torch.cuda.stream(side):
            for tensor, value in zip(static, turned if turn % 2 else captured, strict=True):
                tensor.copy_(value)
            graph.replay()
            replayed.append([tensor.clone() for tensor in results])
        with torch.cuda.stream(other):
            called.append(plan.decode_states(*eager))
    torch.cuda.synchronize()
    for odd in (0, 1):
        assert_all_equal(replayed[odd::2], wanted[odd], f"{case}, replays of inputs {odd}")
    assert_all_equal(called, wanted_eager, f"{case}, eager calls")


def test_freed_tensors_outlive_work_on_another_stream(backend: str, device: torch.device) -> None:
    """A decode waits on a side stream while the last reference to weights and catalogue goes and
    the memory is asked for again."""
    problem = make_problem(seed=61, batch=20)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = problem.plan(backend, device=device).decode_states(states, mask)
    plan = make_problem(seed=61, batch=20).plan(backend, device=device)
    plan.decode_states(states, mask)  # compiled and loaded, so that the call below only launches
    tensors = [*plan.packed.readout, *plan.packed.heads, *plan.snapshot.trie_tensors(device)]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
        got = plan.decode_states(states, mask)
    del plan, tensors
    garbage = [torch.full((size,), 0x7F, dtype=torch.uint8, device=device) for size in sizes]
    side.synchronize()
    assert_results_equal(got, wanted, where="after the memory was asked for again")
    del garbage
