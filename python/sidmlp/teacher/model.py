"""TIGER's generator: a small T5 that reads a token history and writes an item's codes.

Rajput et al., Recommender Systems with Generative Retrieval (2023), section 3.2. Trained from
scratch; the shared embedding matrix is also the output layer, as in the first T5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from sidmlp.data import TokenSpec
from sidmlp.training import compiled

from .decoder import DecoderState
from .encoder import encoder_states
from .generative import GenerativeTeacher
from .t5_layers import DecoderLayer, EncoderLayer, decoder_layer, encoder_layer


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


class Teacher(GenerativeTeacher):
    """T5 over the vocabulary of a ``TokenSpec``; its encoder's output is what the student reads."""

    def __init__(self, config: TeacherConfig, tokens: TokenSpec) -> None:
        super().__init__(tokens)
        self.config = config
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
        # In training:
        self.read_layer: EncoderLayer = encoder_layer
        self.write_layer: DecoderLayer = decoder_layer

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states [B, T, dim] of token ids int64 [B, T] and mask bool [B, T]."""
        dropout = self.config.dropout if self.training else 0.0
        layer = self.read_layer if self.training else encoder_layer
        return encoder_states(self.t5.encoder, ids, mask, dropout, layer)

    def compile_training(self) -> None:
        """Training goes through torch.compile from now on: the layers of encoder and decoder."""
        self.read_layer = compiled(encoder_layer)
        self.write_layer = compiled(decoder_layer)

    def begin(self, ids: Tensor, mask: Tensor) -> DecoderState:
        """Encodes token ids int64 [B, T] where mask, bool [B, T], is True."""
        return DecoderState(self, self.encode(ids, mask), mask)

    def token_embedding(self) -> nn.Embedding:
        """The embedding matrix of all tokens, which is the output layer, too."""
        return self.t5.shared

    def decoder_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Logits [B, N, L, vocab] under teacher forcing with N targets a user, int64 [B, N, L].

        states [B, T, dim], mask bool [B, T]. Level l sees c_1..c_{l-1}; the last code is not read.
        """
        return DecoderState(self, states, mask).feed(self.forced_tokens(codes))

    def teacher_forced(
        self, ids: Tensor, mask: Tensor, codes: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Encoder states [B, T, dim], and per level the decoder's logits [B, N, C_l]."""
        states = self.encode(ids, mask)
        return states, self.level_logits(self.decoder_logits(states, mask, codes))

    # -- as a sidmlp.teacher.scoring.CandidateModel

    def code_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """Log-probabilities over the whole vocabulary, as beam_search adds them: a list of
        [B, N, C_l], in the teacher's dtype.

        states [B, T, dim] of any floating dtype, mask bool [B, T], codes int64 [B, N, L]. Raises
        ValueError in training mode and for states that are not the teacher's.
        """
        weight = self.t5.shared.weight
        if states.shape[-1] != self.config.dim or states.device != weight.device:
            raise ValueError(
                f"states: expected width {self.config.dim} on {weight.device}, the teacher's, got "
                f"{states.shape[-1]} on {states.device}; move the teacher to the student's device, "
                f"and score with CandidateScorer.of_requests where the student has another encoder"
            )
        self.check_scoring("states", states)
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
