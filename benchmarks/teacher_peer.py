"""The teacher as a peer: TIGER's T5 under Hugging Face `generate`, constrained to the catalogue.

Sizes are TIGER's and weights random: how long `generate` takes does not depend on their values,
only on the number of steps, which are as many as levels. It starts from encoder states, as our
decode_states does; reading its sequences as items is not timed.

transformers' `prefix_allowed_tokens_fn` is a Python call for each beam and step. CatalogueMask does
the same for all beams at once, from the reference's table of children, on the device.

Its scores are not a student's, so it is judged by itself: all sequences are items, a request's are
different ones, and recomputed in float64 their scores descend, within twice the error of its own
dtype plus the rounding floor.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from decode_checks import VerificationError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from sidmlp.data import TokenSpec
from sidmlp.teacher import PrefixTable, Teacher, TeacherConfig
from sidmlp_kernels.testing import rounding_floor

MAX_ITEMS = 20  # in a history, as the published 82 tokens have it


class CatalogueMask(LogitsProcessor):
    """-inf for every token that continues no prefix of an item."""

    def __init__(self, table: PrefixTable, tokens: TokenSpec, device: torch.device | str) -> None:
        self.tokens = tokens
        self.children = [level.to(device) for level in table.children]  # [nodes, C_l], -1: none

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [n, 1 + l] after l levels, scores [n, vocabulary] -> scores, masked."""
        spec, level = self.tokens, input_ids.shape[1] - 1
        node = torch.zeros_like(input_ids[:, 0])
        for j in range(level):
            code = (input_ids[:, 1 + j] - spec.code_offsets[j]).clamp(
                0, spec.codes_per_level[j] - 1
            )
            node = self.children[j][node, code].clamp(min=0)  # a beam that is none has no score
        codes = slice(spec.code_offsets[level], spec.code_offsets[level] + self._count(level))
        masked = torch.full_like(scores, -torch.inf)
        masked[:, codes] = scores[:, codes].masked_fill(self.children[level][node] < 0, -torch.inf)
        return masked

    def _count(self, level: int) -> int:
        return self.tokens.codes_per_level[level]


class TeacherPeer:
    """`generate` for a batch of random histories of one catalogue."""

    def __init__(
        self,
        codes: np.ndarray,
        codes_per_level: tuple[int, ...],
        *,
        batch: int,
        k: int,
        num_beams: int,
        dtype: torch.dtype,
        device: torch.device | str,
        config: TeacherConfig | None = None,
        seed: int = 0,
    ) -> None:
        """codes: integers [N, L]. The weights depend on the seed alone."""
        self.codes, self.k, self.num_beams = codes.astype(np.int64), k, num_beams
        self.tokens = TokenSpec.for_codes(codes_per_level, MAX_ITEMS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.exact = Teacher(config or TeacherConfig(), self.tokens).eval().double()
        self.teacher = copy.deepcopy(self.exact).to(device, dtype)
        picks = np.random.default_rng(seed).integers(0, len(codes), (batch, MAX_ITEMS))
        ids, mask = self.tokens.batch(list(picks), self.codes)
        self.mask = mask.to(device)
        self.states = self.teacher.encode(ids.to(device), self.mask)
        table = PrefixTable(self.codes, codes_per_level)
        self.processors = LogitsProcessorList([CatalogueMask(table, self.tokens, device)])

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The k best sequences of each request, tokens int64 [B, k, L]."""
        levels = self.tokens.num_levels
        found: Any = self.teacher.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            attention_mask=self.mask.long(),
            decoder_start_token_id=self.tokens.pad_id,
            do_sample=False,
            num_beams=self.num_beams,
            num_return_sequences=self.k,
            min_new_tokens=levels,
            max_new_tokens=levels,
            length_penalty=0.0,
            use_cache=True,
            logits_processor=self.processors,
        )
        return found[:, 1:].unflatten(0, (-1, self.k))

    def invalid_rate(self, sequences: Tensor) -> float:
        """Share of the sequences [B, k, L] that name no item."""
        spec = self.tokens
        codes = sequences.cpu().numpy() - np.asarray(spec.code_offsets)
        inside = ((codes >= 0) & (codes < np.asarray(spec.codes_per_level))).all(axis=-1)
        known = np.isin(self._keys(codes), self._keys(self.codes))
        return 1 - float((inside & known).mean())

    @torch.no_grad()
    def check(self, sequences: Tensor, requests: int) -> dict[str, Any]:
        """What to report of right sequences [B, k, L]; VerificationError for wrong ones.

        requests: so many are scored again in float64; items are looked up for all.
        """
        rate = self.invalid_rate(sequences)
        if rate > 0:
            raise VerificationError(
                f"teacher: expected items alone, got {rate:.2%} other sequences"
            )
        codes = sequences - torch.tensor(self.tokens.code_offsets, device=sequences.device)
        if any(len(row.unique(dim=0)) < self.k for row in codes):
            raise VerificationError("teacher: a request has the same item twice")
        codes = codes[:requests]
        states, mask = self.states[:requests], self.mask[:requests]
        same = self._scores(self.teacher, states, mask, codes).double().cpu()
        exact = self._scores(self.exact, states.double().cpu(), mask.cpu(), codes.cpu())
        dtype = self.states.dtype
        eps = 2 * float((same - exact).abs().max()) + rounding_floor(exact, dtype)
        ascending = (exact[:, 1:] > exact[:, :-1] + 2 * eps).sum()
        if int(ascending):
            raise VerificationError(
                f"teacher: expected descending scores, got {int(ascending)} that ascend by more "
                f"than {2 * eps:.3g}"
            )
        return {"requests": len(sequences), "requests_scored": len(codes), "eps": eps}

    @staticmethod
    def _scores(teacher: Teacher, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Summed log-probabilities of codes [B, k, L] over the whole vocabulary, [B, k]."""
        logits = teacher.decoder_logits(states, mask, codes).double()
        tokens = codes + teacher.offsets.to(codes.device)
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)

    def _keys(self, codes: np.ndarray) -> np.ndarray:
        key = np.zeros(codes.shape[:-1], np.int64)
        for level, size in enumerate(self.tokens.codes_per_level):
            key = key * size + codes[..., level]
        return key
