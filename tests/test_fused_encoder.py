"""Fused encoders on every backend that has them: parity with transformers and the reference, and
what must not change a bit: padding, the batch, threads, what stands in masked places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from encoders import (
    MLP_SPECS,
    SPECS,
    T5_SPECS,
    arguments,
    call,
    fused_plan,
    judge,
    requests,
    yardstick,
)
from parity import DTYPES, require_isa
from torch import Tensor

from sidmlp_kernels import MLPEncoderSpec, T5Spec
from sidmlp_kernels.encoder_plan import long_why_not
from sidmlp_kernels.plan import ISAS
from sidmlp_kernels.testing import rounding_floor

PUBLISHED = T5Spec(4, 128, 6, 64, 1024, 1030)
PUBLISHED_MLP = MLPEncoderSpec(4, 4, 128, 512, 1030, 82)
POISON = 2147480000


def forms_of(backend: str, spec: T5Spec | MLPEncoderSpec) -> tuple[str, ...]:
    """Forms within which the bits of a request are the same in every batch."""
    if backend != "cuda":
        return ("auto",)
    long = () if long_why_not(spec) else ("long",)
    return ("throughput", "cluster1", "cluster2", "cluster4", "cluster8", *long)


def encode(
    spec: T5Spec | MLPEncoderSpec,
    backend: str,
    device: torch.device,
    ids: Tensor,
    mask: Tensor,
    dtype: torch.dtype = torch.float32,
    form: str = "auto",
) -> Tensor:
    """The operator's states, on the CPU."""
    plan = fused_plan(spec, backend, device, dtype, form, max_tokens=ids.shape[1])
    return plan(ids.to(device), mask.to(device)).cpu()


def dtype_of(backend: str, spec: T5Spec | MLPEncoderSpec) -> torch.dtype:
    """float32, but for T5 on CUDA, whose kernels are half precision's."""
    t5_on_cuda = backend == "cuda" and isinstance(spec, T5Spec)
    return torch.bfloat16 if t5_on_cuda else torch.float32


def assert_close_enough(
    got: Tensor, spec: T5Spec | MLPEncoderSpec, ids: Tensor, mask: Tensor, where: str
) -> None:
    """Tier 2: at most twice the error of ordinary PyTorch in the same dtype, and a floor."""
    exact = judge(spec, ids, mask)
    theirs = (yardstick(spec, ids, mask, got.dtype).double() - exact).abs().max().item()
    ours = (got[mask].double() - exact).abs().max().item()
    bound = 2 * theirs + rounding_floor(exact, got.dtype)
    assert ours <= bound, f"{where}: error {ours:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"
    assert (got[~mask] == 0).all(), f"{where}: states of masked tokens"


# transformers keeps the residual in the weights' dtype, so in fp16 it is no yardstick for T5.
PARITY = [
    (name, dtype) for name in SPECS for dtype in DTYPES if dtype != "fp16" or name in MLP_SPECS
]


@pytest.mark.parametrize(("name", "dtype"), PARITY)
@pytest.mark.parametrize(
    ("batch", "length"), [(1, 1), (3, 7), (5, 82), (3, 120), (3, 170), (2, 300)]
)
def test_states_are_as_close_as_pytorch(
    backend: str, device: torch.device, name: str, batch: int, length: int, dtype: str
) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, batch, length)
    got = encode(spec, backend, device, ids, mask, DTYPES[dtype])
    assert got.dtype == DTYPES[dtype]
    assert_close_enough(got, spec, ids, mask, f"{name}, {dtype}, [{batch}, {length}]")


@pytest.mark.parametrize("name", T5_SPECS)
def test_fp16_is_closer_than_bf16(backend: str, device: torch.device, name: str) -> None:
    spec = T5_SPECS[name]
    ids, mask = requests(spec, 4, 37)
    exact = judge(spec, ids, mask)
    rough = (yardstick(spec, ids, mask, torch.bfloat16).double() - exact).abs().max().item()
    got = encode(spec, backend, device, ids, mask, torch.float16)[mask]
    assert (got.double() - exact).abs().max().item() <= rough / 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("whole", [PUBLISHED, PUBLISHED_MLP], ids=["t5", "mlp"])
