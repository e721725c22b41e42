"""The CUDA form for long requests: parity, and what must not change a bit, with requests of several
tiles of 64 rows and of more keys than a softmax sees at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from encoders import arguments, call, fused_plan, judge, module_of, yardstick
from torch import Tensor

from sidmlp_kernels import MLPEncoderSpec, T5Spec
from sidmlp_kernels.encoder_plan import long_why_not, plan_encoder
from sidmlp_kernels.testing import rounding_floor

LONG = {
    "three heads": T5Spec(2, 256, 3, 64, 256, 91),
    "published, wide": T5Spec(1, 256, 6, 64, 1024, 91),
    "128 wide, gelu": T5Spec(2, 128, 4, 64, 384, 91, "gelu"),
    "buckets that never end": T5Spec(
        1, 256, 2, 64, 128, 91, relative_buckets=64, relative_max_distance=4000
    ),
    "near buckets alone": T5Spec(
        1, 128, 1, 64, 128, 91, relative_buckets=8, relative_max_distance=5
    ),
}
DTYPES = [torch.bfloat16, torch.float16]
TOKENS = 530  # nine tiles: the last keys have no partner
POISON = 2147480000

on_cuda = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
by_size = pytest.mark.parametrize("name", LONG)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


def long_requests(spec: T5Spec, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Full, with gaps, empty, short, and of lengths around tiles and pairs of tiles."""
    lengths = [tokens, tokens, 0, 1, 64, 65, 128, 129, 200, 320]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, spec.vocab_size, (len(lengths), tokens), generator=generator)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    mask[1] &= torch.rand(tokens, generator=generator) < 0.7
    return ids, mask


