"""Scores of given candidates by a model that generates codes: one parallel forward, no search.

    score(user, candidate) = sum over l of log p_l(c_l | user, c_1 .. c_{l-1})

Under teacher forcing all levels of all candidates of a user are one forward over the user's encoder
states. That is what re-ranks a student's proposals:

    scorer = CandidateScorer(teacher)
    recs = model.decode(batch, k=10, num_beams=50, rescore=scorer)       # model of sidmlp_kernels

Any model can take the teacher's place that has the three methods of ``CandidateModel``, or, where
states are not enough to go on from, the two of ``RequestModel``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .search import PrefixTable

NORMALISATIONS = ("model", "codebook", "children")
# (states, mask, codes, counts) -> scores, what sidmlp_kernels takes as `rescore`.
Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class CandidateModel(Protocol):
    """What a model of somebody else hands over: states and logits.

    Evaluation mode, no randomness, and nothing of one user in another's numbers. ``Teacher`` is
    one. A model that cannot go on from states, as a decoder-only Transformer with its keys and
    values, is a ``RequestModel``.
    """

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """C_1 .. C_L, as the student has them."""

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States [B, T, D] of token ids int64 [B, T] and mask bool [B, T], True = valid.

        The states that the student reads, too, if it was distilled from this model; called by
        ``CandidateScorer.of_requests`` alone.
        """

    def code_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """Of every level l, a floating [B, N, C_l] for its own codes given c_1 .. c_{l-1}.

        states [B, T, D], zeros where mask is False; codes int64 [B, N, L], 0-based. Logits, which
        "codebook" and "children" normalise, or log-probabilities, which "model" takes as they are.
        """

    def forward_bytes(self, users: int, candidates: int, tokens: int) -> int:
        """At most so many bytes does ``code_logits`` hold at a time, its answer included, for
        ``candidates`` of each of ``users`` with states of ``tokens``; grows with each of them."""