def test_layer_by_layer_at_the_published_size(
    backend: str,
    device: torch.device,
    whole: T5Spec | MLPEncoderSpec,
    layers: int,
    dtype: str,
) -> None:
    spec = dataclasses.replace(whole, num_layers=layers)
    ids, mask = requests(spec, 3, 82)
    got = encode(spec, backend, device, ids, mask, DTYPES[dtype])
    assert_close_enough(got, spec, ids, mask, f"{layers} layers, {dtype}")


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(backend: str, device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    feed_forward = ("relu", "gelu", "gated-relu", "gated-gelu")[seed % 4]
    spec: T5Spec | MLPEncoderSpec
    if seed % 3 < 2:
        buckets, layers = 2 * draw(2, 20), draw(1, 8)
        spec = T5Spec(layers, draw(1, 150), draw(1, 6), draw(1, 80), draw(1, 200), draw(1, 90))
        distance = buckets // 4 + draw(1, 200)
        spec = dataclasses.replace(
            spec,
            feed_forward=feed_forward,
            relative_buckets=buckets,
            relative_max_distance=distance,
        )
        if backend == "cuda":  # whose kernels take multiples of 16, dim from 64 on
            up = {n: getattr(spec, n) + -getattr(spec, n) % 16 for n in ("head_dim", "ffn_dim")}
            spec = dataclasses.replace(spec, dim=max(64, spec.dim + -spec.dim % 16), **up)
    else:
        spec = MLPEncoderSpec(draw(1, 8), draw(1, 8), draw(2, 150), draw(2, 300), draw(1, 90), 150)
    dtype = (torch.float32, torch.bfloat16)[draw(0, 1)]
    ids, mask = requests(spec, draw(1, 9), draw(1, 150), seed)
    got = encode(spec, backend, device, ids, mask, dtype)
    assert_close_enough(got, spec, ids, mask, f"seed {seed}, {spec}")


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        "relu, two layers",
        "gated gelu, few buckets",
        "sizes of wgmma",
        "sizes of the long form",
        "sizes of mma, gated",
        "four roles",
    ],
)
def test_padding_changes_no_bit_and_is_never_read(
    backend: str, device: torch.device, name: str, dtype: str
) -> None:
    """Ids of masked tokens are no indices, whatever they are; each request alone, cut to its
    length, gives the states that it has in a padded batch."""
    spec = SPECS[name]
    ids, mask = requests(spec, 6, 40)
    poisoned = torch.where(mask, ids, POISON)
    poisoned[:, ::2] = torch.where(mask[:, ::2], ids[:, ::2], -1)
    kind = DTYPES[dtype]
    for form in forms_of(backend, spec):
        wanted = encode(spec, backend, device, ids, mask, kind, form)
        assert torch.equal(encode(spec, backend, device, poisoned, mask, kind, form), wanted), form
        for b in range(len(ids)):
            length = int(mask[b].nonzero().max()) + 1
            rows = slice(b, b + 1)
            alone = encode(
                spec, backend, device, ids[rows, :length], mask[rows, :length], kind, form
            )
            assert torch.equal(alone[0], wanted[b, :length]), f"{form}: request {b}"


@pytest.mark.parametrize("name", ["relu, two layers", "four roles"])
def test_requests_without_tokens(backend: str, device: torch.device, name: str) -> None:
    spec, dtype = SPECS[name], dtype_of(backend, SPECS[name])
    for batch, length in ((0, 5), (3, 0)):
        ids = torch.zeros(batch, length, dtype=torch.int64)
        got = encode(spec, backend, device, ids, ids.bool(), dtype)
        assert got.shape == (batch, length, spec.dim)
    ids, mask = requests(spec, 3, 9)
    mask[1] = False
    got = encode(spec, backend, device, ids, mask, dtype)
    assert (got[1] == 0).all()
    others = torch.tensor([0, 2])
    alone = encode(spec, backend, device, ids[others], mask[others], dtype)
    assert torch.equal(got[others], alone)


