"""Student weights -> the arrays that kernels read: prefix tables, absorbed attention, layout.

Two exact rewrites happen here, in float64, rounded once to the kernel's dtype:

Prefix tables. A head's first layer W_l = [W_ctx | W_1 | .. | W_{l-1}] acts on a concatenation of
the context and frozen code embeddings, so P_{l,j} = E_j W_j^T [C_j, H] is known beforehand: a beam
gathers l-1 rows instead of multiplying.

Absorbed attention. One query q per request: with per-head rows of W_q, W_k, W_v and columns of W_o,
    r_h = W_k,h^T W_q,h q / sqrt(d)      score of token t = r_h . x_t
    y_h = sum_t softmax_t(score) x_t     a = sum_h W_o,h W_v,h y_h
so keys and values of tokens are never formed. The products W_k^T W_q and W_o W_v are stored where
that is cheaper (2 heads D^2 <= 4 D A multiply-adds), else the factors.

Layout: matrices are input-major ([in, out], a row contiguous over outputs), `out_weight` one row
per code; rows are padded with zeros to a multiple of 16 elements (csrc/sidmlp/views.h). Matrices
are in the kernel's dtype; biases and LayerNorm vectors stay float32.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sidmlp_kernels.spec import StudentSpec
from sidmlp_kernels.student import Student

LANE = 16
CODE_ROWS = 32


def pad_columns(matrix: Tensor) -> Tensor:
    """`matrix` with its last dimension padded with zeros to a multiple of 16."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % LANE))