@on_cuda
@by_size
@by_dtype
def test_states_are_as_close_as_pytorch(
    backend: str, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    spec = LONG[name]
    ids, mask = long_requests(spec)
    plan = fused_plan(spec, backend, device, dtype, "long", TOKENS)
    got = plan(ids.to(device), mask.to(device)).cpu()
    exact = judge(spec, ids, mask)
    # In fp16 transformers keeps the residual in fp16: bf16's error is the coarser yardstick.
    theirs = (yardstick(spec, ids, mask, torch.bfloat16).double() - exact).abs().max().item()
    share = 2.0 if dtype == torch.bfloat16 else 0.5
    ours = (got[mask].double() - exact).abs().max().item()
    assert ours <= share * theirs + rounding_floor(exact, dtype)
    assert (got[~mask] == 0).all()


@on_cuda
@by_size
@by_dtype
def test_bits_depend_on_the_request_alone(
    backend: str, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Not on padding, nor on the batch, nor on what masked places hold; "auto" is this form."""
    spec = LONG[name]
    ids, mask = (t.to(device) for t in long_requests(spec))
    plan = fused_plan(spec, backend, device, dtype, "long", TOKENS)
    wanted = plan(ids, mask)
    poisoned = torch.where(mask, ids, POISON)
    assert torch.equal(plan(poisoned, mask), wanted)
    auto = fused_plan(spec, backend, device, dtype, "auto", TOKENS)
    assert torch.equal(auto(ids, mask), wanted)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(plan(ids[order], mask[order]), wanted[order])
    for b in range(len(ids)):
        length = max(1, int(mask[b].sum()) if b != 1 else TOKENS)
        alone = plan(ids[b : b + 1, :length], mask[b : b + 1, :length])
        assert torch.equal(alone[0], wanted[b, :length]), f"request {b}"


@on_cuda
def test_more_requests_than_the_workspace_holds(backend: str, device: torch.device) -> None:
    """528 tiles at once; and more requests than are looked at for the next ones."""
    spec = LONG["near buckets alone"]
    ids, mask = (t.to(device) for t in long_requests(spec))
    plan = fused_plan(spec, backend, device, torch.bfloat16, "long", TOKENS)
    wanted = plan(ids, mask)
    for copies in (20, 130):
        many = plan(ids.repeat(copies, 1), mask.repeat(copies, 1))
        assert torch.equal(many, wanted.repeat(copies, 1, 1))
    none = plan(ids, torch.zeros_like(mask))
    assert (none == 0).all()


@on_cuda
def test_replays_of_a_graph_read_the_tokens_of_their_time(
    backend: str, device: torch.device
) -> None:
    spec = LONG["three heads"]
    ids, mask = (t.to(device) for t in long_requests(spec))
    plan = fused_plan(spec, backend, device, torch.bfloat16, "long", TOKENS)
    wanted = plan(ids, mask)
    held, held_mask = ids.clone(), mask.clone()
    plan(held, held_mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = plan(held, held_mask)
    for turn in range(3):
        order = torch.roll(torch.arange(len(ids), device=device), turn)
        held.copy_(ids[order])
        held_mask.copy_(mask[order])
        graph.replay()
        assert torch.equal(states, wanted[order])


@on_cuda
def test_launches_of_two_streams(backend: str, device: torch.device) -> None:
    """Each wants the whole chip, and its blocks wait for each other: neither may hold the other up
    for ever, and they share no workspace."""
    spec = LONG["three heads"]
    ids, mask = (t.to(device) for t in long_requests(spec))
    plan = fused_plan(spec, backend, device, torch.bfloat16, "long", TOKENS)
    orders = [torch.roll(torch.arange(len(ids), device=device), turn) for turn in (0, 3)]
    batches = [(ids[order].contiguous(), mask[order].contiguous()) for order in orders]
    wanted = plan(ids, mask)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in orders]
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, batch, states in zip(streams, batches, found, strict=True):
            with torch.cuda.stream(stream):
                states.append(plan(*batch))
    torch.cuda.synchronize()
    for order, states in zip(orders, found, strict=True):
        assert all(torch.equal(got, wanted[order]) for got in states)


@on_cuda
@pytest.mark.parametrize(
    "change",
    [{"dim": 192}, {"head_dim": 32}, {"ffn_dim": 192}, {"feed_forward": "gated-gelu"}],
    ids=lambda change: next(iter(change)),
)
def test_the_operator_refuses_what_the_plan_refuses(
    backend: str, device: torch.device, change: dict[str, object]
) -> None:
    spec = dataclasses.replace(LONG["three heads"], **change)
    assert long_why_not(spec)
    plan = fused_plan(spec, backend, device, torch.bfloat16)
    assert plan.packed is not None
    ids, mask = (t.to(device) for t in long_requests(spec, 100))
    with pytest.raises(RuntimeError, match=r"encode_t5: expected sizes .* long: expected"):
        call("encode_t5", backend, arguments(plan.packed, ids, mask, form=32))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (T5Spec(1, 64, 2, 64, 128, 30), "dim: expected 128 or 256, got 64"),
        (T5Spec(1, 256, 2, 32, 128, 30), "head_dim: expected 64, got 32"),
        (T5Spec(1, 256, 17, 64, 128, 30), "num_heads: expected at most 16, got 17"),
        (T5Spec(1, 256, 2, 64, 192, 30), "ffn_dim: expected a multiple of 128, got 192"),
        (T5Spec(1, 256, 2, 64, 128, 30, "gated-relu"), "feed_forward: expected one without a gate"),
        (MLPEncoderSpec(1, 3, 32, 40, 30, 16), "only T5 encoders have it"),
    ],
)
def test_reasons(spec: T5Spec | MLPEncoderSpec, reason: str) -> None:
    assert long_why_not(spec).startswith(reason)
    assert not long_why_not(LONG["three heads"])


def test_every_form_of_a_cpu_is_the_same() -> None:
    spec = T5Spec(1, 32, 2, 16, 48, 30)
    cpu = torch.device("cpu")
    plan = plan_encoder(module_of(spec), "cpu", cpu, torch.float32, "long")
    auto = plan_encoder(module_of(spec), "cpu", cpu, torch.float32)
    ids, mask = long_requests(spec, 40)
    assert torch.equal(plan(ids, mask), auto(ids, mask))
