"""One step of the T5 decoder for many beams, with cached keys and values.

The same computation as ``transformers``' decoder in evaluation mode, arranged for beams: what is
derived from the encoder states is stored once per user, not once per beam, and a step reorders only
the few cached positions of the beams themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Teacher


class DecoderState:
    """Keys and values of a batch of users and their beams.

    cross: per layer (keys, values), each [users, heads, T, head_dim]; own: per layer (keys,
    values), each [users, beams, heads, steps so far, head_dim].
    """

    def __init__(self, teacher: Teacher, states: Tensor, mask: Tensor) -> None:
        """states [users, T, dim] and mask bool [users, T] come from ``Teacher.encode``."""
        self.teacher = teacher
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        heads = teacher.config.num_heads
        for block in teacher.t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            keys, values = (
                projection(states).unflatten(-1, (heads, -1)).transpose(1, 2)
                for projection in (attention.k, attention.v)
            )
            self.cross.append((keys, values))
            empty = states.new_empty(states.shape[0], 1, heads, 0, teacher.config.head_dim)
            self.own.append((empty, empty))
        # The finite minimum, as transformers has it: a fully masked user attends evenly, not NaN.
        self.cross_bias = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        self.cross_bias.masked_fill_(~mask, torch.finfo(states.dtype).min)
        levels = teacher.tokens.num_levels
        first = teacher.t5.decoder.block[0].layer[0].SelfAttention
        self.position_bias = first.compute_bias(levels, levels)[0]  # [heads, query, key]

    def reorder(self, parents: Tensor) -> None:
        """Makes beam b continue the old beam ``parents[user, b]``; int64 [users, new beams]."""
        rows = torch.arange(parents.shape[0], device=parents.device)[:, None]
        self.own = [(keys[rows, parents], values[rows, parents]) for keys, values in self.own]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [users, beams, vocab] after feeding one token a beam, int64 [users, beams]."""
        t5, config = self.teacher.t5, self.teacher.config
        x = t5.shared(tokens)
        users, beams = tokens.shape
        for layer, block in enumerate(t5.decoder.block):
            own, cross, feed_forward = block.layer

            attention = own.SelfAttention
            normed = own.layer_norm(x)
            query, key, value = (
                projection(normed).unflatten(-1, (config.num_heads, 1, -1))
                for projection in (attention.q, attention.k, attention.v)
            )  # [users, beams, heads, 1, head_dim]
            keys = torch.cat([self.own[layer][0], key], dim=3)
            values = torch.cat([self.own[layer][1], value], dim=3)
            self.own[layer] = (keys, values)
            steps = keys.shape[3]
            bias = self.position_bias[:, steps - 1, None, :steps]  # [heads, 1, steps]
            weights = (query @ keys.transpose(3, 4) + bias).softmax(dim=-1)
            x = x + attention.o((weights @ values).reshape(users, beams, -1))

            attention = cross.EncDecAttention
            query = attention.q(cross.layer_norm(x)).unflatten(-1, (config.num_heads, -1))
            keys, values = self.cross[layer]
            scores = query.transpose(1, 2) @ keys.transpose(2, 3)  # [users, heads, beams, T]
            weights = (scores + self.cross_bias[:, None, None]).softmax(dim=-1)
            mixed = (weights @ values).transpose(1, 2).reshape(users, beams, -1)
            x = x + attention.o(mixed)

            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        x = t5.decoder.final_layer_norm(x)
        return t5.lm_head(x * config.dim**-0.5)
