"""Launches of the Triton encoders, recorded instead of launched; compiled_triton.py compiles."""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

import torch
from compiled_triton import META, Launch, Recorder
from torch import Tensor

from sidmlp_kernels import MLPEncoder, MLPEncoderSpec, T5Encoder, T5Spec
from sidmlp_kernels.ops.triton import encoder_bound
from sidmlp_kernels.ops.triton.encoder_packing import mlp_tensors, t5_tensors
from sidmlp_kernels.ops.triton.tiles import MOST_SHARED
from sidmlp_kernels.spec import FEED_FORWARDS


def packed(spec: T5Spec | MLPEncoderSpec, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Tensors and sizes as `pack_encoder` makes them, without numbers."""

    def rounded(name: str, matrix: Tensor) -> Tensor:
        del name
        return matrix.to(dtype)

    def weights(module: torch.nn.Module) -> Mapping[str, Tensor]:
        return {name: tensor.double() for name, tensor in module.state_dict().items()}

    with META:
        if isinstance(spec, MLPEncoderSpec):
            sizes = [spec.num_layers, spec.dim, spec.num_roles, spec.hidden_dim]
            tensors = mlp_tensors(spec, weights(MLPEncoder(spec)), rounded)
            return tensors, [*sizes, spec.vocab_size, spec.max_length]
        bias = torch.empty(spec.num_heads, 2 * 129 - 1)
        tensors = t5_tensors(spec, weights(T5Encoder(spec)), bias, rounded)
        widths = [spec.num_heads, spec.head_dim, spec.ffn_dim, spec.vocab_size]
        activation = FEED_FORWARDS.index(spec.feed_forward)
        return tensors, [spec.num_layers, spec.dim, *widths, activation, 129]


def record_encoder(
    spec: T5Spec | MLPEncoderSpec,
    dtype: torch.dtype,
    *,
    shared: int = MOST_SHARED,
    batch: int = 3,
    tokens: int = 82,
) -> list[Launch]:
    """What a call launches, each kind once. shared: kilobytes that the GPU offers a program."""
    tensors, sizes = packed(spec, dtype)
    ids = torch.empty(batch, tokens, dtype=torch.int64, device=META)
    Recorder.launches.clear()
    with (
        mock.patch.object(encoder_bound, "BoundKernel", Recorder),
        mock.patch.object(encoder_bound, "shared_kilobytes", return_value=shared),
    ):
        bound = encoder_bound.bind_encoder(tensors, sizes, spec.layer_norm_eps, 0, META)
        assert bound(ids, ids.bool()).shape == (batch, tokens, spec.dim)
    launches = list(dict.fromkeys(Recorder.launches))
    Recorder.launches.clear()
    return launches
