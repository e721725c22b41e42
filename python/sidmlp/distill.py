"""Distillation: the student learns the frozen teacher's next-code distributions.

loss = sum over l of
    alpha tau^2 KL(softmax(t_l / tau) || softmax(s_l / tau)) + (1 - alpha) CE(s_l, c_l)

with teacher logits t_l and student logits s_l of level l's own codes, both under teacher forcing.
The student reads the teacher's encoder states and, frozen, the teacher's code embeddings
(SID-MLP, arXiv 2605.12617).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidmlp.beam import decode_states
from sidmlp.data import Split, TokenTable
from sidmlp.lessons import Lessons, take_lessons
from sidmlp.metrics import ndcg_at_k
from sidmlp.mlp_encoder import MLPEncoder
from sidmlp.progress import bar
from sidmlp.states_by_role import states_by_role
from sidmlp.student import Student, StudentConfig
from sidmlp.teacher import Distillable
from sidmlp.teacher.distillable import check_distillable
from sidmlp.teacher.train import batches, histories
from sidmlp.training import Execution, Log, LoopOptions, TrainingResult, compiled, train
from sidmlp.training.features import Features, FeatureTable
from sidmlp.trie import Trie

# (states [B, T, D], mask [B, T], k, num_beams, exclude) -> dense item indices int64 [B, k], -1 past
# the last; the exclusions are dense indices, one array per request.
Decode = Callable[[Tensor, Tensor, int, int, list[np.ndarray]], Tensor]
# The decode of a student as it is at that moment; called once per validation.
MakeDecode = Callable[[Student], Decode]


@dataclass(frozen=True)
class DistillOptions:
    """alpha: share of the teacher's distributions in the loss, the rest is the true codes';
    tau: temperature that softens both distributions."""

    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau must be positive, got {self.tau}")


def make_student(
    teacher: Distillable,
    *,
    attention_dim: int | None = None,
    num_heads: int = 4,
    ffn_dim: int | None = None,
    hidden_dim: int = 512,
    blocks_per_head: int = 1,
    dropout: float = 0.2,
    seed: int = 0,
) -> Student:
    """An untrained student for a teacher: its width, its codes, its code embeddings (frozen).

    attention_dim defaults to the teacher's width and ffn_dim to four times that. Raises ValueError
    for a teacher that is not ``sidmlp.teacher.Distillable``, and for sizes out of range.
    """
    check_distillable(teacher)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    dim, tables = teacher.dim, teacher.code_embeddings()
    config = StudentConfig(
        codes_per_level=teacher.tokens.codes_per_level,
        dim=dim,
        attention_dim=attention_dim or dim,
        num_heads=num_heads,
        ffn_dim=ffn_dim or 4 * dim,
        hidden_dim=hidden_dim,
        blocks_per_head=blocks_per_head,
        embedding_dim=tables[0].shape[1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(config, dropout=dropout)
    with torch.no_grad():
        # The last level's embedding is never read, so the student does not have it.
        for own, rows in zip(student.embeddings, tables[:-1], strict=True):
            own.weight.copy_(rows)  # type: ignore[operator]  # mypy sees any submodule
    student.embeddings.requires_grad_(False)
    return student


def distillation_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    codes: Tensor,
    options: DistillOptions,
    real: Tensor | None = None,
) -> Tensor:
    """The module's formula, averaged over the batch, or over its rows where ``real`` is True.

    student, teacher: per level logits [B, C_l], of which half precision becomes fp32 first; codes:
    int64 [B, L], the true codes; real: bool [B].
    """
    alpha, tau = options.alpha, options.tau
    total: Tensor | None = None
    for level, (own, wanted) in enumerate(zip(student, teacher, strict=True)):
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        divergence = functional.kl_div(
            (own / tau).log_softmax(-1),
            (wanted / tau).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        truth = functional.cross_entropy(own, codes[:, level], reduction="none")
        part = alpha * tau**2 * divergence + (1 - alpha) * truth
        total = part if total is None else total + part
    assert total is not None
    return total.mean() if real is None else (total * real).sum() / real.sum()


def distill(
    student: Student,
    teacher: Distillable,
    split: Split,
    item_codes: np.ndarray,
    options: DistillOptions,
    loop: LoopOptions,
    *,
    max_examples: int | None = None,
    validation_users: int | None = 1000,
    validation_beams: int = 20,
    decode: MakeDecode | None = None,
    execution: Execution | None = None,
    feature_directory: Path | None = None,
    feature_dtype: str = "float16",
    feature_precision: str = "fp32",
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """``train_student`` on the teacher's own states, with what ``take_lessons`` brings.

    item_codes: int64 [num_items, L]. feature_directory, feature_dtype, feature_precision: its
    directory, dtype and precision.
    """
    lessons = take_lessons(
        teacher,
        split,
        item_codes,
        seed=loop.seed,
        max_examples=max_examples,
        validation_users=validation_users,
        execution=execution,
        directory=feature_directory,
        dtype=feature_dtype,
        precision=feature_precision,
        fingerprint=fingerprint,
        progress=progress,
    )
    return train_student(
        student,
        lessons,
        options,
        loop,
        validation_beams=validation_beams,
        decode=decode,
        execution=execution,
        state_file=state_file,
        fingerprint=fingerprint,
        progress=progress,
        log=log,
    )


def train_student(
    student: Student,
    lessons: Lessons,
    options: DistillOptions,
    loop: LoopOptions,
    *,
    together_with: MLPEncoder | None = None,
    validation_beams: int = 20,
    decode: MakeDecode | None = None,
    execution: Execution | None = None,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains the student in place; the weights of the best validation NDCG@10 stay.

    The student reads the states of ``lessons``: the teacher's, or with ``lessons.read_by`` those of
    a frozen encoder. together_with: an encoder whose states it reads instead, and which is trained
    by the same loss. decode: what validation recommends with, the reference by default. execution:
    fp32 on the CPU by default; student and encoder are moved to its device and stay there.
    Raises ValueError where the student reads states of another width, and TrainingFailed.
    """
    execution = execution or Execution()
    device, encoder = execution.device, together_with
    width = lessons.dim if encoder is None else encoder.config.dim
    if student.config.dim != width:
        raise ValueError(
            f"student: expected width {width}, that of the states, got {student.config.dim}; make "
            "it with make_student, for the teacher of these states"
        )
    model = nn.ModuleDict({"student": student})
    features = lessons.features
    if encoder is not None:
        model["encoder"] = encoder.requires_grad_(True)
        features = features.without_states()
    model.to(device)
    sizes = list(lessons.tokens.codes_per_level)
    resident = execution.on_gpu and FeatureTable.fits(features, device)
    table = FeatureTable(features, device) if resident else None
    tokens = TokenTable(lessons.tokens, lessons.train, lessons.item_codes, device)

    def loss_of_batch(
        states: Tensor, mask: Tensor, logits: Tensor, codes: Tensor, real: Tensor
    ) -> Tensor:
        if encoder is not None:
            states = states_by_role(encoder, states, mask)
        wanted = list(logits.split(sizes, dim=1))
        return distillation_loss(student(states, mask, codes), wanted, codes, options, real)

    batch_loss: Callable[..., Tensor] = (
        compiled(loss_of_batch) if execution.compile else loss_of_batch
    )

    def loss_of(longest: int, index: Tensor, *batch: Tensor) -> Tensor:
        if encoder is not None:
            ids, mask = tokens.batch(index.clamp(min=0), longest)
            targets = batch if table is None else table.batch_targets(index)
            batch = (ids, mask & (index >= 0)[:, None], *targets)
        elif table is not None:
            batch = table.batch(index, longest)
        return batch_loss(*batch, index >= 0)

    def inputs_of(index: np.ndarray, longest: int) -> tuple[Tensor, ...]:
        found = features.batch_targets(index) if encoder else features.batch(index, longest)
        return tuple(part.to(device) for part in (torch.from_numpy(index), *found))

    make_decode = decode or reference_decode(lessons.item_codes)
    held_out = lessons.validation
    hidden, targets = histories(held_out), torch.from_numpy(held_out.target_items())

    def validate() -> float:
        states = lessons.validation_features
        if encoder is not None:
            in_full = replace(execution, precision="fp32")
            states = lessons.validation_read_by(encoder, execution=in_full)
        found = recommend(make_decode(student), states, hidden, 10, validation_beams, device)
        return ndcg_at_k(found, targets, 10).mean

    return train(
        model if encoder else student,
        len(features),
        loss_of,
        validate,
        loop,
        name="student",
        execution=execution,
        lengths=tokens.lengths if encoder else features.lengths,
        inputs_of=inputs_of if table is None else None,
        state_file=state_file,
        # A score is comparable with those of the same users and beams alone.
        fingerprint=f"{fingerprint} {options} {student.config} "
        f"users={len(held_out)} beams={validation_beams}",
        progress=progress,
        log=log,
    )


