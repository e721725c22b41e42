"""SID-MLP++'s encoder in plain PyTorch: token ids -> encoder states.

    x = embedding + position
    per layer:  m = mean of the request's valid x
                x <- x + MLP_r([x; m]),   MLP = Linear - LayerNorm - GELU - Linear
    states = LayerNorm(x)

Each layer has one MLP for each of L roles. Token t has role (t - 1) mod L, which is a code's level;
token 0 (the user) and the last valid token (eos) take role L - 1. GELU is the exact one.
Source: SID-MLP++ (arXiv 2605.12617).

The residual x, its mean and the final LayerNorm stay in fp32 when the weights are bf16 or fp16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from .encoder_weights import with_weights
from .spec import MLPEncoderSpec


class _RoleMLP(nn.Module):
    def __init__(self, spec: MLPEncoderSpec) -> None:
        super().__init__()
        self.linear_in = nn.Linear(2 * spec.dim, spec.hidden_dim)
        self.norm = nn.LayerNorm(spec.hidden_dim, spec.layer_norm_eps)
        self.linear_out = nn.Linear(spec.hidden_dim, spec.dim)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """x [B, n, D], mean [B, 1, D] in the residual's dtype -> what is added to x."""
        both = torch.cat([x, mean.expand_as(x)], dim=-1).to(self.linear_in.weight.dtype)
        return self.linear_out(functional.gelu(self.norm(self.linear_in(both))))


class _Layer(nn.Module):
    def __init__(self, spec: MLPEncoderSpec) -> None:
        super().__init__()
        self.roles = nn.ModuleList(_RoleMLP(spec) for _ in range(spec.num_roles))

    def forward(self, x: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        """x [B, T, D], mask bool [B, T], last int64 [B, 1, 1] the last valid token -> x."""
        count = mask.sum(dim=1).clamp(min=1).to(x.dtype)
        mean = torch.where(mask[..., None], x, 0.0).sum(dim=1) / count[:, None]
        mean = mean[:, None]
        out = torch.empty_like(x)
        num_roles = len(self.roles)
        for role, mlp in enumerate(self.roles):
            # Tokens of one role are every L-th; token 0 falls in with role L - 1 by itself.
            own = slice((role + 1) % num_roles, None, num_roles)
            out[:, own] = x[:, own] + mlp(x[:, own], mean)
        last = last.expand(-1, 1, x.shape[2])
        final = x.gather(1, last)
        return out.scatter(1, last, final + self.roles[-1](final, mean).to(x.dtype))


class MLPEncoder(nn.Module):
    """SID-MLP++'s encoder: ids [B, T], mask [B, T] -> states [B, T, D] in the weights' dtype."""

    def __init__(self, spec: MLPEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.dim)
        self.embed_positions = nn.Embedding(spec.max_length, spec.dim)
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.num_layers))
        self.final_layer_norm = nn.LayerNorm(spec.dim, spec.layer_norm_eps)

    @classmethod
    def from_weights(cls, spec: MLPEncoderSpec, weights: Mapping[str, Tensor]) -> MLPEncoder:
        """An fp32 encoder on the CPU, frozen and in eval mode, with these verified weights.

        Raises ValueError naming each tensor that is missing, unknown, misshaped or not finite.
        """
        with torch.device("meta"):
            encoder = cls(spec)
        return with_weights(encoder, weights)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] (True = a token) -> states [B, T, D].

        States of masked tokens are finite and nobody reads them. T is at most max_length.
        """
        dtype = self.embed_tokens.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        length = ids.shape[1]
        x = self.embed_tokens(ids).to(wide) + self.embed_positions.weight[:length].to(wide)
        if length == 0:
            return x.to(dtype)
        positions = torch.arange(length, device=ids.device)
        last = torch.where(mask, positions, 0).amax(dim=1)[:, None, None]
        for layer in self.layers:
            x = layer(x, mask, last)
        norm = self.final_layer_norm
        weight, bias = norm.weight.to(wide), norm.bias.to(wide)
        return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps).to(dtype)
