"""Encoder weights -> the arrays that `encode_t5` and `encode_mlp` read.

Matrices and embeddings are rounded once to the kernel's dtype; gains, biases and the position bias
stay float32.

On the CPU matrices are input-major ([in, out], out padded with zeros to a multiple of 16), stored
as panels: the columns in groups of 64, the last one narrower, each group [in, width] contiguous
(csrc/cpu/encoders.h). On CUDA T5's are as torch.nn.Linear holds them, and once more in tiles for
the tensor cores (csrc/sidmlp/encoder_view.h); SID-MLP++'s are fragments, blocks in the order in
which the lanes of a warp multiply (csrc/sidmlp/mlp_encoder_view.h). For Triton every width is
padded to what a tile has (sidmlp_kernels/ops/triton/encoder_packing.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoder import T5Encoder, distance_buckets
from .mlp_encoder import MLPEncoder
from .packing import LANE, pad_columns, round_once
from .spec import FEED_FORWARDS, EncoderSpec, MLPEncoderSpec, T5Spec

PANEL = 64
TILE = 64  # rows and columns of a tile
# Tokens that a request on CUDA may have. wgmma kernels take models whose requests are short: all of
# them 128 (csrc/cuda/sm90/encoder/split.h), the throughput form 192 (wide.h). The model alone
# decides, since other kernels round otherwise.
SHORT_TOKENS = (128, 192)
BIAS_TOKENS = 4096
MAX_TOKENS = 1 << 20  # csrc/torch/encoder_problem.cpp


@dataclass(frozen=True, eq=False)
class PackedEncoder:
    """An encoder's weights as its operator takes them, on one device.

    layout    "panels" (CPU), "rows" or "fragments" (CUDA: encode_t5, encode_mlp), "padded" (Triton)
    operator  "encode_t5" or "encode_mlp"
    sizes     encode_t5: [layers, D, heads, head_dim, F, V, index in FEED_FORWARDS, M]
              encode_mlp: [layers, D, roles, H, V, max_length]
    tensors   encode_t5, panels: [embedding, position_bias, norms], then for each layer [query, key,
              value, output, ffn_in, ffn_up, ffn_out], ffn_up empty where there is no gate
              encode_t5, rows: [embedding, position_bias, final_gain, tiles], then for each layer
              [attention_gain, qkv, attention_out, ffn_gain, ffn_in, ffn_out]
              encode_mlp: [embedding, positions, norm], then for each layer [token, mean, vectors,
              out, bias], panels or fragments; shapes in csrc/cpu/encoders.h,
              csrc/sidmlp/encoder_view.h and csrc/sidmlp/mlp_encoder_view.h
              padded: the names of panels; shapes in ops/triton/encoder_packing.py
    """

    spec: EncoderSpec
    layout: str
    operator: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def max_tokens(self) -> int:
        """The most columns of ids that the operator takes."""
        if isinstance(self.spec, MLPEncoderSpec):
            return self.spec.max_length
        return self.sizes[-1] if self.layout == "rows" else MAX_TOKENS

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def to(self, device: torch.device | str) -> PackedEncoder:
        """The same weights on `device`."""
        return dataclasses.replace(self, tensors=tuple(t.to(device) for t in self.tensors))


def pack_encoder(
    encoder: T5Encoder | MLPEncoder,
    dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    max_tokens: int = BIAS_TOKENS,
) -> PackedEncoder:
    """Packs `encoder` for the kernels of `backend` that read `dtype` matrices.

    dtype: torch.float32, bfloat16 or float16. max_tokens: of a request; on CUDA a model whose
    requests have at most 128 or 192 takes faster kernels and refuses longer ones. Raises ValueError
    where a weight overflows in `dtype`.
    """
    packer = _Packer({k: v.double().cpu() for k, v in encoder.state_dict().items()}, dtype)
    if backend == "triton":
        return _pack_padded(encoder.spec, packer)
    if isinstance(encoder, MLPEncoder):
        return _pack_mlp(encoder.spec, packer, backend)
    if backend == "cuda":
        bias_tokens = next(n for n in (*SHORT_TOKENS, BIAS_TOKENS) if max_tokens <= n)
        return _pack_t5_rows(encoder.spec, packer, bias_tokens)
    return _pack_t5(encoder.spec, packer)


def to_panels(matrix: Tensor) -> Tensor:
    """`matrix` [in, out], out a multiple of 16, as panels of 64 columns one after another."""
    return torch.cat([part.flatten() for part in matrix.split(PANEL, dim=1)])


def to_tiles(matrix: Tensor) -> Tensor:
    """`matrix` [N, K], multiples of 64, as N / 64 by K / 64 tiles of 64 rows of 64 elements, one
    after another; the eight 16-byte pieces of a row are permuted: p lies at p ^ (row % 8)."""
    rows, columns = matrix.shape
    pieces = matrix.reshape(rows // TILE, TILE, columns // TILE, 8, 8).transpose(1, 2)
    row, place = torch.arange(TILE)[:, None], torch.arange(8)[None, :]
    return pieces[:, :, row, place ^ (row % 8)].flatten()


def to_fragments(matrix: Tensor) -> Tensor:
    """`matrix` [N, K], multiples of 16, as N / 16 by K / 16 blocks of 256 elements, one after
    another, each in the order that csrc/sidmlp/mlp_encoder_view.h says for its dtype."""
    n, k = matrix.shape[0] // LANE, matrix.shape[1] // LANE
    if matrix.dtype == torch.float32:
        order = matrix.reshape(n, 2, 4, 2, k, 4, 4).permute(0, 4, 5, 2, 1, 3, 6)
    else:
        order = matrix.reshape(n, 2, 8, k, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6)
    return order.flatten()


class _Packer:
    """Weights by name in float64, and how each becomes an array."""

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.weights = weights
        self.dtype = dtype

    def rounded(self, name: str, matrix: Tensor) -> Tensor:
        packed = round_once(matrix, self.dtype).contiguous()
        if not bool(torch.isfinite(packed).all()):
            raise ValueError(
                f"encoder {name}: expected values that {self.dtype} can hold, got a magnitude of "
                f"{float(matrix.abs().max()):.4g}; load with dtype='bfloat16' or 'float32'"
            )
        return packed

    def table(self, name: str) -> Tensor:
        """[rows, out] with padded rows."""
        return self.rounded(name, pad_columns(self.weights[name]))

    def panels(self, name: str, matrix: Tensor) -> Tensor:
        return to_panels(self.rounded(name, pad_columns(matrix)))

    def linear(self, name: str) -> Tensor:
        """nn.Linear's weight [out, in], in panels."""
        return self.panels(name, self.weights[name].T)

    def fragments(self, name: str, matrix: Tensor) -> Tensor:
        """[out, in], padded in both directions."""
        rows = pad_columns(pad_columns(matrix).T).T
        return to_fragments(self.rounded(name, rows))

    def vectors(self, *names: str) -> Tensor:
        rows = torch.stack([self.weights[name] for name in names])
        return pad_columns(rows).float().contiguous()


