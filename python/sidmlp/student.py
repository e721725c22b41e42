"""The student: a context vector per user and one small MLP head per level, as its equations say.

    p   = mean of the valid states
    q   = W_p p + b_p
    a   = MultiHeadAttention(query q, keys and values X), no biases
    u   = LayerNorm(q + a)
    ctx = LayerNorm(u + W_out ReLU(W_in u + b_in) + b_out)

    h_l = GELU(LayerNorm(W1_l [ctx; e(c_1); ..; e(c_{l-1})] + b1_l))
    h_l = GELU(LayerNorm(W h_l + b)) for every further block; GELU is the exact one (erf)
    logits_l = W2_l h_l + b2_l

Levels are l = 1..L in prose; Python indices and state-dict names count from 0.
Source: SID-MLP (arXiv 2605.12617).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class StudentConfig:
    """The sizes of a student: all that its modules and the shapes of its weights depend on."""

    codes_per_level: tuple[int, ...]  # C_1 .. C_L
    dim: int  # D, width of the encoder states and of the context
    attention_dim: int  # A, all attention heads together
    num_heads: int
    ffn_dim: int  # F
    hidden_dim: int  # H, width of a head's hidden layers
    embedding_dim: int  # E, usually D
    blocks_per_head: int = 1  # 1 = only the first layer
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes_per_level", tuple(int(c) for c in self.codes_per_level))
        if not self.codes_per_level or min(self.codes_per_level) < 1:
            raise ValueError(
                f"codes_per_level: expected at least one level with at least one code each, "
                f"got {self.codes_per_level}; pass the codebook size of every level"
            )
        sizes = ("dim", "attention_dim", "num_heads", "ffn_dim", "hidden_dim")
        for name in (*sizes, "blocks_per_head", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected an integer >= 1, got {getattr(self, name)}; pass the size "
                    f"of the trained model"
                )
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of attention_dim {self.attention_dim}, got "
                f"{self.num_heads}; "
                f"change one of the two"
            )

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codes_per_level)


class Attention(nn.Module):
    """Multi-head attention of one query per user over the user's valid states, without biases."""

    def __init__(self, config: StudentConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.attention_dim // config.num_heads
        self.q_proj = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.out_proj = nn.Linear(config.attention_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """query [B, D], states [B, T, D], zeros where mask [B, T] is False -> [B, D]."""
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(query).unflatten(-1, heads)  # [B, heads, d]
        k = self.k_proj(states).unflatten(-1, heads)  # [B, T, heads, d]
        v = self.v_proj(states).unflatten(-1, heads)
        scores = torch.einsum("bhd,bthd->bht", q, k) / math.sqrt(self.head_dim)
        # A user without any valid state keeps the scores 0 of its zero states: a softmax over
        # nothing would be NaN, in the gradient too, while equal weights times values of 0 give the
        # a = 0 that is wanted.
        hidden = ~mask & mask.any(dim=1, keepdim=True)
        # In the weights' precision: on a CPU autocast would leave a softmax in half precision.
        dtype = torch.promote_types(scores.dtype, self.q_proj.weight.dtype)
        weights = scores.masked_fill(hidden[:, None, :], -math.inf).softmax(dim=-1, dtype=dtype)
        mixed = torch.einsum("bht,bthd->bhd", self.dropout(weights).to(v.dtype), v)
        return self.out_proj(mixed.flatten(1))


class Readout(nn.Module):
    """Encoder states of a user -> the user's context vector."""

    def __init__(self, config: StudentConfig, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.query_proj = nn.Linear(config.dim, config.dim)
        self.attention = Attention(config, attention_dropout)
        self.norm1 = nn.LayerNorm(config.dim, config.layer_norm_eps)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim, config.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D], mask [B, T] (True = valid) -> context [B, D]."""
        # Selecting, not multiplying: a masked state may hold NaN, and 0 * NaN is NaN.
        states = torch.where(mask[..., None], states, torch.zeros_like(states))
        mean = states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        query = self.query_proj(mean)
        u = self.norm1(query + self.attention(query, states, mask))
        ffn = self.ffn_out(self.dropout(functional.relu(self.ffn_in(u))))
        return self.norm2(u + ffn)


class Block(nn.Module):
    """h <- GELU(LayerNorm(W h + b))."""

    def __init__(self, in_dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_dim] -> [.., out_dim]."""
        return functional.gelu(self.norm(self.linear(x)), approximate="none")


class Head(nn.Module):
    """[ctx; e(c_1); ..; e(c_{l-1})] -> logits of level l."""

    def __init__(self, config: StudentConfig, level_index: int, dropout: float) -> None:
        super().__init__()
        widths = [config.dim + level_index * config.embedding_dim]
        widths += [config.hidden_dim] * config.blocks_per_head
        eps = config.layer_norm_eps
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(Block(i, o, eps) for i, o in pairs)
        self.output = nn.Linear(config.hidden_dim, config.codes_per_level[level_index])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D + (l-1) E] -> logits [.., C_l]."""
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.output(x)


class Student(nn.Module):
    """Context readout, frozen token embeddings and L heads; differentiable, in any floating dtype.

    `dropout` acts on the FFN's and the heads' hidden layers, `attention_dropout` on attention
    weights, both in training mode only. The embeddings are the teacher's, so they never receive a
    gradient; the last level's embedding is never read and not stored.
    """

    def __init__(
        self, config: StudentConfig, *, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.readout = Readout(config, dropout, attention_dropout)
        embedded_levels = config.codes_per_level[:-1]
        self.embeddings = nn.ModuleList(
            nn.Embedding(codes, config.embedding_dim) for codes in embedded_levels
        )
        self.embeddings.requires_grad_(False)
        self.heads = nn.ModuleList(Head(config, i, dropout) for i in range(config.num_levels))

    def context(self, states: Tensor, mask: Tensor) -> Tensor:
        """One context vector per user, computed once per request.

        states [B, T, D] in the student's dtype, mask bool [B, T] (True = valid) -> [B, D]. Masked
        states are never read. A user without any valid state has p = 0 and a = 0. Raises ValueError
        on wrong shapes or a mask that is not bool.
        """
        if states.ndim != 3 or states.shape[-1] != self.config.dim:
            raise ValueError(
                f"states: expected shape [batch, tokens, {self.config.dim}], got "
                f"{list(states.shape)}; "
                f"pass the encoder's last hidden states"
            )
        if mask.dtype != torch.bool or mask.shape != states.shape[:2]:
            raise ValueError(
                f"mask: expected bool {list(states.shape[:2])}, got {mask.dtype} "
                f"{list(mask.shape)}; "
                f"pass True where a state is valid, e.g. `ids != pad_id`"
            )
        return self.readout(states, mask)

    def logits(self, level_index: int, context: Tensor, prefix_codes: Tensor) -> Tensor:
        """Logits of level l = level_index + 1 given the codes before it.

        context [.., D] and prefix_codes int [.., >= l-1] (further columns are not read), their
        leading dimensions broadcast -> [.., C_l].
        """
        parts = [context]
        for j in range(level_index):
            parts.append(self.embeddings[j](prefix_codes[..., j]))
        leading = torch.broadcast_shapes(context.shape[:-1], prefix_codes.shape[:-1])
        features = torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], dim=-1)
        return self.heads[level_index](features)

    def forward(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """Teacher forcing: the logits of every level given the true codes before it.

        states [B, T, D], mask bool [B, T], codes int [B, >= L-1] -> L tensors [B, C_l].
        """
        context = self.context(states, mask)
        return [self.logits(i, context, codes) for i in range(self.config.num_levels)]
