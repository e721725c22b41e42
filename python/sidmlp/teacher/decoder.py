"""The T5 decoder for many short sequences per user, with cached keys and values.

The same computation and weights as ``transformers``' decoder, arranged for items: what is derived
from the encoder states is computed once per user, not once per sequence. A user's sequences are the
targets of training, all levels fed at once, or the beams of a search, fed level by level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .t5_layers import decoder_layer, normed

if TYPE_CHECKING:
    from .model import Teacher


class DecoderState:
    """Keys and values of a batch of users and their sequences.

    cross: per layer (keys, values), each [users, heads, T, head_dim]; own: per layer (keys,
    values), each [users, sequences, heads, positions so far, head_dim]. Dropout acts in the places
    where T5 has it, in training mode only.
    """

    def __init__(self, teacher: Teacher, states: Tensor, mask: Tensor) -> None:
        """states [users, T, dim] and mask bool [users, T] come from ``Teacher.encode``."""
        self.teacher, self.states = teacher, states
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        for block in teacher.t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            keys, values = (
                projection(states).unflatten(-1, (teacher.config.num_heads, -1)).transpose(1, 2)
                for projection in (attention.k, attention.v)
            )
            self.cross.append((keys, values))
        # The finite minimum, as transformers has it: a fully masked user attends evenly, not NaN.
        self.cross_bias = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        self.cross_bias.masked_fill_(~mask, torch.finfo(states.dtype).min)
        levels = teacher.tokens.num_levels
        first = teacher.t5.decoder.block[0].layer[0].SelfAttention
        future = torch.ones(levels, levels, dtype=torch.bool, device=states.device).triu(1)
        bias = first.compute_bias(levels, levels)[0]
        self.position_bias = bias.masked_fill(future, -torch.inf)  # [heads, query, key]

    def reorder(self, parents: Tensor) -> None:
        """Makes sequence b continue the old ``parents[user, b]``; int64 [users, new sequences]."""
        rows = torch.arange(parents.shape[0], device=parents.device)[:, None]
        self.own = [(keys[rows, parents], values[rows, parents]) for keys, values in self.own]

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [users, sequences, n, vocab] after the next n tokens of every sequence.

        tokens: int64 [users, sequences, n]; position i sees the tokens up to i, fed now or before.
        """
        teacher, first = self.teacher, not self.own
        before, new = 0 if first else self.own[0][0].shape[3], tokens.shape[2]
        bias = self.position_bias[:, before : before + new, : before + new]
        dropout = teacher.config.dropout if teacher.training else 0.0
        layer = teacher.write_layer if teacher.training else decoder_layer
        x = functional.dropout(teacher.t5.shared(tokens), dropout)
        past = [None] * len(self.cross) if first else self.own
        self.own = []
        for block, own, cross in zip(teacher.t5.decoder.block, past, self.cross, strict=True):
            x, keys, values = layer(block, x, own, cross, bias, self.cross_bias, dropout)
            self.own.append((keys, values))
        x = functional.dropout(normed(teacher.t5.decoder.final_layer_norm, x), dropout)
        return teacher.t5.lm_head(x * teacher.config.dim**-0.5)
