"""The layers of T5 as functions of tensors, each to be compiled once for all layers of a stack.

The same computation and weights as ``transformers``' blocks, without the machinery around them. The
layers compute in the dtype that autocast gives their products; sums and norms stay as they come in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# (layer's module, x, bias, dropout) -> x; see ``encoder_layer``.
EncoderLayer = Callable[[Any, Tensor, Tensor, float], Tensor]
# See ``decoder_layer``.
DecoderLayer = Callable[..., tuple[Tensor, Tensor, Tensor]]


def encoder_layer(block: Any, x: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """One layer: x [B, T, dim], bias [B, heads, T, T] added to the attention scores -> x."""
    own, feed_forward = block.layer
    attention, heads = own.SelfAttention, bias.shape[1]
    # One product instead of three: autocast would convert its input three times.
    weight = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
    mixed = functional.linear(normed(own.layer_norm, x), weight)
    query, keys, values = mixed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    # The bias is fp32 under autocast, so the softmax is, too; what follows it is not.
    weights = (query @ keys.transpose(2, 3) + bias).softmax(dim=-1).to(values.dtype)
    mixed = functional.dropout(weights, dropout) @ values
    x = x + functional.dropout(attention.o(mixed.transpose(1, 2).flatten(2)), dropout)
    fed = _fed(feed_forward.DenseReluDense, normed(feed_forward.layer_norm, x), dropout)
    return x + functional.dropout(fed, dropout)


def decoder_layer(
    block: Any,
    x: Tensor,
    past: tuple[Tensor, Tensor] | None,
    cross: tuple[Tensor, Tensor],
    own_bias: Tensor,
    cross_bias: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over the n next positions of every user's sequences.

    x: [users, sequences, n, dim]; past: keys and values of the positions before, each [users,
    sequences, heads, positions, head_dim]; cross: those of the history, each [users, heads, T,
    head_dim]; own_bias [heads, n, all positions] and cross_bias [users, T] are added to attention
    scores -> x, and keys and values of all positions.
    """
    own, other, feed_forward = block.layer
    attention, heads = own.SelfAttention, own_bias.shape[0]
    weight = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
    mixed = functional.linear(normed(own.layer_norm, x), weight)
    # [users, sequences, heads, n, head_dim] each
    query, keys, values = mixed.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    if past is not None:
        keys, values = (torch.cat(pair, dim=3) for pair in zip(past, (keys, values), strict=True))
    weights = (query @ keys.transpose(3, 4) + own_bias).softmax(dim=-1).to(values.dtype)
    mixed = (functional.dropout(weights, dropout) @ values).transpose(2, 3).flatten(3)
    x = x + functional.dropout(attention.o(mixed), dropout)

    attention = other.EncDecAttention
    # All positions of all sequences of a user are queries of one attention.
    query = attention.q(normed(other.layer_norm, x)).unflatten(-1, (heads, -1)).flatten(1, 2)
    scores = query.transpose(1, 2) @ cross[0].transpose(2, 3) + cross_bias[:, None, None]
    weights = functional.dropout(scores.softmax(dim=-1).to(cross[1].dtype), dropout)
    mixed = (weights @ cross[1]).transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
    x = x + functional.dropout(attention.o(mixed), dropout)

    fed = _fed(feed_forward.DenseReluDense, normed(feed_forward.layer_norm, x), dropout)
    return x + functional.dropout(fed, dropout), keys, values


def normed(norm: Any, x: Tensor) -> Tensor:
    """T5's norm: x over its root mean square, times a weight."""
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fed(module: Any, x: Tensor, dropout: float) -> Tensor:
    """``transformers``' feed-forward without its way back to fp32 before the second product."""
    if hasattr(module, "wi_0"):
        hidden = module.act(module.wi_0(x)) * module.wi_1(x)
    else:
        hidden = module.act(module.wi(x))
    return module.wo(functional.dropout(hidden, dropout))