@pytest.mark.parametrize("bad", [-1, -(2**63), "vocab", POISON, 2**62])
@pytest.mark.parametrize("name", ["relu, two layers", "sizes of wgmma", "four roles"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unknown_id_spoils_its_own_request_alone(
    backend: str, device: torch.device, name: str, bad: int | str, dtype: str
) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, 5, 12)
    wanted = encode(spec, backend, device, ids, mask, DTYPES[dtype])
    ids[2, 0] = spec.vocab_size if bad == "vocab" else bad
    got = encode(spec, backend, device, ids, mask, DTYPES[dtype])
    assert got[2][mask[2]].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(got[others], wanted[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        "relu, two layers",
        "gated relu",
        "sizes of wgmma",
        "sizes of the long form",
        "sizes of mma, gated",
        "four roles",
    ],
)
def test_the_batch_changes_no_bit(
    backend: str, device: torch.device, name: str, dtype: str
) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, 90, 33)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    for form in forms_of(backend, spec):
        wanted = encode(spec, backend, device, ids, mask, DTYPES[dtype], form)
        for size in (1, 2, 3, 7, 16, 64):
            for begin in (0, 13):
                rows = slice(begin, begin + size)
                got = encode(spec, backend, device, ids[rows], mask[rows], DTYPES[dtype], form)
                assert torch.equal(got, wanted[rows]), f"{form}: {size} requests from {begin}"
        got = encode(spec, backend, device, ids[order], mask[order], DTYPES[dtype], form)
        assert torch.equal(got, wanted[order]), form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MLP_SPECS)
def test_forms_of_an_mlp_encoder_have_the_same_bits(
    backend: str, device: torch.device, name: str, dtype: str
) -> None:
    """Blocks of a cluster take different roles: no sum is cut otherwise."""
    spec = MLP_SPECS[name]
    ids, mask = requests(spec, 21, 60)
    wanted = encode(spec, backend, device, ids, mask, DTYPES[dtype], "throughput")
    for form in ("auto", "cluster1", "cluster2", "cluster4", "cluster8"):
        assert torch.equal(encode(spec, backend, device, ids, mask, DTYPES[dtype], form), wanted)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["relu, two layers", "four roles"])
def test_threads_of_the_cpu_change_no_bit(name: str) -> None:
    """One thread takes whole requests; more share the rows of a few, or take blocks of many."""
    spec = SPECS[name]
    cpu = torch.device("cpu")
    for batch, length in ((1, 82), (3, 40), (40, 30)):
        ids, mask = requests(spec, batch, length)
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(encode(spec, "cpu", cpu, ids, mask))
        assert all(torch.equal(found[0], other) for other in found[1:]), (batch, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("name", SPECS)
def test_each_instruction_set_of_the_cpu(name: str, isa: str, dtype: str) -> None:
    require_isa(isa)
    spec = SPECS[name]
    ids, mask = requests(spec, 4, 37)
    packed = fused_plan(spec, "cpu", "cpu", DTYPES[dtype]).packed
    assert packed is not None
    got = call(packed.operator, "cpu", arguments(packed, ids, mask, isa=ISAS.index(isa)))
    if dtype == "fp16" and isinstance(spec, T5Spec):
        exact = judge(spec, ids, mask)
        rough = (yardstick(spec, ids, mask, torch.bfloat16).double() - exact).abs().max().item()
        assert (got[mask].double() - exact).abs().max().item() <= rough / 2
    else:
        assert_close_enough(got, spec, ids, mask, f"{name}, {isa}, {dtype}")


def test_states_that_overflow_are_not_hidden(backend: str, device: torch.device) -> None:
    """Scores beyond float32 make states that are not finite: the decode then finds nothing."""
    spec = T5_SPECS["relu, two layers"]
    plan = fused_plan(spec, backend, device, dtype_of(backend, spec))
    packed = plan.packed
    assert packed is not None
    ids, mask = requests(spec, 2, 8)
    at = 4 if packed.layout == "rows" else 2  # the gain before the first attention, or all gains
    gains = packed.tensors[at].clone()
    gains.view(-1)[: spec.dim] = 1e25
    tensors = (*packed.tensors[:at], gains, *packed.tensors[at + 1 :])
    broken = dataclasses.replace(plan, packed=dataclasses.replace(packed, tensors=tensors))
    got = broken(ids.to(device), mask.to(device)).cpu()
    assert not got[mask].isfinite().all(dim=1).any()


LONG = [T5Spec(1, 64, 2, 32, 96, 100), MLPEncoderSpec(2, 4, 32, 48, 100, 1000)]


@pytest.mark.parametrize("spec", LONG, ids=["t5", "mlp"])
def test_long_requests(backend: str, device: torch.device, spec: T5Spec | MLPEncoderSpec) -> None:
    ids, mask = requests(spec, 2, 1000)
    got = encode(spec, backend, device, ids, mask, dtype_of(backend, spec))
    assert_close_enough(got, spec, ids, mask, "1,000 tokens")
