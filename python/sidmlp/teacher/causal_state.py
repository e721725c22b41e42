"""A decoder-only Transformer over histories and the many short sequences that continue each.

The same computation and weights as ``transformers``' Qwen3 and Llama, arranged for items: a history
is read once per user, and its keys and values serve all of the user's sequences, which add their
own. A query's softmax runs over both, so nothing of the history is copied per beam.

Positions count valid tokens, so padding on either side, or in between, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from .causal import CausalTeacher

Rotation = tuple[Tensor, Tensor]  # cosines and sines
# See ``history_layer``.
Layer = Callable[[Any, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def history_layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over histories: x [B, T, dim] -> x, and keys and values [B, kv_heads, T, head_dim].

    cos, sin: [B, T, head_dim] of the positions; visible: bool [B, 1, query, key]; dropout: 0
    outside training. A function of tensors, to be compiled once for all layers.
    """
    query, keys, values = (part.transpose(1, 2) for part in _projected(layer, x))
    query, keys = (_rotated(part, cos[:, None], sin[:, None]) for part in (query, keys))
    mixed = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=visible,
        dropout_p=dropout,
        enable_gqa=keys.shape[1] < query.shape[1],
    )
    mixed = layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    x = x + functional.dropout(mixed, dropout)
    fed = layer.mlp(layer.post_attention_layernorm(x))
    return x + functional.dropout(fed, dropout), keys, values


class CausalState:
    """Keys and values of a batch of users' histories and of their sequences.

    states: [users, T, dim], last hidden states of the history's tokens; read: per layer (keys,
    values), each [users, kv_heads, T, head_dim]; own: per layer (keys, values), each
    [users, kv_heads, sequences, positions so far, head_dim]. Dropout acts, in training mode only,
    where T5 has it: on embeddings, attention weights, what a layer adds, and the last states.
    """

    def __init__(self, teacher: CausalTeacher, ids: Tensor, mask: Tensor) -> None:
        """ids int64 [users, T] and mask bool [users, T], True = valid; other ids are not read."""
        self.teacher = teacher
        self.backbone: Any = teacher.model.model
        self.mask = mask
        self.lengths = mask.sum(1)
        self.read: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        causal = torch.ones(2 * [ids.shape[1]], dtype=torch.bool, device=ids.device).tril()
        # A padding query sees itself as well: attention kernels differ in what they make of no key.
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        visible = (causal & mask[:, None] | itself)[:, None]  # [users, 1, query, key]
        rotation = self._rotation((mask.cumsum(1) - 1).clamp(min=0))
        x = self._dropout(self.backbone.embed_tokens(ids.masked_fill(~mask, teacher.tokens.pad_id)))
        dropout = teacher.config.dropout if teacher.training else 0.0
        read_layer = teacher.read_layer if teacher.training else history_layer
        for layer in self.backbone.layers:
            x, keys, values = read_layer(layer, x, *rotation, visible, dropout)
            self.read.append((keys, values))
        self.states = self._dropout(self.backbone.norm(x))

    def reorder(self, parents: Tensor) -> None:
        """Makes sequence b continue the old ``parents[user, b]``; int64 [users, new sequences]."""
        rows = torch.arange(parents.shape[0], device=parents.device)[:, None]
        # Indexed on both sides of a slice, [users, new sequences] comes first.
        self.own = [
            (keys[rows, :, parents].transpose(1, 2), values[rows, :, parents].transpose(1, 2))
            for keys, values in self.own
        ]

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [users, sequences, n, vocab] after the next n tokens of every sequence.

        tokens: int64 [users, sequences, n]; position i sees the history and the sequence's tokens
        up to i, fed now or before.
        """
        before, new = self.own[0][0].shape[3] if self.own else 0, tokens.shape[2]
        steps = torch.arange(before, before + new, device=tokens.device)
        rotation = self._rotation(self.lengths[:, None] + steps)
        x = self._dropout(self.backbone.embed_tokens(tokens))
        for number, layer in enumerate(self.backbone.layers):
            x = x + self._dropout(self._sequence_attention(number, layer, x, rotation))
            x = x + self._dropout(layer.mlp(layer.post_attention_layernorm(x)))
        return self.teacher.model.lm_head(self._dropout(self.backbone.norm(x)))

    def _sequence_attention(self, number: int, layer: Any, x: Tensor, rotation: Rotation) -> Tensor:
        cos, sin = (part[:, None, :, None] for part in rotation)  # [users, 1, n, 1, head_dim]
        query, keys, values = _projected(layer, x)  # [users, sequences, n, heads, head_dim]
        query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
        keys, values = (part.permute(0, 3, 1, 2, 4) for part in (keys, values))
        if number < len(self.own):
            keys = torch.cat([self.own[number][0], keys], dim=3)
            values = torch.cat([self.own[number][1], values], dim=3)
            self.own[number] = (keys, values)
        else:
            self.own.append((keys, values))
        # Heads that share keys stand together: [users, kv_heads, sequences, group, n, head_dim].
        query = query.unflatten(3, (keys.shape[1], -1)).permute(0, 3, 1, 4, 2, 5)
        query = query * layer.self_attn.scaling
        shape = query.shape[:-1]
        read_keys, read_values = self.read[number]
        over_history = query.flatten(2, 4) @ read_keys.transpose(2, 3)
        over_own = query.flatten(3, 4) @ keys.transpose(3, 4)
        new, total = shape[4], keys.shape[3]
        future = torch.ones(new, total, dtype=torch.bool, device=x.device).triu(1 + total - new)
        scores = torch.cat(
            [
                over_history.view(*shape, -1).masked_fill(
                    ~self.mask[:, None, None, None, None], -torch.inf
                ),
                over_own.view(*shape, -1).masked_fill(future, -torch.inf),
            ],
            dim=-1,
        )
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = self._dropout(scores.softmax(dim=-1, dtype=exact).to(values.dtype))
        tokens = self.mask.shape[1]
        mixed = (weights[..., :tokens].flatten(2, 4) @ read_values).view(*shape, -1)
        mixed = mixed + (weights[..., tokens:].flatten(3, 4) @ values).view(*shape, -1)
        return layer.self_attn.o_proj(mixed.permute(0, 2, 4, 1, 3, 5).flatten(3))

    def _rotation(self, positions: Tensor) -> Rotation:
        """Of positions int64 [users, n]: cosines and sines, each [users, n, head_dim]."""
        return self.backbone.rotary_emb(self.backbone.embed_tokens.weight, positions)

    def _dropout(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.teacher.config.dropout, self.teacher.training)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: the halves of the last axis are the two coordinates of each rotation."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [.., dim], each [.., heads or kv_heads, head_dim]."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    query, keys, values = (
        projection(normed).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3 has them, Llama has not
        query, keys = attention.q_norm(query), attention.k_norm(keys)
    return query, keys, values
