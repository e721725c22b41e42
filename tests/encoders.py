"""Encoders of tests: random ones of given sizes, requests for them, calls of their operators."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from sidmlp.mlp_encoder import MLPEncoder as ReferenceMLPEncoder
from sidmlp.mlp_encoder import MLPEncoderConfig
from sidmlp_kernels import MLPEncoder, MLPEncoderSpec, T5Encoder, T5Spec, backends
from sidmlp_kernels.encoder_packing import SHORT_TOKENS, PackedEncoder
from sidmlp_kernels.encoder_plan import EncoderPlan, plan_encoder
from sidmlp_kernels.ops import operator

T5_SPECS = {
    "relu, two layers": T5Spec(2, 48, 3, 16, 80, 91),
    "one layer, attention wider than the model": T5Spec(1, 20, 5, 12, 33, 40),
    "gated gelu, few buckets": T5Spec(
        2, 24, 2, 7, 30, 50, "gated-gelu", relative_buckets=6, relative_max_distance=9
    ),
    "gated relu": T5Spec(1, 16, 4, 4, 24, 30, "gated-relu", layer_norm_eps=1e-5),
    "gelu": T5Spec(1, 16, 2, 8, 24, 30, "gelu"),
    "sizes of wgmma": T5Spec(2, 128, 3, 64, 192, 91),
    "gelu, sizes of wgmma": T5Spec(1, 128, 2, 64, 128, 40, "gelu"),
    "gelu, sizes of mma": T5Spec(1, 64, 2, 32, 96, 40, "gelu"),
    "sizes of the long form": T5Spec(2, 256, 3, 64, 256, 91),
    "sizes of mma, gated": T5Spec(2, 64, 4, 16, 128, 70, "gated-gelu"),
}
MLP_SPECS = {
    "four roles": MLPEncoderSpec(2, 4, 24, 40, 50, 300),
    "one role, one layer": MLPEncoderSpec(1, 1, 16, 16, 9, 300),
    "three roles, odd sizes": MLPEncoderSpec(3, 3, 20, 33, 60, 300, layer_norm_eps=1e-6),
}
SPECS: dict[str, T5Spec | MLPEncoderSpec] = {**T5_SPECS, **MLP_SPECS}


def teacher_of(spec: T5Spec, seed: int = 0) -> T5EncoderModel:
    """A random transformers encoder of these sizes, its norms and biases made visible."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=spec.vocab_size,
        d_model=spec.dim,
        d_kv=spec.head_dim,
        d_ff=spec.ffn_dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        relative_attention_num_buckets=spec.relative_buckets,
        relative_attention_max_distance=spec.relative_max_distance,
        feed_forward_proj=spec.feed_forward,
        layer_norm_epsilon=spec.layer_norm_eps,
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Scores that saturate a softmax would make a rounding as large as the states.
            scale = 0.2 if parameter.ndim == 1 else 0.5 / parameter.shape[1] ** 0.5
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def ours_of(spec: T5Spec, teacher: T5EncoderModel) -> T5Encoder:
    return T5Encoder.from_weights(spec, teacher.encoder.state_dict())


def reference_of(spec: MLPEncoderSpec, seed: int = 0) -> ReferenceMLPEncoder:
    """The reference's MLP encoder of these sizes with random weights, biases and gains too."""
    torch.manual_seed(seed)
    model = ReferenceMLPEncoder(MLPEncoderConfig(**asdict(spec))).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def module_of(spec: T5Spec | MLPEncoderSpec, seed: int = 0) -> T5Encoder | MLPEncoder:
    """The package's own PyTorch module with the weights of teacher_of or reference_of."""
    if isinstance(spec, T5Spec):
        return ours_of(spec, teacher_of(spec, seed))
    return MLPEncoder.from_weights(spec, reference_of(spec, seed).state_dict())


def fused_plan(
    spec: T5Spec | MLPEncoderSpec,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    form: str = "auto",
    max_tokens: int = SHORT_TOKENS[0],
) -> EncoderPlan:
    """The backend's operator, ready to run; the test is skipped where it has none for the sizes."""
    reason = backends.encoder_why_not(backend, spec, dtype)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    return plan_encoder(module_of(spec), backend, torch.device(device), dtype, form, max_tokens)


@torch.no_grad()
def judge(spec: T5Spec | MLPEncoderSpec, ids: Tensor, mask: Tensor) -> Tensor:
    """Exact states [valid tokens, D], float64: by the reference; of T5 by the plain module, which
    test_encoder.py ties to transformers (whose own RMSNorm is in fp32 even in a float64 model)."""
    if isinstance(spec, T5Spec):
        return module_of(spec).double()(ids, mask)[mask]
    return reference_of(spec).double()(ids, mask)[mask]


@torch.no_grad()
def yardstick(
    spec: T5Spec | MLPEncoderSpec, ids: Tensor, mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """States [valid tokens, D] that ordinary PyTorch computes in `dtype`."""
    if isinstance(spec, T5Spec):
        teacher = teacher_of(spec).to(dtype)
        return teacher(input_ids=ids, attention_mask=mask).last_hidden_state[mask]
    return reference_of(spec).to(dtype)(ids, mask)[mask]


def requests(
    spec: T5Spec | MLPEncoderSpec, batch: int, length: int, seed: int = 1
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < lengths
    mask[0] = True
    if batch > 1:
        mask[1] = torch.rand(length, generator=generator) < 0.5  # holes are legal too
        mask[1, 0] = True
    return ids, mask


def arguments(
    packed: PackedEncoder, ids: Tensor, mask: Tensor, form: int = 0, isa: int = 0
) -> dict[str, Any]:
    """A call of the encoder's operator, argument by argument."""
    return {
        "ids": ids,
        "mask": mask,
        "encoder": list(packed.tensors),
        "sizes": list(packed.sizes),
        "layer_norm_eps": packed.spec.layer_norm_eps,
        "form": form,
        "isa": isa,
    }


def call(name: str, backend: str, given: dict[str, Any]) -> Tensor:
    return operator(name, backend)(*given.values())
