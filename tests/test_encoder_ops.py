"""`torch.ops.sidmlp.encode_*`: opcheck, fakes, torch.compile, torch.export, calls that do not fit;
how they are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import MLP_SPECS, SPECS, T5_SPECS, arguments, call, fused_plan, module_of, requests
from parity import DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sidmlp_kernels import MLPEncoderSpec, T5Spec, backends
from sidmlp_kernels.encoder_plan import plan_encoder
from sidmlp_kernels.ops import operator
from sidmlp_kernels.testing import exclude_tensors, make_problem

NAMES = {"encode_t5": "gated relu", "encode_mlp": "three roles, odd sizes"}


def legal(
    name: str, backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A legal call of the operator."""
    spec = SPECS[NAMES[name]]
    ids, mask = requests(spec, 3, 11)
    plan = fused_plan(spec, backend, device, dtype)
    assert plan.packed is not None
    return arguments(plan.packed, ids.to(device), mask.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: str, device: torch.device, name: str, dtype: str) -> None:
    given = legal(name, backend, device, DTYPES[dtype])
    torch.library.opcheck(operator(name, backend), tuple(given.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_real_shapes_and_dtypes(
    backend: str, device: torch.device, name: str, dtype: str
) -> None:
    given = legal(name, backend, device, DTYPES[dtype])
    real = call(name, backend, given)
    with FakeTensorMode() as mode:
        fake = call(name, backend, tree_map_only(torch.Tensor, mode.from_tensor, given))
    assert real.shape == fake.shape == (3, 11, SPECS[NAMES[name]].dim)
    assert real.dtype == fake.dtype == DTYPES[dtype]
    assert real.device == fake.device
    assert real.is_contiguous() == fake.is_contiguous()


class Encode(torch.nn.Module):
    def __init__(self, name: str, backend: str, device: torch.device) -> None:
        super().__init__()
        given = legal(name, backend, device)
        self.inputs = (given.pop("ids"), given.pop("mask"))
        self.rest = tuple(given.values())
        self.operator = operator(name, backend)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2 * self.operator(ids + 0, mask, *self.rest)


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_graph_breaks(backend: str, device: torch.device, name: str) -> None:
    model = Encode(name, backend, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (3, 2):
        inputs = tuple(tensor[:rows] for tensor in model.inputs)
        assert torch.equal(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_export_with_any_batch(backend: str, device: torch.device, name: str) -> None:
    model = Encode(name, backend, device)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"ids": {0: batch}, "mask": {0: batch}}
    exported = torch.export.export(model, model.inputs, dynamic_shapes=shapes)
    inputs = tuple(tensor[1:] for tensor in model.inputs)
    assert torch.equal(exported.module()(*inputs), model(*inputs))


# --- Calls that do not fit: a RuntimeError that names the argument, never a crash. ---

Change = Callable[[dict[str, Any]], dict[str, Any]]


def on(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda given: {name: change(given[name])}


def at(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """One of the encoder's tensors, changed."""
    return lambda given: {
        "encoder": [change(t) if i == index else t for i, t in enumerate(given["encoder"])]
    }


def size(index: int, value: int) -> Change:
    return on("sizes", lambda sizes: [value if i == index else s for i, s in enumerate(sizes)])


def short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].contiguous()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


COMMON: dict[str, tuple[Change, str]] = {
    "ids 1-d": (on("ids", lambda t: t[0]), "ids"),
    "ids int32": (on("ids", torch.Tensor.int), "ids"),
    "ids strided": (on("ids", strided), "ids"),
    "mask uint8": (on("mask", torch.Tensor.byte), "mask"),
    "mask short": (on("mask", short), "mask"),
    "mask strided": (on("mask", strided), "mask"),
    "no tensors": (on("encoder", lambda t: []), "encoder"),
    "few tensors": (on("encoder", lambda t: t[:-1]), "encoder"),
    "embedding short": (at(0, short), "encoder.embedding"),
    "embedding double": (at(0, torch.Tensor.double), "encoder.embedding"),
    "weights of two dtypes": (at(3, torch.Tensor.bfloat16), "encoder.0."),
    "weight strided": (at(3, strided), "encoder.0."),
    "weight short": (at(6, short), "encoder.0."),
    "no sizes": (on("sizes", lambda s: []), "sizes"),
    "few sizes": (on("sizes", lambda s: s[:-1]), "sizes"),
    "no layers": (size(0, 0), "number of layers"),
    "nine layers": (size(0, 9), "number of layers"),
    "dim huge": (size(1, 2**40), "dim"),
    "dim negative": (size(1, -3), "dim"),
    "eps 0": (on("layer_norm_eps", lambda eps: 0.0), "layer_norm_eps"),
    "eps NaN": (on("layer_norm_eps", lambda eps: float("nan")), "layer_norm_eps"),
    "form 3": (on("form", lambda form: 3), "form"),
    "form -1": (on("form", lambda form: -1), "form"),
}
FAULTS: dict[str, dict[str, tuple[Change, str]]] = {
    "encode_t5": {
        **COMMON,
        "bias short": (at(1, short), "encoder.position_bias"),
        "norms bf16": (at(2, torch.Tensor.bfloat16), "encoder.norms"),
        "no heads": (size(2, 0), "num_heads"),
        "head_dim 0": (size(3, 0), "head_dim"),
        "another head_dim": (size(3, 17), "encoder.0.query"),
        "ffn_dim 0": (size(4, 0), "ffn_dim"),
        "vocabulary of another size": (size(5, 7), "encoder.embedding"),
        "activation 4": (size(6, 4), "activation"),
        "not gated": (size(6, 0), "encoder.0.ffn_up"),
        "bias of no tokens": (size(7, 0), "position bias"),
    },
    "encode_mlp": {
        **COMMON,
        "positions short": (at(1, short), "encoder.positions"),
        "norm bf16": (at(2, torch.Tensor.bfloat16), "encoder.norm"),
        "nine roles": (size(2, 9), "roles"),
        "two roles": (size(2, 2), "encoder.0.token"),
        "hidden_dim 0": (size(3, 0), "hidden_dim"),
        "another vocabulary": (size(4, 7), "encoder.embedding"),
        "more tokens than positions": (
            lambda given: {
                name: given[name].repeat(1, 28)[:, :301].contiguous() for name in ("ids", "mask")
            },
            "ids: expected at most 300 tokens",
        ),
    },
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in NAMES for fault in FAULTS[name]]
)
def test_a_call_that_does_not_fit(
    backend: str, device: torch.device, name: str, fault: str
) -> None:
    given = legal(name, backend, device)
    change, named = FAULTS[name][fault]
    with pytest.raises(RuntimeError) as caught:
        call(name, backend, given | change(given))
    message = str(caught.value).splitlines()[0]
    assert named in message, message
    assert "expected" in message, message


@pytest.mark.parametrize("isa", [-1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_instruction_set(name: str, isa: int) -> None:
    given = legal(name, "cpu", "cpu")
    with pytest.raises(RuntimeError, match="isa: expected"):
        call(name, "cpu", given | {"isa": isa})


# --- Choosing. ---


def test_the_cpu_says_which_encoders_it_cannot_run() -> None:
    assert not backends.encoder_why_not("cpu", T5_SPECS["gelu"], "bfloat16")
    assert not backends.encoder_why_not("cpu", MLP_SPECS["four roles"], torch.float16)
    deep = T5Spec(9, 16, 2, 8, 24, 30)
    reason = backends.encoder_why_not("cpu", deep, "float32")
    assert reason == "num_layers: expected at most 8, got 9"


def test_forms_that_are_asked_for_run_or_raise() -> None:
    cpu, fp32 = torch.device("cpu"), torch.float32
    spec = T5_SPECS["gelu"]
    module, (ids, mask) = module_of(spec), requests(spec, 2, 9)
    fused = plan_encoder(module, "cpu", cpu, fp32)
    assert str(fused) == "encoder: encode_t5 on cpu, form by batch"
    clusters = plan_encoder(module, "cpu", cpu, fp32, "cluster8")
    assert str(clusters) == "encoder: encode_t5 on cpu, form cluster8"
    assert torch.equal(clusters(ids, mask), fused(ids, mask))
    plain = plan_encoder(module, "cpu", cpu, fp32, "torch")
    assert str(plain) == "encoder: plain PyTorch (as asked for)"
    assert torch.equal(plain(ids, mask), module(ids, mask))

    deep = module_of(T5Spec(9, 16, 2, 8, 24, 30))
    assert str(plan_encoder(deep, "cpu", cpu, fp32)) == (
        "encoder: plain PyTorch (num_layers: expected at most 8, got 9)"
    )
    for form in ("cluster2", "throughput"):
        with pytest.raises(ValueError, match="num_layers: expected at most 8, got 9"):
            plan_encoder(deep, "cpu", cpu, fp32, form)
        with pytest.raises(ValueError, match="a callable of the caller's"):
            plan_encoder(lambda ids, mask: ids, "cpu", cpu, fp32, form)
    with pytest.raises(ValueError, match="encoder_form: expected 'auto' or"):
        plan_encoder(module, "cpu", cpu, fp32, "fast")


# --- recommend: an encoder and decode_states in one call (CPU). ---


def recommend_call(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A legal call of `recommend`, argument by argument."""
    spec = T5Spec(1, 24, 2, 12, 40, 30) if kind == "t5" else MLPEncoderSpec(1, 3, 24, 32, 30, 16)
    packed = plan_encoder(module_of(spec), "cpu", torch.device("cpu"), dtype)
    problem = make_problem((5, 4, 6), seed=1, dim=24, hidden_dim=20, num_items=80, excluded=5)
    plan = problem.plan("cpu", dtype=dtype)
    ids, mask = requests(spec, problem.batch, 11)
    tensors, sizes, eps, form = packed.operator_args()
    readout = {"readout": list(plan.packed.readout)}
    exclude_ids, exclude_offsets = exclude_tensors(problem.exclude, "cpu")
    names = ("sizes", "layer_norm_eps", "k", "num_beams", "codebook", "temperatures")
    rest = dict(
        zip(
            (*names, "level_weights", "level_modes", "launches", "isa"),
            plan._decode_args,
            strict=True,
        )
    )
    return {
        "ids": ids,
        "mask": mask,
        "encoder": tensors,
        "encoder_sizes": sizes,
        "encoder_eps": eps,
        "form": form,
        **readout,
        "heads": list(plan.packed.heads),
        "catalogue": plan.snapshot.trie_tensors("cpu"),
        "exclude_ids": exclude_ids,
        "exclude_offsets": exclude_offsets,
        **rest,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["t5", "mlp"])
def test_recommend_has_the_bits_of_its_two_parts(kind: str, dtype: str) -> None:
    given = recommend_call(kind, DTYPES[dtype])
    encode = operator(f"encode_{kind}", "cpu")
    values = list(given.values())
    states = encode(*values[:6], 0)
    wanted = operator("decode_states", "cpu")(states, given["mask"], *values[6:])
    got = operator("recommend", "cpu")(*values)
    assert len(got) == 4
    for have, want in zip(got, wanted, strict=True):
        assert torch.equal(have, want)
    given["ids"][1, 0] = -5  # a valid id that is none: no items for that request
    counts = operator("recommend", "cpu")(*given.values())[3]
    assert counts.tolist() == [*wanted[3][:1].tolist(), 0, *wanted[3][2:].tolist()]


@pytest.mark.parametrize("kind", ["t5", "mlp"])
def test_opcheck_of_recommend(kind: str) -> None:
    torch.library.opcheck(operator("recommend", "cpu"), tuple(recommend_call(kind).values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder_sizes": [1, 2, 3]}, "encoder_sizes: expected"),
        ({"encoder": []}, "encoder: expected"),
        ({"heads": []}, "heads: expected"),
        ({"k": 0}, "k "),
        ({"isa": 9}, "isa: expected"),
    ],
)
def test_recommend_refuses_what_does_not_fit(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        operator("recommend", "cpu")(*(recommend_call("t5") | change).values())
    assert named in str(caught.value).splitlines()[0]


def test_recommend_of_a_width_that_is_not_the_students() -> None:
    given = recommend_call("t5")
    spec = T5Spec(1, 16, 2, 12, 40, 30)
    packed = plan_encoder(module_of(spec), "cpu", torch.device("cpu"), torch.float32)
    tensors, sizes, *_ = packed.operator_args()
    with pytest.raises(RuntimeError, match="states: expected shape"):
        operator("recommend", "cpu")(
            *(given | {"encoder": tensors, "encoder_sizes": sizes}).values()
        )
