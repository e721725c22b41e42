"""What teachers that write an item's codes token by token have in common, whatever their backbone.

A teacher reads a history once (``begin``) and is then fed the tokens of many sequences that
continue it: the targets of training, the candidates of a rescoring, or the beams of a search.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sidmlp.data import TokenSpec

IGNORED = -100  # no token


class SequenceState(Protocol):
    """A batch of users' histories, read once, and the sequences that continue each of them."""

    states: Tensor  # [users, T, dim], one per token of the history: what a student reads

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [users, sequences, n, vocab] after the next n tokens of every sequence.

        tokens: int64 [users, sequences, n]; position i sees the tokens up to i, fed now or before.
        """

    def reorder(self, parents: Tensor) -> None:
        """Makes sequence b continue the old ``parents[user, b]``; int64 [users, new sequences]."""


class GenerativeTeacher(nn.Module, ABC):
    """A model over the vocabulary of a ``TokenSpec``; subclasses say how it reads and continues.

    Level l of the target is predicted after the padding token at l = 1, which begins every
    sequence, and after the token of c_{l-1} then. Tensors follow the module's device.
    """

    config: Any  # a frozen dataclass with the backbone's sizes, ``dim`` among them
    offsets: Tensor

    def __init__(self, tokens: TokenSpec) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("offsets", torch.tensor(tokens.code_offsets), persistent=False)

    @abstractmethod
    def begin(self, ids: Tensor, mask: Tensor) -> SequenceState:
        """Reads token ids int64 [B, T] where mask, bool [B, T], is True; any mask is legal."""

    @abstractmethod
    def compile_training(self) -> None:
        """Training goes through torch.compile from now on: the layers that read the history."""

    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """The embedding matrix of all tokens."""

    @abstractmethod
    def forward_bytes(self, users: int, candidates: int, tokens: int) -> int:
        """Bound of what scoring so many candidates of so many users holds at a time."""

    @property
    def dim(self) -> int:
        """D, the width of the states that a student reads."""
        return int(self.config.dim)

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """C_1 .. C_L."""
        return self.tokens.codes_per_level

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States [B, T, dim] of token ids int64 [B, T] and mask bool [B, T]; where the mask is
        False they are finite and mean nothing."""
        return self.begin(ids, mask).states

    def forced_tokens(self, codes: Tensor) -> Tensor:
        """What is fed for codes int64 [B, N, L] under teacher forcing: the first token, then all
        codes but the last; int64 [B, N, L]."""
        start = codes.new_full((*codes.shape[:2], 1), self.tokens.pad_id)
        return torch.cat([start, (codes + self.offsets)[..., :-1]], dim=2)

    def forward(self, ids: Tensor, mask: Tensor, codes: Tensor, real: Tensor) -> Tensor:
        """Mean cross-entropy over the whole vocabulary.

        ids, mask: [B, T] histories; codes: int64 [B, N, L], the targets of each history, of which
        those count where real, bool [B, N], is True.
        """
        logits = self.begin(ids, mask).feed(self.forced_tokens(codes))
        # Ignored rather than left out, so that no shape depends on values.
        wanted = (codes + self.offsets).masked_fill(~real[..., None], IGNORED)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return nn.functional.cross_entropy(
            logits.flatten(0, 2).to(exact), wanted.flatten(), ignore_index=IGNORED
        )

    def teacher_forced(
        self, ids: Tensor, mask: Tensor, codes: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """States [B, T, dim] and, per level, logits [B, N, C_l] of its own codes given the codes
        before them; see ``sidmlp.teacher.Distillable``."""
        state = self.begin(ids, mask)
        return state.states, self.level_logits(state.feed(self.forced_tokens(codes)))

    def request_logits(self, ids: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """Log-probabilities over the whole vocabulary, as ``beam_search`` adds them: a list of
        [B, N, C_l], in the teacher's dtype; see ``sidmlp.teacher.RequestModel``.

        ids int64 [B, T], mask bool [B, T], codes int64 [B, N, L]. Raises ValueError in training
        mode and for requests on another device.
        """
        self.check_scoring("ids", ids)
        logits = self.begin(ids, mask).feed(self.forced_tokens(codes))
        return self.level_logits(logits.log_softmax(-1))

    def check_scoring(self, name: str, given: Tensor) -> None:
        """ValueError unless the teacher is in evaluation mode and ``given`` on its device."""
        if self.training:
            raise ValueError(
                "teacher: expected evaluation mode, got training mode; call teacher.eval() before "
                "it scores"
            )
        if given.device != self.offsets.device:
            raise ValueError(
                f"{name}: expected them on {self.offsets.device}, the teacher's device, got "
                f"{given.device}; move the teacher to the student's device"
            )

    def level_logits(self, logits: Tensor) -> list[Tensor]:
        """Of logits [.., L, vocab], level l's own codes: a list of [.., C_l]."""
        return [
            logits[..., level, start : start + count]
            for level, (start, count) in enumerate(self._code_spans())
        ]

    def code_embeddings(self) -> list[Tensor]:
        """Embedding rows of every level's codes, a list of [C_l, dim]."""
        weight = self.token_embedding().weight.detach()
        return [weight[start : start + count] for start, count in self._code_spans()]

    def _code_spans(self) -> list[tuple[int, int]]:
        return list(zip(self.tokens.code_offsets, self.tokens.codes_per_level, strict=True))
