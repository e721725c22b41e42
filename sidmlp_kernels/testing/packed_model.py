"""What packed weights say, evaluated in float64 with plain torch: the formulas of packing.py.

    r_h = M_h q, s_ht = r_h . x_t, y_h = sum_t softmax(s_h)_t x_t, a = sum_h N_h y_h
    h_1 = GELU(LN(W_ctx ctx + b + sum_j P_{l,j}[c_j]))

A kernel that accumulates in float32 differs from this by float32 rounding alone, whatever the dtype
of its weights. So it judges bfloat16 and float16 kernels far more sharply than the student in that
dtype could, and it judges packing itself against the student in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sidmlp_kernels.packing import LANE, PackedWeights

_READOUT = (
    "query_weight",
    "vectors",
    "score_in",
    "score_out",
    "value_in",
    "value_out",
    "ffn_in",
    "ffn_in_bias",
    "ffn_out",
)


class PackedModel:
    """Context readout and heads as `packed` has them, in `dtype` (float64)."""

    def __init__(self, packed: PackedWeights, dtype: torch.dtype = torch.float64) -> None:
        self.config = packed.spec
        self.readout = {
            name: tensor.to(dtype) for name, tensor in zip(_READOUT, packed.readout, strict=True)
        }
        self.heads = [tensor.to(dtype) for tensor in packed.heads]

    def parameters(self) -> list[Tensor]:
        """All arrays."""
        return [*self.readout.values(), *self.heads]

    def context(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D] in the model's dtype, mask bool [B, T] -> [B, D]."""
        spec, w = self.config, self.readout
        dim, heads = spec.dim, spec.num_heads
        states = torch.where(mask[..., None], states, 0.0)
        mean = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        vectors = w["vectors"][:, :dim]
        query = mean @ w["query_weight"][:, :dim] + vectors[0]
        rows = self._score_rows(query)
        scores = torch.einsum("bhd,btd->bht", rows, states)
        nobody = ~mask.any(1, keepdim=True)
        scores = scores.masked_fill(~(mask | nobody)[:, None], -torch.inf)
        pooled = torch.einsum("bht,btd->bhd", scores.softmax(-1), states)
        if w["score_in"].numel():
            folded = self._per_head(torch.einsum("bhd,dj->bhj", pooled, w["value_in"]))
            attention = folded.flatten(1) @ w["value_out"][:, :dim]
        else:
            attention = pooled.flatten(1) @ w["value_in"].view(heads * dim, -1)[:, :dim]
        eps = spec.layer_norm_eps
        u = functional.layer_norm(query + attention, (dim,), vectors[1], vectors[2], eps)
        ffn = functional.relu(u @ w["ffn_in"] + w["ffn_in_bias"])[:, : spec.ffn_dim]
        ffn = ffn @ w["ffn_out"][:, :dim] + vectors[3]
        return functional.layer_norm(u + ffn, (dim,), vectors[4], vectors[5], eps)

    def _score_rows(self, query: Tensor) -> Tensor:
        """r_h of every head: query [B, D] -> [B, heads, D]."""
        spec, w = self.config, self.readout
        dim, heads = spec.dim, spec.num_heads
        if not w["score_in"].numel():
            return (query @ w["score_out"]).unflatten(1, (heads, -1))[..., :dim]
        folded = (query @ w["score_in"]).unflatten(1, (heads, -1))
        folded = folded[..., : spec.attention_dim // heads]
        out = w["score_out"][:, :dim].view(heads, -1, dim)
        return torch.einsum("bha,had->bhd", folded, out)

    def _per_head(self, folded: Tensor) -> Tensor:
        """[B, heads, heads * padded d], every head through all columns -> its own d columns."""
        spec = self.config
        heads, head_dim = spec.num_heads, spec.attention_dim // spec.num_heads
        own = folded.unflatten(2, (heads, -1)).diagonal(dim1=1, dim2=2)  # [B, padded d, heads]
        return own.transpose(1, 2)[..., :head_dim]

    def logits(self, level_index: int, context: Tensor, prefix_codes: Tensor) -> Tensor:
        """context [.., D], prefix_codes int64 [.., >= level_index] -> [.., C_l]."""
        spec = self.config
        hidden_pad = -(-spec.hidden_dim // LANE) * LANE
        columns = slice(level_index * hidden_pad, level_index * hidden_pad + spec.hidden_dim)
        at = 2 + 5 * level_index
        vectors, table, blocks, out_weight, out_bias = self.heads[at : at + 5]
        vectors = vectors[:, : spec.hidden_dim]
        hidden = context @ self.heads[0][:, columns] + self.heads[1][columns]
        offset = 0
        for j in range(level_index):
            hidden = hidden + table[offset + prefix_codes[..., j], : spec.hidden_dim]
            offset += spec.codes_per_level[j]
        hidden = self._norm_gelu(hidden, vectors[0], vectors[1])
        for block in range(1, spec.blocks_per_head):
            bias, gain, shift = vectors[3 * block - 1 : 3 * block + 2]
            hidden = hidden @ blocks[block - 1][:, : spec.hidden_dim] + bias
            hidden = self._norm_gelu(hidden, gain, shift)
        return hidden @ out_weight[: len(out_bias), : spec.hidden_dim].T + out_bias

    def _norm_gelu(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        x = functional.layer_norm(x, (len(gain),), gain, shift, self.config.layer_norm_eps)
        return functional.gelu(x)
