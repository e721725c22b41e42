"""SID-MLP++'s encoder, as its equations say.

    x_t = embedding(id_t) + position_t
    in each layer, over the valid tokens t of a request:
        m   = mean_t x_t
        x_t <- x_t + MLP_{r(t)}([x_t; m]),     MLP = Linear - LayerNorm - GELU - Linear
    states_t = LayerNorm(x_t)

    r(t) = (t - 1) mod L, but L - 1 for t = 0 (the user) and for the last valid token (the end)

GELU is the exact one (erf). States of other tokens are zero: nobody reads them. The published code
runs all L MLPs for every token and selects afterwards; so does this module, for it is the oracle.
Source: SID-MLP++ (arXiv 2605.12617).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MLPEncoderConfig:
    """The sizes of the encoder: all that the shapes of its weights depend on."""

    num_layers: int
    num_roles: int  # L, the levels of a semantic ID
    dim: int  # D, width of a state
    hidden_dim: int  # of every MLP
    vocab_size: int
    max_length: int  # positions that have an embedding
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("num_layers", "num_roles", "dim", "hidden_dim", "vocab_size", "max_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected an integer >= 1, got {getattr(self, name)}; pass the size "
                    f"of the trained model"
                )


def roles_of(mask: Tensor, num_roles: int) -> Tensor:
    """mask bool [B, T] -> the role of every token, int64 [B, T]; of masked ones, anything."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    roles = (positions - 1) % num_roles  # Python's: -1 mod L is L - 1
    valid_after = mask.flip(1).cumsum(1).flip(1) - mask.long()
    return torch.where(mask & (valid_after == 0), num_roles - 1, roles)


class RoleMLP(nn.Module):
    """Linear - LayerNorm - GELU - Linear on [x; m]."""

    def __init__(self, config: MLPEncoderConfig) -> None:
        super().__init__()
        self.linear_in = nn.Linear(2 * config.dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.linear_out = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """[.., 2 D] -> [.., D]."""
        return self.linear_out(nn.functional.gelu(self.norm(self.linear_in(inputs))))


class MLPEncoderLayer(nn.Module):
    """One MLP for each role."""

    def __init__(self, config: MLPEncoderConfig) -> None:
        super().__init__()
        self.roles = nn.ModuleList(RoleMLP(config) for _ in range(config.num_roles))

    def forward(self, x: Tensor, mask: Tensor, roles: Tensor) -> Tensor:
        """x [B, T, D], mask bool [B, T], roles int64 [B, T] -> x [B, T, D]."""
        valid = mask[..., None].to(x.dtype)
        mean = (x * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        inputs = torch.cat([x, mean.expand_as(x)], dim=-1)
        outputs = torch.stack([mlp(inputs) for mlp in self.roles])  # [L, B, T, D]
        chosen = outputs.gather(0, roles[None, ..., None].expand(1, *x.shape))[0]
        return x + chosen


class MLPEncoder(nn.Module):
    """Token ids -> encoder states, in the dtype of the weights (float64 too)."""

    def __init__(self, config: MLPEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.embed_positions = nn.Embedding(config.max_length, config.dim)
        self.layers = nn.ModuleList(MLPEncoderLayer(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] -> states [B, T, D], zero where the mask is False."""
        ids = ids.masked_fill(~mask, 0)  # what stands in padding is never an index
        roles = roles_of(mask, self.config.num_roles)
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask, roles)
        return self.final_layer_norm(x) * mask[..., None].to(x.dtype)