@runtime_checkable
class RequestModel(Protocol):
    """What a model hands over that scores candidates from token ids; ``CausalTeacher`` is one.

    Of a ``CandidateModel`` it has ``codes_per_level`` and, for ``request_logits``,
    ``forward_bytes``.
    """

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """C_1 .. C_L, as the student has them."""

    def request_logits(self, ids: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        """``CandidateModel.code_logits`` of token ids int64 [B, T], mask bool [B, T], True = valid,
        and codes int64 [B, N, L]."""

    def forward_bytes(self, users: int, candidates: int, tokens: int) -> int:
        """At most so many bytes does ``request_logits`` hold at a time."""


class CandidateScorer:
    """Callable (states, mask, codes, counts) -> scores, as ``rescore`` of sidmlp_kernels wants it.

    states [B, T, D] of any floating dtype and mask bool [B, T], codes int [B, N, L] with -1 past
    counts, counts int [B] -> float32 (float64 of a float64 model) [B, N], -inf past counts.
    Masked states may hold NaN.

    normalisation  "model": code_logits are log-probabilities (``Teacher``: over its whole
                   vocabulary, the scores of its beam search)
                   "codebook": softmax over a level's codes
                   "children": as a student scores: from level 2 on over the codes that continue an
                   item of ``table``; a candidate that it lacks gets -inf
    table          of the catalogue, for "children"
    memory         bytes that a forward may take, estimated by ``forward_bytes``: users, and for a
                   single user candidates, are taken in chunks that fit. One candidate of one user
                   is taken even if it does not

    A RequestModel reads token ids instead of states: see ``of_requests``. Which chunk a candidate
    falls into changes its score by rounding alone. Any number of threads may call one scorer.
    Raises ValueError for wrong settings, and for what a model answers in another shape.
    """

    def __init__(
        self,
        model: CandidateModel | RequestModel,
        *,
        normalisation: str = "model",
        table: PrefixTable | None = None,
        memory: int = 1 << 29,
    ) -> None:
        if not isinstance(model, CandidateModel | RequestModel):
            raise ValueError(
                f"model: expected codes_per_level, encode, code_logits and forward_bytes, or "
                f"request_logits instead of encode and code_logits, got {type(model).__name__} "
                f"without some of them; see CandidateModel and RequestModel"
            )
        if normalisation not in NORMALISATIONS:
            raise ValueError(
                f"normalisation: expected one of {', '.join(NORMALISATIONS)}, got "
                f"{normalisation!r}; choose one of these"
            )
        if (table is not None) != (normalisation == "children"):
            raise ValueError(
                f"table: expected a PrefixTable for normalisation='children' and None otherwise, "
                f"got {type(table).__name__} for {normalisation!r}; pass "
                f"PrefixTable(codes, codes_per_level) or drop it"
            )
        if not isinstance(memory, int) or memory < 1:
            raise ValueError(f"memory: expected bytes >= 1, got {memory!r}; 2**29 is usual")
        self.model, self.normalisation, self.memory = model, normalisation, memory
        sizes = tuple(model.codes_per_level)
        found = sizes if table is None else tuple(rows.shape[1] for rows in table.children)
        if found != sizes:
            raise ValueError(
                f"table: expected {sizes} codes per level, the model's, got {found}; make it of "
                f"the codes that the model was trained on"
            )
        self._sizes = sizes
        self._children: list[Tensor] = [] if table is None else table.children

    @torch.no_grad()
    def __call__(self, states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        """Scores [B, N]; see the class."""
        model = self.model
        if not isinstance(model, CandidateModel):
            raise ValueError(
                f"model: expected one that goes on from states, got {type(model).__name__}, which "
                f"reads token ids; pass rescore=scorer.of_requests(batch.ids, batch.mask)"
            )
        states = torch.where(mask[..., None], states, torch.zeros_like(states))

        def logits_of(own: slice, wanted: Tensor) -> list[Tensor]:
            return model.code_logits(states[own], mask[own], wanted)

        return self._scores(logits_of, mask.shape[1], codes, counts)

    def of_requests(self, ids: Tensor, mask: Tensor) -> Score:
        """For a model that reads token ids, and for a student whose encoder is not this model's, as
        SID-MLP++'s: a callable that does not look at the student's states.

        ids int64 [B, T], mask bool [B, T] are the requests', e.g. ``Batch.ids`` and ``Batch.mask``.
        """
        model = self.model

        @torch.no_grad()
        def score(_: Tensor, __: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
            if isinstance(model, CandidateModel):
                return self(model.encode(ids, mask), mask, codes, counts)

            def logits_of(own: slice, wanted: Tensor) -> list[Tensor]:
                return model.request_logits(ids[own], mask[own], wanted)

            return self._scores(logits_of, mask.shape[1], codes, counts)

        return score

    def _scores(
        self,
        logits_of: Callable[[slice, Tensor], list[Tensor]],
        tokens: int,
        codes: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Scores [B, N], chunk by chunk; logits_of answers for some users and their codes."""
        users, candidates, levels = codes.shape
        if levels != len(self._sizes):
            raise ValueError(
                f"codes: expected {len(self._sizes)} levels, the model's, got {levels}; score with "
                f"the teacher of this student"
            )
        if codes.numel() == 0:
            return torch.zeros(users, candidates, device=codes.device)
        if self._children and self._children[0].device != codes.device:
            self._children = [rows.to(codes.device) for rows in self._children]
        wanted = codes.long().clamp(min=0)
        user_step, step = self._chunk(users, candidates, tokens)
        rows = []
        for first in range(0, users, user_step):
            own = slice(first, first + user_step)
            parts = []
            for begin in range(0, candidates, step):
                asked = wanted[own, begin : begin + step]
                parts.append(self._score(logits_of(own, asked), asked))
            rows.append(torch.cat(parts, dim=1))
        past = torch.arange(candidates, device=codes.device) >= counts[:, None]
        return torch.cat(rows).masked_fill(past, -torch.inf)

    def _chunk(self, users: int, candidates: int, tokens: int) -> tuple[int, int]:
        """How many users, and how many candidates of each, one forward takes."""

        def fits(n: int, c: int) -> bool:
            # What _score adds per code: the normalised logits, children and a mask.
            mine = 24 * n * c * sum(self._sizes)
            return self.model.forward_bytes(n, c, tokens) + mine <= self.memory

        if fits(1, candidates):
            return _largest(users, lambda n: fits(n, candidates)), candidates
        return 1, _largest(candidates, lambda c: fits(1, c))

    def _score(self, logits: list[Tensor], codes: Tensor) -> Tensor:
        """Scores [b, n] of one chunk, codes int64 [b, n, L] >= 0."""
        self._check(logits, codes)
        node = torch.zeros_like(codes[..., 0])
        total: Tensor | float = 0.0
        for level, values in enumerate(logits):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            chosen = codes[..., level, None]
            if self._children:
                children = self._children[level][node]  # [b, n, C_l]
                if level:
                    values = values.masked_fill(children < 0, -torch.inf)
                node = children.gather(2, chosen)[..., 0]
                missing, node = node < 0, node.clamp(min=0)
            if self.normalisation != "model":
                values = values.log_softmax(-1)
            found = values.gather(2, chosen)[..., 0]
            if self._children:
                found = found.masked_fill(missing, -torch.inf)
            total = total + found
        assert isinstance(total, Tensor)
        return total

    def _check(self, logits: list[Tensor], codes: Tensor) -> None:
        if len(logits) != len(self._sizes):
            raise ValueError(
                f"logits: expected {len(self._sizes)} tensors, one per level, got "
                f"{len(logits)}; return the logits of every level's own codes"
            )
        for level, (values, size) in enumerate(zip(logits, self._sizes, strict=True)):
            shape = (*codes.shape[:2], size)
            if tuple(values.shape) != shape or not values.is_floating_point():
                raise ValueError(
                    f"logits: expected floating {list(shape)} for level {level + 1}, got "
                    f"{values.dtype} {list(values.shape)}; return users, candidates, codes"
                )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1..most that fits, 1 if none does; ``fits`` is monotone."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
