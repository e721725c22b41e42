"""Encoder weights -> the arrays that the Triton encoders read.

Names and order are those of the CPU's arrays (sidmlp_kernels/encoder_packing.py). Matrices are
input-major, and every width is padded with zeros to what a tile has, so that kernels need no masks
but for rows: D and head_dim to a power of two of at least 16, hidden widths to a multiple of 64.
Importing this module imports no triton.

    Dp, Hp   D and head_dim, padded          A heads * Hp, padded like a hidden width
    Fp       the hidden width, padded        V vocabulary, M tokens of the position bias, R roles

encode_t5   embedding [V, Dp], position_bias float32 [heads, 2 M - 1], norms float32
            [2 layers + 1, Dp]; a layer: query, key, value [Dp, A], output [A, Dp], ffn_in [Dp, Fp],
            ffn_up like ffn_in or empty, ffn_out [Fp, Dp]
encode_mlp  embedding [V, Dp], positions [max_length, Dp], norm float32 [2, Dp]; a layer: token and
            mean [R, Dp, Fp], vectors float32 [R, 3, Fp], out [R, Fp, Dp], bias float32 [R, Dp]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sidmlp_kernels.spec import MLPEncoderSpec, T5Spec

MIN_WIDTH = 16
HIDDEN_STEP = 64

Round = Callable[[str, Tensor], Tensor]  # name and float64 matrix -> in the dtype of the weights


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 16."""
    return max(MIN_WIDTH, 1 << (n - 1).bit_length())


def padded_hidden(n: int) -> int:
    """n rounded up to a multiple of 64."""
    return -(-n // HIDDEN_STEP) * HIDDEN_STEP


def _pad(matrix: Tensor, *sizes: int) -> Tensor:
    """`matrix` with zeros at the ends of its last dimensions, up to `sizes`."""
    ends = zip(sizes, matrix.shape[matrix.ndim - len(sizes) :], strict=True)
    padding = [amount for want, got in ends for amount in (want - got, 0)]
    return torch.nn.functional.pad(matrix, padding[::-1])


def t5_tensors(
    spec: T5Spec, weights: Mapping[str, Tensor], position_bias: Tensor, rounded: Round
) -> list[Tensor]:
    """weights: float64 by name; position_bias: float32 [heads, 2 M - 1]."""
    heads, head_dim = spec.num_heads, spec.head_dim
    dim, head = power_of_two(spec.dim), power_of_two(head_dim)
    ffn, width = padded_hidden(spec.ffn_dim), padded_hidden(heads * head)
    layers = range(spec.num_layers)
    norms = [f"block.{i}.layer.{j}.layer_norm.weight" for i in layers for j in (0, 1)]
    gains = torch.stack([weights[n] for n in (*norms, "final_layer_norm.weight")])
    name = "embed_tokens.weight"
    tensors = [rounded(name, _pad(weights[name], dim)), position_bias, _pad(gains, dim).float()]
    for i in layers:
        at = f"block.{i}.layer.0.SelfAttention."
        for name in (f"{at}q.weight", f"{at}k.weight", f"{at}v.weight"):
            by_head = weights[name].reshape(heads, head_dim, spec.dim).permute(2, 0, 1)
            joined = _pad(by_head, dim, heads, head).reshape(dim, -1)
            tensors.append(rounded(name, _pad(joined, width)))
        name = f"{at}o.weight"
        by_head = weights[name].T.reshape(heads, head_dim, spec.dim)
        joined = _pad(by_head, heads, head, dim).reshape(-1, dim)
        tensors.append(rounded(name, _pad(joined, width, dim)))
        at = f"block.{i}.layer.1.DenseReluDense."
        gated = spec.feed_forward.startswith("gated-")
        for name in (f"{at}wi_0.weight", f"{at}wi_1.weight") if gated else (f"{at}wi.weight",):
            tensors.append(rounded(name, _pad(weights[name].T, dim, ffn)))
        if not gated:
            tensors.append(tensors[0].new_empty(0))
        name = f"{at}wo.weight"
        tensors.append(rounded(name, _pad(weights[name].T, ffn, dim)))
    return [tensor.contiguous() for tensor in tensors]


def mlp_tensors(
    spec: MLPEncoderSpec, weights: Mapping[str, Tensor], rounded: Round
) -> list[Tensor]:
    """weights: float64 by name."""
    dim, hidden = power_of_two(spec.dim), padded_hidden(spec.hidden_dim)

    def stacked(names: list[str], matrices: list[Tensor], *sizes: int) -> Tensor:
        pairs = zip(names, matrices, strict=True)
        return torch.stack([rounded(name, _pad(matrix, *sizes)) for name, matrix in pairs])

    norm = [weights[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")]
    tables = ("embed_tokens.weight", "embed_positions.weight")
    tensors = [rounded(name, _pad(weights[name], dim)) for name in tables]
    tensors.append(_pad(torch.stack(norm), dim).float())
    for i in range(spec.num_layers):
        roles = [f"layers.{i}.roles.{r}." for r in range(spec.num_roles)]
        inputs, outputs = ([f"{r}linear_{end}.weight" for r in roles] for end in ("in", "out"))
        first = [weights[name].T for name in inputs]  # [2 D, H]: over x, then over the mean
        kinds = ("linear_in.bias", "norm.weight", "norm.bias")
        vectors = torch.stack([torch.stack([weights[r + k] for k in kinds]) for r in roles])
        bias = torch.stack([weights[f"{r}linear_out.bias"] for r in roles])
        tensors += [
            stacked(inputs, [matrix[: spec.dim] for matrix in first], dim, hidden),
            stacked(inputs, [matrix[spec.dim :] for matrix in first], dim, hidden),
            _pad(vectors, hidden).float(),
            stacked(outputs, [weights[name].T for name in outputs], hidden, dim),
            _pad(bias, dim).float(),
        ]
    return [tensor.contiguous() for tensor in tensors]
