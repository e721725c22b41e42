"""The Triton encoders' host side: packed arrays, choosing, plans; and `recommend` on a GPU. What
they compute: test_fused_encoder.py on a GPU, test_triton_interpreter.py without one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from encoders import MLP_SPECS, SPECS, T5_SPECS, module_of, requests

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

import triton_recommend
from small_recommender import TOKENS, make_catalogue, make_student

import sidmlp_kernels as sk
from sidmlp_kernels import MLPEncoderSpec, T5Spec, backends, encoder_plan
from sidmlp_kernels.encoder_packing import MAX_TOKENS, pack_encoder
from sidmlp_kernels.encoder_plan import plan_encoder
from sidmlp_kernels.ops.triton import encoder_bound, encoder_problem
from sidmlp_kernels.packing import round_once

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def corner(matrix: torch.Tensor, wanted: torch.Tensor) -> None:
    """AssertionError unless `matrix` begins with `wanted` and holds zeros elsewhere."""
    rest = matrix.clone()
    inside = tuple(slice(0, n) for n in wanted.shape)
    assert torch.equal(matrix[inside], wanted)
    rest[inside] = 0
    assert not rest.any()


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_arrays_of_a_t5_encoder(feed_forward: str) -> None:
    """Heads of 12 begin every 16 columns, three of them fill 48 of 64; every padding is zeros."""
    spec = T5Spec(2, 20, 3, 12, 70, 9, feed_forward)
    module = module_of(spec)
    packed = pack_encoder(module, torch.bfloat16, "triton")
    plain = pack_encoder(module, torch.bfloat16)
    assert (packed.layout, packed.operator, packed.sizes) == ("padded", "encode_t5", plain.sizes)
    assert packed.max_tokens == MAX_TOKENS
    w = {name: round_once(t.double(), torch.bfloat16) for name, t in module.state_dict().items()}
    embedding, bias, norms, *layers = packed.tensors
    corner(embedding, w["embed_tokens.weight"])
    assert embedding.shape == (9, 32)
    assert torch.equal(bias, plain.tensors[1])
    gains = [f"block.{i}.layer.{j}.layer_norm.weight" for i in (0, 1) for j in (0, 1)]
    gains.append("final_layer_norm.weight")
    corner(norms, torch.stack([module.state_dict()[name] for name in gains]))
    for i in (0, 1):
        *qkv, output, ffn_in, ffn_up, ffn_out = layers[7 * i : 7 * i + 7]
        at = f"block.{i}.layer.0.SelfAttention."
        for matrix, name in zip([*qkv, output.T], "qkvo", strict=True):
            assert matrix.shape == (32, 64)
            own = w[f"{at}{name}.weight"]
            own = own if name == "o" else own.T  # [D, heads * head_dim]
            by_head = torch.zeros(20, 64, dtype=torch.bfloat16)
            for head in range(3):
                by_head[:, 16 * head : 16 * head + 12] = own[:, 12 * head : 12 * head + 12]
            corner(matrix, by_head)
        at = f"block.{i}.layer.1.DenseReluDense."
        if feed_forward == "relu":
            corner(ffn_in, w[f"{at}wi.weight"].T)
            assert ffn_up.numel() == 0
        else:
            corner(ffn_in, w[f"{at}wi_0.weight"].T)
            corner(ffn_up, w[f"{at}wi_1.weight"].T)
        corner(ffn_out, w[f"{at}wo.weight"].T)
        assert ffn_in.shape == ffn_out.T.shape == (32, 128)
    sizes = encoder_problem.T5Sizes.of(packed.sizes)
    assert encoder_problem.check_t5(sizes, packed.tensors, CPU) == torch.bfloat16


def test_arrays_of_an_mlp_encoder() -> None:
    spec = MLP_SPECS["three roles, odd sizes"]
    module = module_of(spec)
    packed = pack_encoder(module, torch.float16, "triton")
    w = {name: round_once(t.double(), torch.float16) for name, t in module.state_dict().items()}
    fp32 = module.state_dict()
    embedding, positions, norm, *layers = packed.tensors
    corner(embedding, w["embed_tokens.weight"])
    corner(positions, w["embed_positions.weight"])
    corner(norm, torch.stack([fp32["final_layer_norm.weight"], fp32["final_layer_norm.bias"]]))
    for i in range(3):
        token, mean, vectors, out, bias = layers[5 * i : 5 * i + 5]
        for role in range(3):
            at = f"layers.{i}.roles.{role}."
            first = w[f"{at}linear_in.weight"].T
            corner(token[role], first[:20])
            corner(mean[role], first[20:])
            names = ("linear_in.bias", "norm.weight", "norm.bias")
            corner(vectors[role], torch.stack([fp32[at + name] for name in names]))
            corner(out[role], w[f"{at}linear_out.weight"].T)
            corner(bias[role], fp32[f"{at}linear_out.bias"])
        assert token.shape == mean.shape == (3, 32, 64)
    sizes = encoder_problem.MlpSizes.of(packed.sizes)
    assert encoder_problem.check_mlp(sizes, packed.tensors, CPU) == torch.float16


def test_the_backend_says_which_encoders_it_cannot_run() -> None:
    for spec in SPECS.values():
        for dtype in DTYPES.values():
            assert backends.encoder_why_not("triton", spec, dtype) == ""
    large = T5Spec(9, 1025, 4097, 257, (1 << 20) + 1, 30)
    reason = backends.encoder_why_not("triton", large, "bfloat16")
    for part in (
        "dim: expected at most 1024, got 1025",
        "num_heads: expected at most 4096, got 4097",
        "head_dim: expected at most 256, got 257",
        "ffn_dim: expected at most 1048576, got 1048577",
        "num_layers: expected at most 8, got 9",
    ):
        assert part in reason
    wide = MLPEncoderSpec(1, 4, 128, 16385, 9, 82)
    reason = backends.encoder_why_not("triton", wide, "float32")
    assert reason == "hidden_dim: expected at most 16384, got 16385"
    with pytest.raises(ValueError, match=r"backend triton for 'cluster2'.*head_dim: expected at"):
        plan_encoder(
            module_of(T5Spec(1, 8, 1, 257, 8, 9)), "triton", CPU, torch.float32, "cluster2"
        )


class Bound:
    """Stands for what needs a GPU."""

    def __init__(self, *arguments: Any) -> None:
        self.sizes = arguments[1]


def test_auto_encodes_on_triton_what_cuda_has_no_operator_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_bound, "bind_encoder", Bound)
    monkeypatch.setattr(encoder_plan, "why_not", lambda name, **sizes: "")
    module, half = module_of(T5_SPECS["gated gelu, few buckets"]), torch.bfloat16
    missing = backends.encoder_why_not("cuda", module.spec, half)
    assert missing
    others = backends.encoder_others("cuda", half)
    plan = plan_encoder(module, "cuda", CPU, half, others=others)
    assert plan.backend == "triton"
    assert not plan.joins_decode
    assert str(plan) == (
        f"encoder: encode_t5 on triton, form the only one: 3 launches, since cuda: {missing}"
    )
    explicit = plan_encoder(module, "cuda", CPU, half)
    assert str(explicit) == f"encoder: plain PyTorch ({missing})"
    with pytest.raises(ValueError, match="expected a fused encoder on backend cuda"):
        plan_encoder(module, "cuda", CPU, half, "throughput", others=others)
    monkeypatch.setattr(encoder_plan, "why_not", lambda name, **sizes: "no GPU")
    assert plan_encoder(module, "cuda", CPU, half, others=others).packed is None
    assert backends.encoder_others("cuda", torch.float32) == ()
    assert backends.encoder_others("cpu", half) == backends.encoder_others("triton", half) == ()


# ---- on a GPU ----


@pytest.fixture
def triton_device(cuda: torch.device) -> torch.device:
    reason = backends.why_not("triton")
    if reason:
        pytest.skip(f"backend triton: {reason}")
    return cuda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", triton_recommend.SPECS)
def test_recommend_has_the_bits_of_its_two_parts(
    triton_device: torch.device, name: str, dtype: str
) -> None:
    triton_recommend.check(name, triton_device, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_in_parts(
    triton_device: torch.device, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in (T5_SPECS["relu, two layers"], MLP_SPECS["four roles"]):
        plan = plan_encoder(module_of(spec), "triton", triton_device, DTYPES[dtype])
        ids, mask = (tensor.to(triton_device) for tensor in requests(spec, 30, 50))
        wanted = plan(ids, mask)
        with monkeypatch.context() as patch:
            patch.setattr(encoder_bound, "MAX_WORKSPACE", 1 << 17)
            assert torch.equal(plan(ids, mask), wanted)


def test_a_recommender_encodes_on_triton(triton_device: torch.device) -> None:
    """By "auto", whatever decodes: CUDA has no operator for heads of 7."""
    spec = T5Spec(1, 16, 2, 7, 24, TOKENS.vocab_size)
    module = module_of(spec)
    parts = (make_student(), make_catalogue(), module)
    auto = sk.Recommender(*parts, tokens=TOKENS, device=triton_device, dtype="bfloat16")
    assert "encode_t5 on triton" in str(auto._encoder)
    plain = sk.Recommender(
        *parts, tokens=TOKENS, device=triton_device, dtype="bfloat16", encoder_form="torch"
    )
    histories = [[100, 101, 102], [], [159, 130]]
    got, wanted = (m.decode(m.batch(histories), k=8, num_beams=15) for m in (auto, plain))
    assert torch.equal(got.counts, wanted.counts)
    torch.testing.assert_close(got.scores, wanted.scores, rtol=0.05, atol=0.3)
