"""The T5 encoder, from ``transformers``' weights without its machinery around them.

The same computation as its ``T5Stack``, without the checks of the mask that wait for the device, so
that it can be captured in a CUDA graph, and with a layer as one function of tensors, so that it can
be compiled once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# (layer's module, x, bias, dropout) -> x; see ``encoder_layer``.
Layer = Callable[[Any, Tensor, Tensor, float], Tensor]


def encoder_layer(block: Any, x: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """One layer: x [B, T, dim], bias [B, heads, T, T] added to the attention scores -> x."""
    own, feed_forward = block.layer
    attention, heads = own.SelfAttention, bias.shape[1]
    # One product instead of three: autocast would convert its input three times.
    weight = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
    mixed = functional.linear(_normed(own.layer_norm, x), weight)
    query, keys, values = mixed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    # The bias is fp32 under autocast, so the softmax is, too; what follows it is not.
    weights = (query @ keys.transpose(2, 3) + bias).softmax(dim=-1).to(values.dtype)
    mixed = functional.dropout(weights, dropout) @ values
    x = x + functional.dropout(attention.o(mixed.transpose(1, 2).flatten(2)), dropout)
    fed = _fed(feed_forward.DenseReluDense, _normed(feed_forward.layer_norm, x), dropout)
    return x + functional.dropout(fed, dropout)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fed(module: Any, x: Tensor, dropout: float) -> Tensor:
    """``transformers``' feed-forward without its way back to fp32 before the second product."""
    if hasattr(module, "wi_0"):
        hidden = module.act(module.wi_0(x)) * module.wi_1(x)
    else:
        hidden = module.act(module.wi(x))
    return module.wo(functional.dropout(hidden, dropout))


def encoder_states(
    stack: nn.Module, ids: Tensor, mask: Tensor, dropout: float, layer: Layer = encoder_layer
) -> Tensor:
    """States [B, T, dim] of token ids int64 [B, T], mask bool [B, T]; dropout 0 outside training.

    A request without a valid token attends evenly to its padding, as in ``transformers``.
    """
    encoder: Any = stack
    first = encoder.block[0].layer[0].SelfAttention
    bias = first.compute_bias(ids.shape[1], ids.shape[1])
    # The finite minimum: with -inf a request without a valid token would be NaN.
    hidden = torch.zeros(mask.shape, dtype=bias.dtype, device=mask.device)
    hidden = hidden.masked_fill(~mask, torch.finfo(bias.dtype).min)
    bias = bias + hidden[:, None, None]
    x = functional.dropout(encoder.embed_tokens(ids), dropout)
    for block in encoder.block:
        x = layer(block, x, bias, dropout)
    return functional.dropout(_normed(encoder.final_layer_norm, x), dropout)
