"""Training the teacher: next-item cross-entropy, validated by NDCG@10 of its constrained search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sidmlp.data import Examples, Split
from sidmlp.metrics import ndcg_at_k
from sidmlp.progress import bar
from sidmlp.training import Log, LoopOptions, TrainingResult, train

from .model import Teacher
from .search import PrefixTable, SearchResult, beam_search


def train_teacher(
    teacher: Teacher,
    split: Split,
    codes: np.ndarray,
    options: LoopOptions,
    *,
    targets_per_history: int = 1,
    validation_users: int = 1000,
    validation_beams: int = 20,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains in place on all training examples; the best validation's weights stay.

    codes: int64 [num_items, L]. targets_per_history: an encoded history predicts its next item
    (1, TIGER's way) or that many following training items, which costs little more and teaches
    more where the order within a session means little. validation_users: at most that many, the
    same ones each time.
    """
    table = PrefixTable(codes, teacher.tokens.codes_per_level)
    chosen = np.random.default_rng(options.seed).permutation(len(split.validation))
    held_out = split.validation.take(np.sort(chosen[:validation_users]))
    exclude = histories(held_out)
    targets = torch.from_numpy(codes)

    def loss_of(index: np.ndarray) -> torch.Tensor:
        batch = split.train.take(index)
        ids, mask = teacher.tokens.batch_examples(batch, codes)
        positions = batch.targets[:, None] + np.arange(targets_per_history)
        real = positions < split.train_end[batch.users, None]
        wanted = batch.items[np.where(real, positions, batch.targets[:, None])]
        return teacher(ids, mask, targets[wanted], torch.from_numpy(real))

    def validate() -> float:
        found = recommend(
            teacher, held_out, codes, table, k=10, num_beams=validation_beams, exclude=exclude
        )
        return ndcg_at_k(found.items, torch.from_numpy(held_out.target_items()), 10).mean

    return train(
        teacher,
        len(split.train),
        loss_of,
        validate,
        options,
        name="teacher",
        state_file=state_file,
        fingerprint=f"{fingerprint} {teacher.config} targets={targets_per_history}",
        progress=progress,
        log=log,
    )


def recommend(
    teacher: Teacher,
    examples: Examples,
    codes: np.ndarray,
    table: PrefixTable,
    *,
    k: int,
    num_beams: int,
    constrained: bool = True,
    exclude: list[np.ndarray] | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> SearchResult:
    """``beam_search`` for every example, in batches."""
    parts = []
    work = list(batches(len(examples), batch_size))
    for index in bar(work, "teacher", progress):
        ids, mask = teacher.tokens.batch_examples(examples.take(index), codes)
        parts.append(
            beam_search(
                teacher,
                ids,
                mask,
                table,
                k=k,
                num_beams=num_beams,
                constrained=constrained,
                exclude=None if exclude is None else [exclude[i] for i in index],
            )
        )
    return SearchResult(
        items=torch.cat([part.items for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        invalid=torch.cat([part.invalid for part in parts]),
    )


def histories(examples: Examples) -> list[np.ndarray]:
    """Every example's whole history, dense item indices, oldest first."""
    return [examples.history(e) for e in range(len(examples))]


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    """0..count-1 in runs of ``size``, int64 arrays."""
    for begin in range(0, count, size):
        yield np.arange(begin, min(begin + size, count))