def _position_bias(spec: T5Spec, table: Tensor) -> Tensor:
    """fp32 [heads, 2 M - 1]: what a key at offset -(M - 1) .. M - 1 adds; beyond, the ends hold."""
    n = spec.relative_buckets // 2
    limit = spec.relative_max_distance + 1
    bucket = distance_buckets(limit, spec.relative_buckets, spec.relative_max_distance)
    reach = int((bucket < n - 1).sum())  # the first distance of the last bucket
    before, after = bucket[: reach + 1].flip(0), bucket[1 : reach + 1] + n
    return table[torch.cat([before, after])].T.float().contiguous()


def _t5_sizes(spec: T5Spec, bias_tokens: int) -> tuple[int, ...]:
    return (
        spec.num_layers,
        spec.dim,
        spec.num_heads,
        spec.head_dim,
        spec.ffn_dim,
        spec.vocab_size,
        FEED_FORWARDS.index(spec.feed_forward),
        bias_tokens,
    )


def _pack_t5_rows(spec: T5Spec, packer: _Packer, bias_tokens: int) -> PackedEncoder:
    w = packer.weights

    def gain(name: str) -> Tensor:
        return w[name].float().contiguous()

    def matrix(*names: str) -> Tensor:
        return torch.cat([packer.rounded(name, w[name]) for name in names])

    first = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = _position_bias(spec, w[first])
    reach = (bias.shape[1] - 1) // 2
    offsets = torch.arange(1 - bias_tokens, bias_tokens).clamp(-reach, reach)
    layers: list[Tensor] = []
    matrices: list[Tensor] = []
    for i in range(spec.num_layers):
        attention, dense = f"block.{i}.layer.0", f"block.{i}.layer.1"
        gated = spec.feed_forward.startswith("gated-")
        inputs = ("wi_0", "wi_1") if gated else ("wi",)
        qkv = matrix(*(f"{attention}.SelfAttention.{name}.weight" for name in "qkv"))
        output = matrix(f"{attention}.SelfAttention.o.weight")
        ffn_in = matrix(*(f"{dense}.DenseReluDense.{name}.weight" for name in inputs))
        ffn_out = matrix(f"{dense}.DenseReluDense.wo.weight")
        matrices += [qkv, output, ffn_in, ffn_out]
        layers += [gain(f"{attention}.layer_norm.weight"), qkv, output]
        layers += [gain(f"{dense}.layer_norm.weight"), ffn_in, ffn_out]
    fits = all(n % TILE == 0 for m in matrices for n in m.shape)
    tiles = torch.cat([to_tiles(m) for m in matrices]) if fits else matrices[0].new_empty(0)
    tensors = (
        matrix("embed_tokens.weight"),
        bias[:, offsets + reach].contiguous(),
        gain("final_layer_norm.weight"),
        tiles,
        *layers,
    )
    sizes = _t5_sizes(spec, bias_tokens)
    return PackedEncoder(spec, "rows", "encode_t5", packer.dtype, sizes, tensors)


