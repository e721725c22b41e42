"""How good recommendations are: every method asked the same questions, all scored the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import Examples, Interactions, Split, TokenSpec, training_counts
from sidmlp.distill import recommend as recommend_by_student
from sidmlp.distill import reference_decode
from sidmlp.metrics import ndcg_at_k, recall_at_k
from sidmlp.mlp_encoder import MLPEncoder
from sidmlp.progress import bar
from sidmlp.student import Student
from sidmlp.teacher import Distillable, GenerativeTeacher, PrefixTable, SearchResult
from sidmlp.teacher.train import batches, histories
from sidmlp.teacher.train import recommend as recommend_by_teacher
from sidmlp.training import Execution
from sidmlp.training.features import Features, compute_features

# (histories, exclusions, k) -> items int64 [n, k], all in dense indices.
Recommend = Callable[[list[np.ndarray], list[np.ndarray], int], Tensor]


@dataclass(frozen=True)
class Quality:
    """Recall and NDCG at 5 and 10 of one method."""

    recall_5: float
    ndcg_5: float
    recall_10: float
    ndcg_10: float

    @classmethod
    def of(cls, items: Tensor, targets: Tensor) -> Quality:
        """Scores items int64 [n, >= 10] against the one right answer each, int64 [n]."""
        return cls(
            recall_at_k(items, targets, 5).mean,
            ndcg_at_k(items, targets, 5).mean,
            recall_at_k(items, targets, 10).mean,
            ndcg_at_k(items, targets, 10).mean,
        )


@dataclass(frozen=True)
class Questions:
    """What every method is asked: histories, what not to recommend, and the right answers.

    No method may recommend an item of the user's own history.
    """

    examples: Examples
    exclude: list[np.ndarray]
    targets: Tensor

    @classmethod
    def of(cls, examples: Examples) -> Questions:
        """Questions of test or validation examples."""
        return cls(examples, histories(examples), torch.from_numpy(examples.target_items()))

    def sample(self, count: int | None, seed: int) -> Questions:
        """At most ``count`` of them, chosen at random."""
        if count is None or count >= len(self.examples):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self.examples))[:count]
        return Questions.of(self.examples.take(np.sort(chosen)))


def by_popularity(data: Interactions, split: Split, questions: Questions, k: int = 10) -> Tensor:
    """The k items most frequent in training that a user has not had, int64 [n, k]."""
    counts = training_counts(data, split)
    ranking = np.argsort(-counts, kind="stable")
    found = torch.full((len(questions.exclude), k), -1, dtype=torch.int64)
    for row, seen in enumerate(questions.exclude):
        # The first k + |seen| of the ranking hold at least k unseen ones, if there are so many.
        head = ranking[: k + len(seen)]
        fresh = head[~np.isin(head, seen)][:k]
        found[row, : len(fresh)] = torch.from_numpy(fresh)
    return found


def by_teacher(
    teacher: GenerativeTeacher,
    codes: np.ndarray,
    questions: Questions,
    *,
    k: int = 10,
    num_beams: int = 50,
    constrained: bool = True,
    execution: Execution | None = None,
) -> SearchResult:
    """The teacher's beam search for every question; fp32 on the CPU by default."""
    execution = execution or Execution()
    teacher.to(execution.device)
    table = PrefixTable(codes, teacher.tokens.codes_per_level)
    return recommend_by_teacher(
        teacher,
        questions.examples,
        codes,
        table,
        k=k,
        num_beams=num_beams,
        constrained=constrained,
        exclude=questions.exclude,
        execution=execution,
        progress=True,
    )


def by_reference(
    student: Student,
    features: Features,
    codes: np.ndarray,
    questions: Questions,
    *,
    k: int = 10,
    num_beams: int = 50,
) -> Tensor:
    """The student's reference decode for every question, on its device, int64 [n, k]."""
    student.eval()
    decode = reference_decode(codes)(student)
    device = next(student.parameters()).device
    return recommend_by_student(
        decode, features, questions.exclude, k, num_beams, device, progress=True
    )


def encoder_features(
    teacher: Distillable,
    codes: np.ndarray,
    questions: Questions,
    execution: Execution | None = None,
) -> Features:
    """The teacher's states of every question, kept in full precision."""
    return compute_features(
        teacher, questions.examples, codes, dtype="float32", execution=execution
    )


@torch.no_grad()
def own_encoder_features(
    encoder: MLPEncoder,
    tokens: TokenSpec,
    codes: np.ndarray,
    questions: Questions,
    execution: Execution | None = None,
    batch_size: int = 128,
) -> Features:
    """As ``encoder_features`` of a SID-MLP++ student, which reads an encoder of its own; no logits.

    codes: int64 [num_items, L]; the encoder in evaluation mode; execution: it is moved to its
    device, fp32 on the CPU by default.
    """
    execution = execution or Execution()
    encoder.to(execution.device)
    states, lengths = [], [np.zeros(1, dtype=np.int64)]
    examples = questions.examples
    for index in bar(list(batches(len(examples), batch_size)), "encoder"):
        ids, mask = tokens.batch_examples(examples.take(index), codes)
        with execution.autocast():
            found = encoder(ids.to(execution.device), mask.to(execution.device))
        states.append(found.float().cpu()[mask].numpy())
        lengths.append(mask.sum(1).numpy())
    return Features(
        states=np.concatenate(states),
        token_offsets=np.cumsum(np.concatenate(lengths)),
        logits=np.empty((len(examples), 0), dtype=np.float32),
        codes=codes[examples.target_items()],
    )


def by_callable(
    recommend: Recommend, questions: Questions, *, k: int = 10, batch_size: int = 128
) -> Tensor:
    """Whatever ``recommend`` answers, in batches, int64 [n, k]."""
    found = []
    count = len(questions.examples)
    for index in bar(list(batches(count, batch_size)), "kernel"):
        seen = [questions.exclude[i] for i in index]
        found.append(recommend(seen, seen, k))
    return torch.cat(found)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first left-aligned and the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]])
