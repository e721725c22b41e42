"""The T5 encoder, from ``transformers``' weights without its machinery around them.

The same computation as its ``T5Stack``, without the checks of the mask that wait for the device, so
that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .t5_layers import EncoderLayer, encoder_layer, normed


def encoder_states(
    stack: nn.Module, ids: Tensor, mask: Tensor, dropout: float, layer: EncoderLayer = encoder_layer
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
    return functional.dropout(normed(encoder.final_layer_norm, x), dropout)
