"""Encoders and `recommend` on CUDA streams: late inputs, graphs, streams at once, weights that go
while a kernel still reads them. Every comparison is of bits."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from encoders import fused_plan, requests
from torch import Tensor

from sidmlp_kernels import MLPEncoderSpec, T5Spec
from sidmlp_kernels.ops import operator
from sidmlp_kernels.ops.library import Results
from sidmlp_kernels.testing import make_problem

ENCODERS: dict[str, T5Spec | MLPEncoderSpec] = {
    "encode_t5": T5Spec(2, 64, 2, 32, 128, 40),
    "encode_t5, wgmma": T5Spec(2, 128, 3, 64, 192, 40),
    "encode_mlp": MLPEncoderSpec(2, 4, 64, 96, 40, 30),
}
CYCLES = 200_000_000  # about 0.1 s
TURNS = 30  # enough that launches of two streams meet

pytestmark = [
    pytest.mark.parametrize("backend", ["cuda"], indirect=True),
    pytest.mark.parametrize("name", ENCODERS),
]


class Recommend:
    """A call of `recommend` by token ids alone."""

    def __init__(self, name: str, device: torch.device, batch: int = 20) -> None:
        spec = ENCODERS[name]
        self.encoder = fused_plan(spec, "cuda", device, torch.bfloat16)
        self.problem = make_problem(
            (16, 16, 16), seed=1, batch=batch, dim=spec.dim, hidden_dim=64, num_items=900
        )
        self.plan = self.problem.plan("cuda", dtype=torch.bfloat16, device=device)
        self.ids, self.mask = (t.to(device) for t in requests(spec, batch, 25))

    def __call__(self, ids: Tensor, mask: Tensor) -> Results:
        plan, none = self.plan, None
        tensors = (list(plan.packed.readout), *plan._heads_catalogue, none, none)
        encoder: Any = self.encoder.operator_args()
        return operator("recommend", "cuda")(ids, mask, *encoder, *tensors, *plan._decode_args)


def assert_bits(got: Results, wanted: Results) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_current_stream_is_used(backend: str, device: torch.device, name: str) -> None:
    """Inputs arrive late on a side stream: a launch elsewhere would read what was there before."""
    call = Recommend(name, device)
    wanted, wanted_states = call(call.ids, call.mask), call.encoder(call.ids, call.mask)
    ids = torch.zeros_like(call.ids)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        ids.copy_(call.ids)
        got, states = call(ids, call.mask), call.encoder(ids, call.mask)
        assert not side.query(), "the operator waited for the device"
    side.synchronize()
    assert_bits(got, wanted)
    assert torch.equal(states, wanted_states)


def test_graph_replays_read_the_ids_of_their_time(
    backend: str, device: torch.device, name: str
) -> None:
    call = Recommend(name, device, batch=8)
    ids, mask = call.ids.clone(), call.mask.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(ids, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(ids, mask)
    for turn in range(3):
        order = torch.roll(torch.arange(8, device=device), turn)
        ids.copy_(call.ids[order])
        mask.copy_(call.mask[order])
        graph.replay()
        assert_bits(results, call(call.ids[order], call.mask[order]))


def test_two_streams_at_once(backend: str, device: torch.device, name: str) -> None:
    """Calls that overlap share no states and no scratch."""
    call = Recommend(name, device, batch=80)
    halves = [(call.ids[:40], call.mask[:40]), (call.ids[40:], call.mask[40:])]
    wanted = [call(*half) for half in halves]
    streams = [torch.cuda.Stream() for _ in halves]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[list[Results]] = [[], []]
    for _ in range(TURNS):
        for stream, half, results in zip(streams, halves, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(*half))
    torch.cuda.synchronize()
    for results, own in zip(found, wanted, strict=True):
        for got in results:
            assert_bits(got, own)


def test_weights_go_while_a_side_stream_reads_them(
    backend: str, device: torch.device, name: str
) -> None:
    spec = ENCODERS[name]
    ids, mask = (t.to(device) for t in requests(spec, 20, 25))
    plan = fused_plan(spec, "cuda", device, torch.bfloat16)
    wanted = plan(ids, mask)
    assert plan.packed is not None
    sizes = [(t.shape, t.dtype) for t in plan.packed.tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        states = plan(ids, mask)
    del plan
    gc.collect()
    others = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in sizes]
    torch.cuda.synchronize()
    assert torch.equal(states, wanted), "the weights' memory was given away under the kernel"
    del others
