"""A decoder-only generator: a small Qwen3 or Llama of ``transformers``, trained from scratch.

One causal stack reads [history, first token, codes of the target] where TIGER has an encoder and a
decoder. The vocabulary and the batches are the same (``sidmlp.data.TokenSpec``), so is the loss:
cross-entropy of the target's codes. What the student reads are the last hidden states of the
history's tokens, each of which has seen the tokens before it. Input and output embedding are one
matrix, as in the small published Qwen3s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sidmlp.data import TokenSpec
from sidmlp.training import compiled

from .causal_state import CausalState, Layer, history_layer
from .generative import GenerativeTeacher

CAUSAL_BACKBONES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@dataclass(frozen=True)
class CausalConfig:
    """Sizes of a decoder-only backbone, one of CAUSAL_BACKBONES.

    num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads; None
    means as many as num_heads.
    """

    backbone: str = "qwen3"
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 6
    head_dim: int = 64
    ffn_dim: int = 1024
    dropout: float = 0.1
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.backbone not in CAUSAL_BACKBONES:
            raise ValueError(
                f"backbone: expected one of {', '.join(CAUSAL_BACKBONES)}, got {self.backbone!r}; "
                f"the T5 is sidmlp.teacher.Teacher"
            )
        for name in ("dim", "num_layers", "num_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, got {self.head_dim}")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads {self.num_heads}, got {self.num_kv_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class CausalTeacher(GenerativeTeacher):
    """A decoder-only Transformer over the vocabulary of a ``TokenSpec``.

    The last hidden states do not hold what continues a history (keys and values of every layer
    do), so candidates are scored from token ids: ``CandidateScorer.of_requests``.
    """

    config: CausalConfig

    def __init__(self, config: CausalConfig, tokens: TokenSpec) -> None:
        super().__init__(tokens)
        self.config = config
        make_config, make_model = CAUSAL_BACKBONES[config.backbone]
        self.model: Any = make_model(
            make_config(
                vocab_size=tokens.vocab_size,
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=tokens.max_tokens + tokens.num_levels,
                tie_word_embeddings=True,
                attention_dropout=config.dropout,
                # No padding token: it begins every target, and its row has to learn.
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )

        self.read_layer: Layer = history_layer  # in training

    def compile_training(self) -> None:
        """Training goes through torch.compile from now on: the layers that read the history."""
        self.read_layer = compiled(history_layer)

    def begin(self, ids: Tensor, mask: Tensor) -> CausalState:
        """Reads token ids int64 [B, T] where mask, bool [B, T], is True; any mask is legal."""
        return CausalState(self, ids, mask)

    def token_embedding(self) -> nn.Embedding:
        """The embedding matrix of all tokens, which is the output layer, too."""
        return self.model.model.embed_tokens

    def forward_bytes(self, users: int, candidates: int, tokens: int) -> int:
        """Bound of what ``request_logits`` holds at a time: the keys and values of the histories,
        and beside them first what a layer makes of these, then of the candidates' positions."""
        config, levels = self.config, self.tokens.num_levels
        width, shared = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
        kept = 2 * shared * config.num_layers  # keys and values of every layer
        work = 6 * (width + config.dim) + 4 * shared + 4 * config.ffn_dim
        # The scores of all pairs of tokens, where attention is not fused.
        history = tokens * (work + 2 * (config.num_heads + 1) * tokens)
        position = kept + work + 3 * self.tokens.vocab_size
        position += 4 * config.num_heads * (levels + tokens)
        most = tokens * (kept + config.dim) + max(history, candidates * levels * position)
        return self.token_embedding().weight.element_size() * users * most
