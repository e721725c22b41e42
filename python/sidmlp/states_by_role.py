"""SID-MLP++'s encoder for training: what ``mlp_encoder`` defines, at a fraction of its work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderLayer, RoleMLP


def states_by_role(encoder: MLPEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """What the encoder computes, each token by the MLP of its own role alone.

    ids int64 [B, T], mask bool [B, T] -> states [B, T, D], zero where the mask is False. Where the
    encoder's ``forward`` runs every MLP on every token, which defines the answer, this takes the
    tokens of a role out by strides; nothing waits for the device.
    """
    width = ids.shape[1]
    place = torch.arange(width, device=ids.device)
    last = (place * mask).amax(1)  # of no valid token: 0, whose role is the same
    x = encoder.embed_tokens(ids.masked_fill(~mask, 0)) + encoder.embed_positions.weight[:width]
    valid = mask[..., None].to(x.dtype)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    for layer in encoder.layers:
        mean = (x * valid).sum(1, keepdim=True) / count
        x = x + _layer(layer, x, mean, last)  # type: ignore[arg-type]  # a ModuleList of Modules
    return encoder.final_layer_norm(x) * valid


def _layer(layer: MLPEncoderLayer, x: Tensor, mean: Tensor, last: Tensor) -> Tensor:
    """The layer's change of x [B, T, D]; mean [B, 1, D]; last int64 [B], the last valid token."""
    roles, (users, width, dim) = len(layer.roles), x.shape
    body = functional.pad(x[:, 1:], (0, 0, 0, (1 - width) % roles)).unflatten(1, (-1, roles))
    ends = last[:, None, None].expand(users, 1, dim)
    # Besides its own, the last role has the first token and the last valid one.
    inputs = [body[:, :, role] for role in range(roles)]
    inputs[-1] = torch.cat([inputs[-1], x[:, :1], x.gather(1, ends)], dim=1)
    outputs = [_mlp(mlp, rows, mean) for mlp, rows in zip(layer.roles, inputs, strict=True)]  # type: ignore[arg-type]
    outputs[-1], first, end = outputs[-1].split([body.shape[1], 1, 1], dim=1)
    change = torch.cat([first, torch.stack(outputs, dim=2).flatten(1, 2)], dim=1)[:, :width]
    is_last = torch.arange(width, device=x.device) == last[:, None]
    return torch.where(is_last[..., None], end, change)


def _mlp(mlp: RoleMLP, x: Tensor, mean: Tensor) -> Tensor:
    """``RoleMLP`` of [x; mean], x [B, n, D], mean [B, 1, D]; the mean's half once a user."""
    own, shared = mlp.linear_in.weight.split(x.shape[-1], dim=1)
    hidden = functional.linear(x, own) + functional.linear(mean, shared, mlp.linear_in.bias)
    return mlp.linear_out(functional.gelu(mlp.norm(hidden)))
