"""TIGER's T5 encoder in plain PyTorch: token ids -> encoder states.

    x = embed(ids)
    per layer:  x <- x + O softmax(Q n K n^T + bias) V n,   n = RMSNorm(x)
                x <- x + FFN(n),                            n = RMSNorm(x)
    states = RMSNorm(x)

Scores are not divided by sqrt(head_dim). bias[head, i, j] is a learned value of the bucket of
j - i, one table for all layers, held by the first. RMSNorm(x) = w * x / sqrt(mean(x^2) + eps), no
bias anywhere. FFN is W_o act(W_i n), or W_o (act(W_i0 n) * W_i1 n) when gated.
Source: T5 (arXiv 1910.10683, sections 2.1 and 3.2.2), as TIGER (arXiv 2305.05065) uses it.

The residual x, RMSNorm and the position bias stay in fp32 when the weights are bf16 or fp16: a
residual in fp16 overflows in T5 models. Module names are those inside transformers' T5Stack, so an
encoder's state dict loads without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from .encoder_weights import with_weights
from .spec import T5Spec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gated-relu": functional.relu,
    "gated-gelu": lambda x: functional.gelu(x, approximate="tanh"),
}


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of key j seen from query i, int64 [length, length].

    n = num_buckets / 2 is added to the bucket of the distance |j - i| for keys after the query.
    """
    bucket = distance_buckets(length, num_buckets, max_distance)
    d = torch.arange(length)
    offset = d[None, :] - d[:, None]  # [query, key]
    return bucket[offset.abs()] + num_buckets // 2 * (offset > 0)


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance below `length`, in one direction, int64 [length].

    With n = num_buckets / 2 buckets and m = n / 2, a distance d takes bucket d below m, then
    m + floor(log(d / m) / log(max_distance / m) * (n - m)), at most n - 1. Computed in fp32 on the
    CPU whatever the model's device: at the borders of a bucket another rounding would choose
    another bucket than training did.
    """
    n = num_buckets // 2
    m = n // 2
    d = torch.arange(length)
    far = torch.log(d.clamp(min=1).float() / m) / math.log(max_distance / m) * (n - m)
    return torch.where(d < m, d, (m + far.long()).clamp(max=n - 1))


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] in the residual's dtype -> normed, in the weights' dtype."""
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x * scale).to(self.weight.dtype) * self.weight


class _SelfAttention(nn.Module):
    def __init__(self, spec: T5Spec, *, has_bias: bool) -> None:
        super().__init__()
        width = spec.num_heads * spec.head_dim
        self.heads = (spec.num_heads, spec.head_dim)
        self.q = nn.Linear(spec.dim, width, bias=False)
        self.k = nn.Linear(spec.dim, width, bias=False)
        self.v = nn.Linear(spec.dim, width, bias=False)
        self.o = nn.Linear(width, spec.dim, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(spec.relative_buckets, spec.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, D], bias [B, heads, T, T] added to the scores -> [B, T, D]."""
        q, k, v = (p(x).unflatten(-1, self.heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class _AttentionLayer(nn.Module):
    def __init__(self, spec: T5Spec, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(spec, has_bias=has_bias)
        self.layer_norm = _RMSNorm(spec.dim, spec.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _FeedForward(nn.Module):
    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[spec.feed_forward]
        self.gated = spec.feed_forward.startswith("gated-")
        if self.gated:
            self.wi_0 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
            self.wi_1 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        else:
            self.wi = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        self.wo = nn.Linear(spec.ffn_dim, spec.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class _FeedForwardLayer(nn.Module):
    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(spec)
        self.layer_norm = _RMSNorm(spec.dim, spec.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nn.Module):
    def __init__(self, spec: T5Spec, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [_AttentionLayer(spec, has_bias=has_bias), _FeedForwardLayer(spec)]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class T5Encoder(nn.Module):
    """TIGER's encoder: ids [B, T], mask [B, T] -> states [B, T, D] in the weights' dtype."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.dim)
        self.block = nn.ModuleList(_Block(spec, has_bias=i == 0) for i in range(spec.num_layers))
        self.final_layer_norm = _RMSNorm(spec.dim, spec.layer_norm_eps)

    @classmethod
    def from_weights(cls, spec: T5Spec, weights: Mapping[str, Tensor]) -> T5Encoder:
        """An fp32 encoder on the CPU, frozen and in eval mode, with these verified weights.

        Raises ValueError naming each tensor that is missing, unknown, misshaped or not finite.
        """
        with torch.device("meta"):
            encoder = cls(spec)
        return with_weights(encoder, weights)

    def position_bias(self, length: int) -> Tensor:
        """What each head adds to the score of key j for query i, fp32 or fp64, [heads, T, T]."""
        name = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table: Tensor = self.get_parameter(name)
        buckets = relative_buckets(
            length, self.spec.relative_buckets, self.spec.relative_max_distance
        )
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return table[buckets.to(table.device)].permute(2, 0, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] (True = a token to attend to) -> states [B, T, D].

        A request without any valid token attends to all alike: finite states that nobody reads.
        """
        dtype = self.embed_tokens.weight.dtype
        x = self.embed_tokens(ids).to(torch.promote_types(dtype, torch.float32))
        bias = self.position_bias(ids.shape[1]).to(dtype)  # [heads, T, T]
        lowest = torch.finfo(dtype).min  # not -inf: a softmax over nothing would be NaN
        bias = torch.where(mask[:, None, None, :], bias, lowest)  # [B, heads, T, T]
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)