def _pack_t5(spec: T5Spec, packer: _Packer) -> PackedEncoder:
    heads, head_dim, dim = spec.num_heads, spec.head_dim, spec.dim
    head_pad = head_dim + -head_dim % LANE
    first = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = _position_bias(spec, packer.weights[first])
    layers = range(spec.num_layers)
    norms = [f"block.{i}.layer.{j}.layer_norm.weight" for i in layers for j in (0, 1)]
    tensors = [
        packer.table("embed_tokens.weight"),
        bias,
        packer.vectors(*norms, "final_layer_norm.weight"),
    ]
    for i in layers:
        at = f"block.{i}.layer.0.SelfAttention."
        for name in (f"{at}q.weight", f"{at}k.weight", f"{at}v.weight"):
            by_head = packer.weights[name].reshape(heads, head_dim, dim).permute(2, 0, 1)
            tensors.append(packer.panels(name, pad_columns(by_head).reshape(dim, -1)))
        name = f"{at}o.weight"
        by_head = pad_columns(packer.weights[name].reshape(dim, heads, head_dim))
        tensors.append(packer.panels(name, by_head.reshape(dim, heads * head_pad).T))
        at = f"block.{i}.layer.1.DenseReluDense."
        if spec.feed_forward.startswith("gated-"):
            tensors += [packer.linear(f"{at}wi_0.weight"), packer.linear(f"{at}wi_1.weight")]
        else:
            tensors += [packer.linear(f"{at}wi.weight"), torch.empty(0, dtype=packer.dtype)]
        tensors.append(packer.linear(f"{at}wo.weight"))
    sizes = _t5_sizes(spec, (bias.shape[1] + 1) // 2)
    return PackedEncoder(spec, "panels", "encode_t5", packer.dtype, sizes, tuple(tensors))


def _pack_padded(spec: EncoderSpec, packer: _Packer) -> PackedEncoder:
    from .ops.triton import encoder_packing as triton  # imports no triton, but the package may grow

    if isinstance(spec, T5Spec):
        first = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        bias = _position_bias(spec, packer.weights[first])
        sizes = _t5_sizes(spec, (bias.shape[1] + 1) // 2)
        tensors = triton.t5_tensors(spec, packer.weights, bias, packer.rounded)
        name = "encode_t5"
    else:
        sizes = _mlp_sizes(spec)
        tensors = triton.mlp_tensors(spec, packer.weights, packer.rounded)
        name = "encode_mlp"
    return PackedEncoder(spec, "padded", name, packer.dtype, sizes, tuple(tensors))


def _pack_mlp(spec: MLPEncoderSpec, packer: _Packer, backend: str) -> PackedEncoder:
    w, dim = packer.weights, spec.dim
    layout = "fragments" if backend == "cuda" else "panels"

    def matrix(name: str, columns: slice = slice(None)) -> Tensor:
        linear = w[name][:, columns]
        if layout == "fragments":
            return packer.fragments(name, linear)
        return packer.panels(name, linear.T)

    tensors = [
        packer.table("embed_tokens.weight"),
        packer.table("embed_positions.weight"),
        packer.vectors("final_layer_norm.weight", "final_layer_norm.bias"),
    ]
    for i in range(spec.num_layers):
        roles = [f"layers.{i}.roles.{r}." for r in range(spec.num_roles)]
        inputs = [f"{role}linear_in.weight" for role in roles]
        names = ("linear_in.bias", "norm.weight", "norm.bias")
        tensors += [
            torch.stack([matrix(name, slice(dim)) for name in inputs]),
            torch.stack([matrix(name, slice(dim, None)) for name in inputs]),
            torch.stack([packer.vectors(*(role + name for name in names)) for role in roles]),
            torch.stack([matrix(f"{role}linear_out.weight") for role in roles]),
            packer.vectors(*(f"{role}linear_out.bias" for role in roles)),
        ]
    sizes = _mlp_sizes(spec)
    return PackedEncoder(spec, layout, "encode_mlp", packer.dtype, sizes, tuple(tensors))


def _mlp_sizes(spec: MLPEncoderSpec) -> tuple[int, ...]:
    return (
        spec.num_layers,
        spec.dim,
        spec.num_roles,
        spec.hidden_dim,
        spec.vocab_size,
        spec.max_length,
    )