def reference_decode(item_codes: np.ndarray) -> MakeDecode:
    """Validation by the reference, ``sidmlp.beam``; item_codes: int64 [num_items, L]."""

    def make(student: Student) -> Decode:
        trie = Trie.from_codes(item_codes, codes_per_level=student.config.codes_per_level)
        trie = trie.to(next(student.parameters()).device)

        def decode(
            states: Tensor, mask: Tensor, k: int, num_beams: int, exclude: list[np.ndarray]
        ) -> Tensor:
            return decode_states(student, states, mask, trie, k, num_beams, exclude).items

        return decode

    return make


def recommend(
    decode: Decode,
    features: Features,
    exclude: list[np.ndarray],
    k: int,
    num_beams: int,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The k best items of every example, int64 [n, k] on the CPU, -1 where there are fewer.

    device: where ``decode`` takes its states. batch_size: by default 128, on a GPU 1024.
    """
    found = []
    size = batch_size or (128 if torch.device(device).type == "cpu" else 1024)
    work = list(batches(len(features), size))
    for index in bar(work, "student", progress):
        states, mask = (part.to(device) for part in features.batch_states(index))
        hidden = [exclude[i] for i in index]
        found.append(decode(states, mask, k, num_beams, hidden).cpu())
    return torch.cat(found)