def pad_codes(matrix: Tensor) -> Tensor:
    """`matrix` with rows of zeros added up to a multiple of 32."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % CODE_ROWS))


def round_once(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `matrix` in `dtype`, rounded to nearest even once.

    torch converts float64 to half precision through float32 and so rounds twice: 1 + 2^-8 + 2^-30
    becomes the bfloat16 1. Here the float32 in between is rounded to odd, which loses nothing that
    the second rounding needs.
    """
    single = matrix.float()
    if dtype == torch.float32:
        return single
    bits = single.view(torch.int32)
    inexact = (single.double() != matrix) & torch.isfinite(single) & (bits % 2 == 0)
    # One step in magnitude towards the exact value: its bits are odd, since these are even.
    outwards = (matrix.abs() > single.double().abs()).int() * 2 - 1
    odd = torch.where(single == 0, bits, bits + outwards).view(torch.float32)
    return torch.where(inexact, odd, single).to(dtype)


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """A student's weights as the operators take them, on one device.

    sizes    [L, D, heads, head_dim, F, H, blocks, C_1 .. C_L]
    readout  [query_weight, vectors, score_in, score_out, value_in, value_out, ffn_in, ffn_in_bias,
             ffn_out]; score_in and value_out are empty in the product form
    heads    [context_weight, context_bias], then for each level [vectors, prefix_table,
             block_weight, out_weight, out_bias]; shapes in csrc/sidmlp/views.h
    """

    spec: StudentSpec
    dtype: torch.dtype
    sizes: tuple[int, ...]
    readout: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        return self.heads[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(t.numel() * t.element_size() for t in (*self.readout, *self.heads))

    def to(self, device: torch.device | str) -> PackedWeights:
        """The same weights on `device`."""
        return dataclasses.replace(
            self,
            readout=tuple(t.to(device) for t in self.readout),
            heads=tuple(t.to(device) for t in self.heads),
        )


def pack(student: Student, dtype: torch.dtype = torch.float32) -> PackedWeights:
    """Packs `student` for kernels that read `dtype` matrices, on the CPU.

    dtype: torch.float32, bfloat16 or float16. Raises ValueError for another dtype, and where a
    weight or a product of weights overflows in it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype: expected float32, bfloat16 or float16, got {dtype}; pass one of them"
        )
    spec = student.spec
    packer = _Packer({k: v.double() for k, v in student.weights.items()}, spec, dtype)
    sizes = (
        spec.num_levels,
        spec.dim,
        spec.num_heads,
        spec.attention_dim // spec.num_heads,
        spec.ffn_dim,
        spec.hidden_dim,
        spec.blocks_per_head,
        *spec.codes_per_level,
    )
    return PackedWeights(spec, dtype, sizes, packer.readout(), packer.heads())


class _Packer:
    def __init__(self, weights: dict[str, Tensor], spec: StudentSpec, dtype: torch.dtype) -> None:
        self.weights = weights  # float64
        self.spec = spec
        self.dtype = dtype

    def matrix(self, name: str, matrix: Tensor) -> Tensor:
        """Padded, rounded once, checked for overflow."""
        packed = round_once(pad_columns(matrix), self.dtype).contiguous()
        if not bool(torch.isfinite(packed).all()):
            worst = float(matrix.abs().max())
            remedy = (
                "scale the student's weights down"
                if self.dtype == torch.float32
                else "load with dtype='bfloat16' or 'float32'"
            )
            raise ValueError(
                f"{name}: expected values that {self.dtype} can hold, got a magnitude of "
                f"{worst:.4g}; {remedy}"
            )
        return packed

    @staticmethod
    def vectors(*rows: Tensor) -> Tensor:
        return pad_columns(torch.stack(rows)).float().contiguous()

    def linear(self, name: str) -> Tensor:
        """nn.Linear's weight [out, in], input-major."""
        return self.matrix(name, self.weights[name].T)

    def readout(self) -> tuple[Tensor, ...]:
        spec, w = self.spec, self.weights
        heads, dim = spec.num_heads, spec.dim
        head_dim = spec.attention_dim // heads
        at = "readout.attention."
        q, k, v = (w[f"{at}{p}_proj.weight"].reshape(heads, head_dim, dim) for p in ("q", "k", "v"))
        o = w[f"{at}out_proj.weight"].reshape(dim, heads, head_dim)
        scale = 1 / math.sqrt(head_dim)
        if heads * dim <= 2 * spec.attention_dim:
            # [in, heads, out]: column o of head h is what q contributes to r_h's element o
            score = pad_columns(torch.einsum("hai,hao->iho", q, k) * scale).reshape(dim, -1)
            value = torch.einsum("oha,hai->hio", o, v).reshape(heads * dim, dim)
            none = torch.empty(0, dtype=self.dtype)
            attention = [
                none,
                self.matrix("W_q^T W_k", score),
                self.matrix("W_o W_v", value),
                none,
            ]
        else:
            score_in = pad_columns(q.permute(2, 0, 1)).reshape(dim, -1)
            value_in = pad_columns(v.permute(2, 0, 1)).reshape(dim, -1)
            attention = [
                self.matrix(f"{at}q_proj.weight", score_in),
                self.matrix(f"{at}k_proj.weight", k.reshape(-1, dim) * scale),
                self.matrix(f"{at}v_proj.weight", value_in),
                self.matrix(f"{at}out_proj.weight", o.reshape(dim, -1).T),
            ]
        vectors = self.vectors(
            w["readout.query_proj.bias"],
            w["readout.norm1.weight"],
            w["readout.norm1.bias"],
            w["readout.ffn_out.bias"],
            w["readout.norm2.weight"],
            w["readout.norm2.bias"],
        )
        return (
            self.linear("readout.query_proj.weight"),
            vectors,
            *attention,
            self.linear("readout.ffn_in.weight"),
            self.vectors(w["readout.ffn_in.bias"])[0],
            self.linear("readout.ffn_out.weight"),
        )

    def prefix_table(self, level: int) -> Tensor:
        """[C_1 + .. + C_level, H]: P_{l,j} of every earlier level, one below the other."""
        spec, w = self.spec, self.weights
        weight = w[f"heads.{level}.blocks.0.linear.weight"]
        tables = [torch.empty(0, spec.hidden_dim, dtype=torch.float64)]
        for j in range(level):
            begin = spec.dim + j * spec.embedding_dim
            part = weight[:, begin : begin + spec.embedding_dim]
            tables.append(w[f"embeddings.{j}.weight"] @ part.T)
        return torch.cat(tables)

    def heads(self) -> tuple[Tensor, ...]:
        spec, w = self.spec, self.weights
        hidden, levels = spec.hidden_dim, range(spec.num_levels)
        first = [w[f"heads.{i}.blocks.0.linear.weight"][:, : spec.dim].T for i in levels]
        bias = [w[f"heads.{i}.blocks.0.linear.bias"] for i in levels]
        packed = [
            self.matrix("heads.*.blocks.0.linear.weight", torch.cat([*map(pad_columns, first)], 1)),
            torch.cat([*map(pad_columns, bias)]).float().contiguous(),
        ]
        for i in levels:
            blocks = [f"heads.{i}.blocks.{b}." for b in range(spec.blocks_per_head)]
            rows = [w[blocks[0] + "norm.weight"], w[blocks[0] + "norm.bias"]]
            further = [torch.empty(0, hidden, hidden, dtype=torch.float64)]
            for block in blocks[1:]:
                rows += [w[block + p] for p in ("linear.bias", "norm.weight", "norm.bias")]
                further.append(w[block + "linear.weight"].T[None])
            packed += [
                self.vectors(*rows),
                self.matrix(f"heads.{i} prefix table", self.prefix_table(i)),
                self.matrix(f"heads.{i}.blocks.*.linear.weight", torch.cat(further)),
                self.matrix(f"heads.{i}.output.weight", pad_codes(w[f"heads.{i}.output.weight"])),
                w[f"heads.{i}.output.bias"].float().contiguous(),
            ]
        return tuple(packed)
