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
        teacher = self.teacher
        x = self._dropout(teacher.t5.shared(tokens))
        for layer, block in enumerate(teacher.t5.decoder.block):
            own, cross, feed_forward = block.layer
            x = x + self._dropout(self._own_attention(layer, own, x))
            x = x + self._dropout(self._cross_attention(layer, cross, x))
            x = x + self._dropout(self._feed_forward(feed_forward, x))
        x = self._dropout(teacher.t5.decoder.final_layer_norm(x))
        return teacher.t5.lm_head(x * teacher.config.dim**-0.5)

    def _own_attention(self, layer: int, module, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        attention, normed = module.SelfAttention, module.layer_norm(x)
        query, keys, values = (
            projection(normed).unflatten(-1, (self.teacher.config.num_heads, -1)).transpose(2, 3)
            for projection in (attention.q, attention.k, attention.v)
        )  # [users, sequences, heads, n, head_dim]
        new = query.shape[3]
        if layer < len(self.own):
            keys = torch.cat([self.own[layer][0], keys], dim=3)
            values = torch.cat([self.own[layer][1], values], dim=3)
            self.own[layer] = (keys, values)
        else:
            self.own.append((keys, values))
        total = keys.shape[3]
        bias = self.position_bias[:, total - new : total, :total]
        weights = (query @ keys.transpose(3, 4) + bias).softmax(dim=-1)
        return attention.o((self._dropout(weights) @ values).transpose(2, 3).flatten(3))

    def _cross_attention(self, layer: int, module, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        attention, normed = module.EncDecAttention, module.layer_norm(x)
        # All positions of all sequences of a user are queries of one attention.
        query = attention.q(normed).unflatten(-1, (self.teacher.config.num_heads, -1)).flatten(1, 2)
        keys, values = self.cross[layer]
        scores = query.transpose(1, 2) @ keys.transpose(2, 3)
        weights = (scores + self.cross_bias[:, None, None]).softmax(dim=-1)
        mixed = (self._dropout(weights) @ values).transpose(1, 2)
        return attention.o(mixed.flatten(2).view(*x.shape[:3], -1))

    @staticmethod
    def _feed_forward(module, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return module.DenseReluDense(module.layer_norm(x))

    def _dropout(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.teacher.config.dropout, self.teacher.training)
