"""The Triton encoders in Triton's interpreter, on the CPU; run as interpreted_triton.py is, and for
the same reasons without bfloat16."""

from __future__ import annotations

import dataclasses

import interpreted_triton  # mends the interpreter
import pytest
import torch
import triton_recommend
from encoders import SPECS, arguments, call, judge, module_of, requests, yardstick
from test_encoder_ops import FAULTS, NAMES, legal
from torch import Tensor

from sidmlp_kernels import MLPEncoderSpec, T5Spec, backends
from sidmlp_kernels.encoder_plan import EncoderPlan, plan_encoder
from sidmlp_kernels.ops.triton import encoder_bound, encoder_tiles, launch
from sidmlp_kernels.testing import rounding_floor

assert launch.INTERPRETED, "kernels were imported without TRITON_INTERPRET=1"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CPU = torch.device("cpu")
POISON = 2147480000
ODD = ("gated gelu, few buckets", "three roles, odd sizes")  # one of each kind
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def small_tiles_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend as one of the CPU, with tiles of 16 in every direction: every loop runs
    several times, and rows of more than 16 elements pass through memory."""
    known = tuple(
        dataclasses.replace(known, device_type="cpu", why_not=lambda sizes: "")
        if known.name == "triton"
        else known
        for known in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", known)
    interpreted_triton.set_tiles(monkeypatch)
    set_tiles(monkeypatch)


def set_tiles(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Tiles of 16, but for `changes`; masks are read 16 at a time, too."""
    smallest = {field.name: 16 for field in dataclasses.fields(encoder_tiles.EncoderTiles)}
    tiles = encoder_tiles.EncoderTiles(**{**smallest, "warps": 1, "stages": 1, **changes})
    rows = [dataclasses.replace(row, tiles=tiles) for row in encoder_tiles.TABLE]
    monkeypatch.setattr(encoder_tiles, "TABLE", tuple(rows))
    monkeypatch.setattr(encoder_bound, "LISTED_TOKENS", 16)


def plan_of(spec: T5Spec | MLPEncoderSpec, dtype: torch.dtype = torch.float32) -> EncoderPlan:
    plan = plan_encoder(module_of(spec), "triton", CPU, dtype)
    assert plan.packed is not None
    assert plan.packed.layout == "padded"
    return plan


def encode(name: str, ids: Tensor, mask: Tensor, dtype: str = "fp32") -> Tensor:
    return plan_of(SPECS[name], DTYPES[dtype])(ids, mask)


def assert_close(
    got: Tensor, spec: T5Spec | MLPEncoderSpec, ids: Tensor, mask: Tensor, rough: torch.dtype
) -> None:
    """Tier 2, against ordinary PyTorch in `rough`."""
    exact = judge(spec, ids, mask)
    theirs = (yardstick(spec, ids, mask, rough).double() - exact).abs().max().item()
    ours = (got[mask].double() - exact).abs().max().item()
    bound = 2 * theirs + rounding_floor(exact, rough)
    assert ours <= bound, f"error {ours:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"
    assert bool((got[~mask] == 0).all())


