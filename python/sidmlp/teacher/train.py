"""Training the teacher: next-item cross-entropy, validated by NDCG@10 of its constrained search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import Examples, Split, TokenTable
from sidmlp.metrics import ndcg_at_k
from sidmlp.progress import bar
from sidmlp.training import Execution, Log, LoopOptions, TrainingResult, train

from .generative import GenerativeTeacher
from .search import PrefixTable, SearchResult, beam_search


def train_teacher(
    teacher: GenerativeTeacher,
    split: Split,
    codes: np.ndarray,
    options: LoopOptions,
    *,
    targets_per_history: int = 1,
    history_dropout: float = 0.0,
    validation_users: int | None = 1000,
    validation_beams: int = 20,
    execution: Execution | None = None,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains in place on all training examples; the best validation's weights stay.

    codes: int64 [num_items, L]. targets_per_history: an encoded history predicts its next item
    (1, TIGER's way) or that many following training items, which costs little more and teaches
    more where the order within a session means little. history_dropout: share of a history's items
    left out whenever it is trained on, at random, never the latest. validation_users: at most that
    many, the same ones each time; None takes all. execution: the teacher is moved to its device and
    stays there; fp32 on the CPU by default. Raises ValueError for a share out of range, and
    TrainingFailed.
    """
    if not 0 <= history_dropout < 1:
        raise ValueError(f"history_dropout must be in [0, 1), got {history_dropout}")
    execution = execution or Execution()
    teacher.to(execution.device)
    if execution.compile:
        teacher.compile_training()
    table = PrefixTable(codes, teacher.tokens.codes_per_level).to(execution.device)
    chosen = np.random.default_rng(options.seed).permutation(len(split.validation))
    held_out = split.validation.take(np.sort(chosen[:validation_users]))
    exclude = histories(held_out)
    data = TokenTable(teacher.tokens, split.train, codes, execution.device)
    ends = torch.from_numpy(split.train_end[split.train.users]).to(execution.device)
    following = torch.arange(targets_per_history, device=execution.device)

    def loss_of(longest: int, index: Tensor) -> Tensor:
        here = index.clamp(min=0)
        # Tensor cores want rows of 16 bytes.
        multiple = 8 if execution.static else 1
        ids, mask = data.batch(here, longest, multiple, history_dropout)
        positions = data.targets[here][:, None] + following
        real = (positions < ends[here][:, None]) & (index >= 0)[:, None]
        wanted = data.items[torch.where(real, positions, data.targets[here][:, None])]
        return teacher(ids, mask, data.codes[wanted], real)

    def validate() -> float:
        found = recommend(
            teacher,
            held_out,
            codes,
            table,
            k=10,
            num_beams=validation_beams,
            exclude=exclude,
            execution=execution,
        )
        return ndcg_at_k(found.items, torch.from_numpy(held_out.target_items()), 10).mean

    return train(
        teacher,
        len(split.train),
        loss_of,
        validate,
        options,
        name="teacher",
        execution=execution,
        lengths=data.lengths,
        state_file=state_file,
        # Scores of other users or beams could not be compared with those before.
        fingerprint=f"{fingerprint} {teacher.config} targets={targets_per_history} "
        f"users={validation_users} beams={validation_beams}"
        + (f" history_dropout={history_dropout}" if history_dropout else ""),
        progress=progress,
        log=log,
    )


def recommend(
    teacher: GenerativeTeacher,
    examples: Examples,
    codes: np.ndarray,
    table: PrefixTable,
    *,
    k: int,
    num_beams: int,
    constrained: bool = True,
    exclude: list[np.ndarray] | None = None,
    execution: Execution | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> SearchResult:
    """``beam_search`` for every example, in batches, of the teacher on execution's device.

    batch_size: by default 128, on a GPU 512.
    """
    execution = execution or Execution()
    data = TokenTable(teacher.tokens, examples, codes, execution.device)
    table = table.to(execution.device)
    parts = []
    work = list(batches(len(examples), batch_size or (512 if execution.on_gpu else 128)))
    for index in bar(work, "teacher", progress):
        longest = int(data.lengths[index].max())
        ids, mask = data.batch(torch.from_numpy(index).to(execution.device), longest)
        with execution.autocast():
            found = beam_search(
                teacher,
                ids,
                mask,
                table,
                k=k,
                num_beams=num_beams,
                constrained=constrained,
                exclude=None if exclude is None else [exclude[i] for i in index],
            )
        parts.append(found)
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
