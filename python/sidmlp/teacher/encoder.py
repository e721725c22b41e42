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
    normed, heads = own.layer_norm(x), bias.shape[1]
    attention = own.SelfAttention
    query, keys, values = (
        projection(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (attention.q, attention.k, attention.v)
    )
    # The bias is fp32 under autocast, so the softmax is, too.
    weights = (query @ keys.transpose(2, 3) + bias).softmax(dim=-1)
    mixed = functional.dropout(weights, dropout).to(values.dtype) @ values
    x = x + functional.dropout(attention.o(mixed.transpose(1, 2).flatten(2)), dropout)
    fed = feed_forward.DenseReluDense(feed_forward.layer_norm(x))
    return x + functional.dropout(fed, dropout)


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
    return functional.dropout(encoder.final_layer_norm(x), dropout)