@pytest.mark.parametrize(
    ("name", "batch", "length"),
    [
        *((name, 2, 20) for name in SPECS if "wgmma" not in name),
        *((name, 1, 1) for name in ODD),
        *((name, 2, 37) for name in ODD),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states(name: str, batch: int, length: int, dtype: str) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, batch, length)
    got = encode(name, ids, mask, dtype)
    assert got.dtype == DTYPES[dtype]
    # transformers keeps the residual in fp16, so for T5 it is no yardstick there; bf16 is one.
    half = torch.bfloat16 if isinstance(spec, T5Spec) else torch.float16
    assert_close(got, spec, ids, mask, torch.float32 if dtype == "fp32" else half)


@pytest.mark.parametrize("name", ODD)
def test_tiles_as_the_table_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    spec = SPECS[name]
    ids, mask = requests(spec, 2, 70)
    for dtype in DTYPES.values():
        rough = torch.bfloat16 if dtype == torch.float16 else dtype
        assert_close(plan_of(spec, dtype)(ids, mask), spec, ids, mask, rough)


@pytest.mark.parametrize("name", ODD)
def test_rows_in_memory_and_in_registers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision adds products in the same order either way."""
    spec = SPECS[name]
    ids, mask = requests(spec, 2, 20)
    assert encoder_tiles.choose_encoder_tiles(True, 32).inner == 16
    parts = encode(name, ids, mask)
    set_tiles(monkeypatch, inner=32)
    whole = encode(name, ids, mask)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert_close(whole, spec, ids, mask, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ODD)
def test_padding_changes_no_bit_and_is_never_read(name: str, dtype: str) -> None:
    ids, mask = requests(SPECS[name], 3, 24)
    poisoned = torch.where(mask, ids, POISON)
    poisoned[:, ::2] = torch.where(mask[:, ::2], ids[:, ::2], -1)
    wanted = encode(name, ids, mask, dtype)
    assert torch.equal(encode(name, poisoned, mask, dtype), wanted)
    for b in range(3):
        length = int(mask[b].nonzero().max()) + 1
        alone = encode(name, ids[b : b + 1, :length], mask[b : b + 1, :length], dtype)
        assert torch.equal(alone[0], wanted[b, :length]), f"request {b}, {length} tokens"


@pytest.mark.parametrize("name", ODD)
def test_parts_of_a_batch_and_programs_do_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = requests(SPECS[name], 3, 20)
    wanted = encode(name, ids, mask)
    monkeypatch.setattr(encoder_bound, "PROGRAMS_PER_MULTIPROCESSOR", 1)  # 4 in all
    assert torch.equal(encode(name, ids, mask), wanted)
    launches: list[int] = []
    kernel = encoder_bound.BoundKernel.launch
    monkeypatch.setattr(
        encoder_bound.BoundKernel,
        "launch",
        lambda self, programs, values: (launches.append(programs), kernel(self, programs, values)),
    )
    monkeypatch.setattr(encoder_bound, "MAX_WORKSPACE", 1)  # one request at a time
    assert torch.equal(encode(name, ids, mask), wanted)
    assert len(launches) == 3 * (SPECS[name].num_layers + 1)


@pytest.mark.parametrize("bad", [-1, "vocab", 2**62])
@pytest.mark.parametrize("name", ODD)
def test_an_unknown_id_spoils_its_own_request_alone(name: str, bad: int | str) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, 2, 18)
    wanted = encode(name, ids, mask)
    where = int(mask[1].nonzero().max())
    ids[1, where] = spec.vocab_size if bad == "vocab" else bad
    got = encode(name, ids, mask)
    assert bool(got[1][mask[1]].isnan().all())
    assert bool((got[1][~mask[1]] == 0).all())
    assert torch.equal(got[0], wanted[0])


@pytest.mark.parametrize("name", ODD)
def test_requests_without_tokens(name: str) -> None:
    spec = SPECS[name]
    for batch, length in ((0, 5), (3, 0)):
        ids = torch.zeros(batch, length, dtype=torch.int64)
        assert encode(name, ids, ids.bool()).shape == (batch, length, spec.dim)
    ids, mask = requests(spec, 3, 9)
    mask[1] = False
    got = encode(name, ids, mask)
    assert bool((got[1] == 0).all())
    others = torch.tensor([0, 2])
    assert torch.equal(got[others], encode(name, ids[others], mask[others]))


def test_states_that_overflow_are_not_hidden() -> None:
    plan = plan_of(SPECS["relu, two layers"])
    packed = plan.packed
    assert packed is not None
    ids, mask = requests(packed.spec, 2, 8)
    gains = packed.tensors[2].clone()
    gains[0] = 1e25
    tensors = (*packed.tensors[:2], gains, *packed.tensors[3:])
    broken = dataclasses.replace(plan, packed=dataclasses.replace(packed, tensors=tensors))
    assert not broken(ids, mask)[mask].isfinite().all(dim=1).any()


@pytest.mark.parametrize("name", triton_recommend.SPECS)
def test_recommend_has_the_bits_of_its_two_parts(name: str) -> None:
    triton_recommend.check(name, CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in NAMES for fault in FAULTS[name]]
)
def test_a_call_that_does_not_fit(name: str, fault: str) -> None:
    given = legal(name, "triton", CPU)
    change, named = FAULTS[name][fault]
    with pytest.raises(RuntimeError) as caught:
        call(name, "triton", given | change(given))
    assert named in str(caught.value), caught.value
    assert "expected" in str(caught.value), caught.value


@pytest.mark.parametrize("name", ODD)
def test_every_form_is_the_only_one(name: str) -> None:
    spec = SPECS[name]
    ids, mask = requests(spec, 2, 9)
    plan = plan_of(spec)
    packed = plan.packed
    assert packed is not None
    launches = spec.num_layers + 1
    assert str(plan).endswith(f"on triton, form the only one: {launches} launches")
    wanted = plan(ids, mask)
    for form in (0, 8, 16):  # the operator answers as its plan
        got = call(packed.operator, "triton", arguments(packed, ids, mask, form))
        assert torch.equal(got, wanted)
