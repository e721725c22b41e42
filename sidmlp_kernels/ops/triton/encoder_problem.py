"""Encoder arguments, checked, with the words of csrc/torch/encoder_problem.cpp, which does this for
the CPU and CUDA operators. Shapes of arrays are in encoder_packing.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidmlp_kernels.ops.triton.encoder_packing import padded_hidden, power_of_two
from sidmlp_kernels.ops.triton.encoder_tiles import MAX_DIM, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN
from sidmlp_kernels.ops.triton.problem import (
    MAX_WIDTH,
    check_aligned,
    check_count,
    check_place,
    check_size,
    check_tensor,
    fail,
    weight_dtype,
)
from sidmlp_kernels.spec import MAX_LEVELS

MAX_LAYERS = 8  # csrc/sidmlp/encoder_view.h
MAX_VOCABULARY = 2**31 - 1
GATED = (2, 3)  # activations, in the order of spec.FEED_FORWARDS
FORMS = (0, 1, 2, 4, 8, 16, 32)


def _check_length(sizes: Sequence[int], expected: int) -> None:
    if len(sizes) != expected:
        fail(f"sizes: expected {expected} numbers, got {len(sizes)}")


@dataclass(frozen=True)
class T5Sizes:
    """[layers, D, heads, head_dim, F, V, activation, M] by name."""

    num_layers: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    activation: int
    bias_tokens: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> T5Sizes:
        """From an operator's `sizes`."""
        _check_length(sizes, 8)
        return cls(
            check_size(sizes[0], 1, MAX_LAYERS, "number of layers"),
            check_size(sizes[1], 1, MAX_DIM, "dim"),
            check_size(sizes[2], 1, MAX_HEADS, "num_heads"),
            check_size(sizes[3], 1, MAX_HEAD_DIM, "head_dim"),
            check_size(sizes[4], 1, MAX_WIDTH, "ffn_dim"),
            check_size(sizes[5], 1, MAX_VOCABULARY, "vocab_size"),
            check_size(sizes[6], 0, 3, "activation"),
            check_size(sizes[7], 1, MAX_WIDTH, "tokens of the position bias"),
        )

    @property
    def width(self) -> int:
        """Padded width of all heads together."""
        return padded_hidden(self.num_heads * power_of_two(self.head_dim))


@dataclass(frozen=True)
class MlpSizes:
    """[layers, D, roles, H, V, max_length] by name."""

    num_layers: int
    dim: int
    num_roles: int
    hidden_dim: int
    vocab_size: int
    max_length: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> MlpSizes:
        """From an operator's `sizes`."""
        _check_length(sizes, 6)
        return cls(
            check_size(sizes[0], 1, MAX_LAYERS, "number of layers"),
            check_size(sizes[1], 1, MAX_DIM, "dim"),
            check_size(sizes[2], 1, MAX_LEVELS, "number of roles"),
            check_size(sizes[3], 1, MAX_HIDDEN, "hidden_dim"),
            check_size(sizes[4], 1, MAX_VOCABULARY, "vocab_size"),
            check_size(sizes[5], 1, MAX_WIDTH, "max_length"),
        )


def check_eps(eps: float) -> float:
    """`eps` if float32 holds it and it is above 0."""
    if not (math.isfinite(eps) and 2.0**-149 <= eps <= torch.finfo(torch.float32).max):
        fail(f"layer_norm_eps: expected a finite number above 0 (in float32), got {eps}")
    return eps


def check_form(form: int) -> None:
    """All forms are the same here; an unknown one is refused as elsewhere."""
    if form not in FORMS:
        fail(
            "form: expected 0 (by batch), 1 (throughput), 2, 4 or 8 blocks a request, or 16 (a "
            f"block a request), got {form}"
        )


def check_tokens(ids: Tensor, mask: Tensor, device: torch.device, most: int | None) -> None:
    """Raises unless ids are int64 [B, T] and the mask bool [B, T]; most: positions there are."""
    check_place(ids, "ids", device)
    if ids.dim() != 2:
        fail(f"ids: expected [batch, tokens], got {list(ids.shape)}")
    batch, tokens = ids.shape
    if tokens > MAX_WIDTH:
        fail(f"ids: expected at most {MAX_WIDTH} tokens, got {tokens}")
    check_tensor(ids, "ids", torch.int64, (batch, tokens), device)
    check_tensor(mask, "mask", torch.bool, (batch, tokens), device)
    if most is not None and tokens > most:
        fail(f"ids: expected at most {most} tokens, the positions of the encoder, got {tokens}")


def check_t5(s: T5Sizes, tensors: Sequence[Tensor], device: torch.device) -> torch.dtype:
    """Checks `PackedEncoder.tensors` of a T5 encoder; their dtype."""
    check_count(tensors, 3 + 7 * s.num_layers, "encoder")
    dtype = weight_dtype(tensors[0], "encoder.embedding")
    dim, ffn = power_of_two(s.dim), padded_hidden(s.ffn_dim)
    fp32, bias = torch.float32, (s.num_heads, 2 * s.bias_tokens - 1)
    check_tensor(tensors[0], "encoder.embedding", dtype, (s.vocab_size, dim), device)
    check_tensor(tensors[1], "encoder.position_bias", fp32, bias, device)
    check_tensor(tensors[2], "encoder.norms", fp32, (2 * s.num_layers + 1, dim), device)
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (dim, s.width)),
        "output": (s.width, dim),
        "ffn_in": (dim, ffn),
        "ffn_up": (dim, ffn) if s.activation in GATED else (0,),
        "ffn_out": (ffn, dim),
    }
    for layer in range(s.num_layers):
        own = tensors[3 + 7 * layer : 10 + 7 * layer]
        for tensor, (name, shape) in zip(own, shapes.items(), strict=True):
            check_tensor(tensor, f"encoder.{layer}.{name}", dtype, shape, device)
    check_aligned(tensors, "encoder")
    return dtype


def check_mlp(s: MlpSizes, tensors: Sequence[Tensor], device: torch.device) -> torch.dtype:
    """Checks `PackedEncoder.tensors` of an MLP encoder; their dtype."""
    check_count(tensors, 3 + 5 * s.num_layers, "encoder")
    dtype = weight_dtype(tensors[0], "encoder.embedding")
    dim, hidden, roles = power_of_two(s.dim), padded_hidden(s.hidden_dim), s.num_roles
    fp32 = torch.float32
    check_tensor(tensors[0], "encoder.embedding", dtype, (s.vocab_size, dim), device)
    check_tensor(tensors[1], "encoder.positions", dtype, (s.max_length, dim), device)
    check_tensor(tensors[2], "encoder.norm", fp32, (2, dim), device)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "token": (dtype, (roles, dim, hidden)),
        "mean": (dtype, (roles, dim, hidden)),
        "vectors": (fp32, (roles, 3, hidden)),
        "out": (dtype, (roles, hidden, dim)),
        "bias": (fp32, (roles, dim)),
    }
    for layer in range(s.num_layers):
        own = tensors[3 + 5 * layer : 8 + 5 * layer]
        for tensor, (name, (kind, shape)) in zip(own, shapes.items(), strict=True):
            check_tensor(tensor, f"encoder.{layer}.{name}", kind, shape, device)
    check_aligned(tensors, "encoder")
    return dtype
