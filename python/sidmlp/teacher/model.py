"""TIGER's generator: a small T5 that reads a token history and writes an item's codes.

Rajput et al., Recommender Systems with Generative Retrieval (2023), section 3.2. Trained from
scratch; the shared embedding matrix is also the output layer, as in the first T5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from sidmlp.data import TokenSpec

from .decoder import DecoderState
from .encoder import Layer, encoder_layer, encoder_states

IGNORED = -100  # no token


@dataclass(frozen=True)
class TeacherConfig:
    """Sizes of the T5; the defaults are TIGER's."""

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 6
    head_dim: int = 64
    ffn_dim: int = 1024
    dropout: float = 0.1
    feed_forward: str = "relu"

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Teacher(nn.Module):
    """T5 over the vocabulary of a ``TokenSpec``.

    Level l of the target is predicted by decoder position l, whose input is the padding token at
    l = 1 and the token of c_{l-1} afterwards.
    """

    offsets: Tensor

    def __init__(self, config: TeacherConfig, tokens: TokenSpec) -> None:
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.t5: Any = T5ForConditionalGeneration(
            T5Config(
                vocab_size=tokens.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_decoder_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=config.dropout,
                feed_forward_proj=config.feed_forward,
                pad_token_id=tokens.pad_id,
                eos_token_id=tokens.eos_id,
                use_cache=False,
            )
        )
        self.register_buffer("offsets", torch.tensor(tokens.code_offsets), persistent=False)
        self._compiled_layer: Layer = encoder_layer

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states [B, T, dim] of token ids int64 [B, T] and mask bool [B, T]."""
        dropout = self.config.dropout if self.training else 0.0
        layer = self._compiled_layer if self.training else encoder_layer
        return encoder_states(self.t5.encoder, ids, mask, dropout, layer)

    def compile_training(self) -> None:
        """Training goes through torch.compile from now on: the encoder, where its time goes."""
        self._compiled_layer = torch.compile(encoder_layer, dynamic=False, fullgraph=True)

    def decoder_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Logits [B, K, L, vocab] under teacher forcing with K targets a user, int64 [B, K, L].

        states [B, T, dim], mask bool [B, T]. Level l sees c_1..c_{l-1}; the last code is not read.
        """
        start = codes.new_full((*codes.shape[:2], 1), self.tokens.pad_id)
        tokens = torch.cat([start, (codes + self.offsets)[..., :-1]], dim=2)
        return DecoderState(self, states, mask).feed(tokens)

    def forward(self, ids: Tensor, mask: Tensor, codes: Tensor, real: Tensor) -> Tensor:
        """Mean cross-entropy over the whole vocabulary.

        ids, mask: [B, T] histories; codes: int64 [B, K, L], the targets of each history, of which
        those count where real, bool [B, K], is True.
        """
        logits = self.decoder_logits(self.encode(ids, mask), mask, codes)
        # Ignored rather than left out, so that no shape depends on values.
        wanted = (codes + self.offsets).masked_fill(~real[..., None], IGNORED)
        return nn.functional.cross_entropy(
            logits.flatten(0, 2).float(), wanted.flatten(), ignore_index=IGNORED
        )

    def level_logits(self, logits: Tensor) -> list[Tensor]:
        """Of logits [.., L, vocab], level l's own codes: a list of [.., C_l]."""
        spec = self.tokens
        return [
            logits[..., level, start : start + count]
            for level, (start, count) in enumerate(
                zip(spec.code_offsets, spec.codes_per_level, strict=True)
            )
        ]

    # -- as a sidmlp.teacher.scoring.CandidateModel

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """C_1 .. C_L."""
        return self.tokens.codes_per_level

    def code_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """Log-probabilities over the whole vocabulary, as beam_search adds them: a list of
        [B, N, C_l], in the teacher's dtype.

        states [B, T, dim] of any floating dtype, mask bool [B, T], codes int64 [B, N, L]. Raises
        ValueError in training mode and for states that are not the teacher's.
        """
        if self.training:
            raise ValueError(
                "teacher: expected evaluation mode, got training mode; call teacher.eval() before "
                "it scores"
            )
        weight = self.t5.shared.weight
        if states.shape[-1] != self.config.dim or states.device != weight.device:
            raise ValueError(
                f"states: expected width {self.config.dim} on {weight.device}, the teacher's, got "
                f"{states.shape[-1]} on {states.device}; move the teacher to the student's device, "
                f"and score with CandidateScorer.of_requests where the student has another encoder"
            )
        logits = self.decoder_logits(states.to(weight.dtype), mask, codes)
        return self.level_logits(logits.log_softmax(-1))

    def forward_bytes(self, users: int, candidates: int, tokens: int) -> int:
        """Bound of what ``code_logits`` holds at a time, with room for two of each intermediate."""
        config, levels = self.config, self.tokens.num_levels
        width = config.num_heads * config.head_dim
        kept = 2 * width * config.num_layers  # keys and values of every layer
        position = kept + 6 * (width + config.dim) + 3 * config.ffn_dim + 3 * self.tokens.vocab_size
        position += 3 * config.num_heads * (levels + tokens)  # scores of both attentions
        user = tokens * (kept + 2 * config.dim)
        size = self.t5.shared.weight.element_size()
        return size * users * (user + candidates * levels * position)

    def code_embeddings(self) -> list[Tensor]:
        """Embedding rows of every level's codes, a list of [C_l, dim]."""
        spec = self.tokens
        weight = self.t5.shared.weight.detach()
        return [
            weight[start : start + count]
            for start, count in zip(spec.code_offsets, spec.codes_per_level, strict=True)
        ]
