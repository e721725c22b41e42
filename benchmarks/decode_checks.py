"""Verification for bench_decode: what must hold before a decode is timed.

A near-tie lost at an early level changes the final set, so a decode is not compared with one other
result but judged by the MUST and MAY sets of the float64 reference (sidmlp.bounds): every MUST item
is there, none outside MAY is, and every score is within eps of the exact one. eps comes from
ordinary PyTorch: twice its error in the dtype of the weights on these very requests, plus the
rounding floors, level by level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sidmlp.beam import (
    Decoded,
    LevelOptions,
    decode_states,
    expand,
    root,
    select,
)
from sidmlp.bounds import RequestBounds, check_decode, decode_bounds
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels.spec import StudentSpec
from sidmlp_kernels.testing import rounding_floor

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # items, scores, codes, counts


class VerificationError(RuntimeError):
    """A result is wrong, so its time means nothing."""


@dataclass(frozen=True)
class Reference:
    """The reference implementation on one catalogue."""

    student: Student  # float32
    trie: Trie

    @classmethod
    def build(cls, spec: StudentSpec, weights: Mapping[str, Tensor], trie: Trie) -> Reference:
        """The reference student of these weights."""
        student = Student(StudentConfig(**spec.to_dict())).eval().requires_grad_(False)
        student.load_state_dict(dict(weights))
        return cls(student, trie)

    def student_in(self, dtype: torch.dtype) -> Student:
        """A copy of the student in another dtype."""
        student = Student(self.student.config).eval().requires_grad_(False)
        student.load_state_dict(self.student.state_dict())
        return student.to(dtype)


@dataclass(frozen=True)
class Walk:
    """What one pass of the float64 beams over some requests tells.

    eps               dtype -> bound of a prefix's score after each level
    heads_per_level   mean number of a request's beams that need a head: they have several children
    logits_per_level  mean number of children of these beams together
    """

    eps: dict[torch.dtype, tuple[float, ...]]
    heads_per_level: tuple[float, ...]
    logits_per_level: tuple[float, ...]


def walk_beams(
    reference: Reference,
    states: Tensor,
    mask: Tensor,
    num_beams: int,
    dtypes: Sequence[torch.dtype],
) -> Walk:
    """Follows the exact beams, and scores all their children in each dtype as well.

    eps after a level: twice the largest error of a child's score, plus the floor of such a score in
    the dtype.
    """
    trie = reference.trie
    options = LevelOptions.make(trie.num_levels, None, None, "children")
    students = {dtype: reference.student_in(dtype) for dtype in (torch.float64, *dtypes)}
    contexts = {dtype: s.context(states.to(dtype), mask) for dtype, s in students.items()}
    exact_beams = root(contexts[torch.float64], torch.ones(len(states), dtype=torch.bool))
    scores = dict.fromkeys(students, exact_beams.scores)  # of these beams, in each dtype
    eps: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    heads, logits = [], []
    for level in range(trie.num_levels):
        children = {
            dtype: expand(
                student,
                trie,
                level,
                contexts[dtype],
                replace(exact_beams, scores=scores[dtype]),
                options,
            )
            for dtype, student in students.items()
        }
        exact = children[torch.float64]
        fan_out = exact.exists.sum(dim=-1)  # [B, W]
        branching = fan_out > (1 if level > 0 else 0)
        heads.append(float(branching.sum(dim=1).double().mean()))
        logits.append(float((fan_out * branching).sum(dim=1).double().mean()))
        wanted = exact.scores[exact.exists]
        for dtype in dtypes:
            error = float((children[dtype].scores[exact.exists] - wanted).abs().max())
            eps[dtype].append(2 * error + rounding_floor(wanted, dtype))

        num_children = exact.scores[0].numel()
        width = min(num_beams, num_children, trie.num_nodes(level))
        # Selecting positions instead of nodes tells where the survivors stood.
        positions = torch.arange(num_children).view(exact.nodes.shape[1:]).expand_as(exact.nodes)
        survivors = select(replace(exact, nodes=positions), exact_beams, width, exact_ties=True)
        exact_beams = select(exact, exact_beams, width, exact_ties=True)
        scores = {
            dtype: found.scores.flatten(1).gather(1, survivors.nodes)
            for dtype, found in children.items()
        }
    return Walk({t: tuple(e) for t, e in eps.items()}, tuple(heads), tuple(logits))


class Judge:
    """Judges every result for one batch.

    The first `requests` requests are always held against their MUST and MAY sets. The others pass
    when each of their ranked scores is within 2 eps of the float32 reference's (ranks, since items
    may change places where scores nearly tie), and are held against their sets otherwise.
    """

    def __init__(
        self,
        reference: Reference,
        states: Tensor,
        mask: Tensor,
        *,
        k: int,
        num_beams: int,
        dtypes: Sequence[torch.dtype],
        requests: int,
    ) -> None:
        self.trie = reference.trie
        self._exact = reference.student_in(torch.float64)
        self._states, self._mask = states, mask
        self._k, self._num_beams = k, num_beams
        self._always = min(requests, len(states))
        self._scores = decode_states(
            reference.student, states, mask, reference.trie, k, num_beams
        ).scores.double()
        rows = slice(self._always)
        self.walk = walk_beams(reference, states[rows], mask[rows], num_beams, dtypes)
        self._known: dict[tuple[torch.dtype, int], RequestBounds] = {}

    def check(self, name: str, results: Results, dtype: torch.dtype) -> dict[str, Any]:
        """What to report of a right result; VerificationError with the faults of a wrong one.

        dtype: of the weights that computed it.
        """
        eps = self.walk.eps[dtype]
        difference = (results[1].double() - self._scores).abs()
        difference[results[1] == self._scores] = 0  # -inf beyond counts
        far = ~(difference <= 2 * eps[-1]).all(dim=1)
        far[: self._always] = True
        rows = far.nonzero()[:, 0].tolist()
        bounds = self._bounds(rows, dtype)
        judged = Decoded(*(tensor[rows] for tensor in results))
        faults = check_decode(judged, bounds, self.trie)
        if faults:
            shown = "\n  ".join(faults[:10])
            raise VerificationError(
                f"{name}: expected the items and scores that the float64 reference allows, got "
                f"{len(faults)} faults in {len(rows)} judged requests; not timing it:\n  {shown}"
            )
        errors = [
            abs(score - bound.scores[item])
            for bound, items, scores in zip(
                bounds, judged.items.tolist(), judged.scores.tolist(), strict=True
            )
            for item, score in zip(items, scores, strict=True)
            if item in bound.scores
        ]
        return {
            "requests": len(results[1]),
            "requests_against_sets": len(rows),
            "max_score_error": max(errors, default=0.0),
            "eps": eps[-1],
        }

    def _bounds(self, rows: list[int], dtype: torch.dtype) -> list[RequestBounds]:
        missing = [row for row in rows if (dtype, row) not in self._known]
        if missing:
            context = self._exact.context(self._states[missing].double(), self._mask[missing])
            found = decode_bounds(
                self._exact,
                context,
                self.trie,
                self._num_beams,
                self.walk.eps[dtype],
                k=self._k,
            )
            self._known.update({(dtype, r): b for r, b in zip(missing, found, strict=True)})
        return [self._known[dtype, row] for row in rows]
