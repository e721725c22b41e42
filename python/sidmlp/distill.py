"""Distillation: the student learns the frozen teacher's next-code distributions.

loss = sum over l of
    alpha tau^2 KL(softmax(t_l / tau) || softmax(s_l / tau)) + (1 - alpha) CE(s_l, c_l)

with teacher logits t_l and student logits s_l of level l's own codes, both under teacher forcing.
The student reads the teacher's encoder states and, frozen, the teacher's code embeddings
(SID-MLP, arXiv 2605.12617).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sidmlp.beam import Decoded, decode_states
from sidmlp.data import Split
from sidmlp.metrics import ndcg_at_k
from sidmlp.progress import bar
from sidmlp.student import Student, StudentConfig
from sidmlp.teacher import Teacher
from sidmlp.teacher.train import batches, histories
from sidmlp.training import Log, LoopOptions, TrainingResult, train
from sidmlp.training.features import Features, compute_features
from sidmlp.trie import Trie

# (student, states, mask, trie, k, num_beams, exclude) -> results; the reference by default.
Decode = Callable[[Student, Tensor, Tensor, Trie, int, int, list[np.ndarray]], Decoded]


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
    teacher: Teacher,
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

    attention_dim defaults to the teacher's width and ffn_dim to four times that.
    """
    dim = teacher.config.dim
    config = StudentConfig(
        codes_per_level=teacher.tokens.codes_per_level,
        dim=dim,
        attention_dim=attention_dim or dim,
        num_heads=num_heads,
        ffn_dim=ffn_dim or 4 * dim,
        hidden_dim=hidden_dim,
        blocks_per_head=blocks_per_head,
        embedding_dim=dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(config, dropout=dropout)
    with torch.no_grad():
        # The last level's embedding is never read, so the student does not have it.
        for own, rows in zip(student.embeddings, teacher.code_embeddings()[:-1], strict=True):
            own.weight.copy_(rows)  # type: ignore[operator]  # mypy sees any submodule
    student.embeddings.requires_grad_(False)
    return student


def distillation_loss(
    student: list[Tensor], teacher: list[Tensor], codes: Tensor, options: DistillOptions
) -> Tensor:
    """The module's formula, averaged over the batch.

    student, teacher: per level logits [B, C_l]; codes: int64 [B, L], the true codes.
    """
    alpha, tau = options.alpha, options.tau
    total = codes.new_zeros((), dtype=student[0].dtype)
    for level, (own, wanted) in enumerate(zip(student, teacher, strict=True)):
        divergence = functional.kl_div(
            (own / tau).log_softmax(-1),
            (wanted / tau).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        truth = functional.cross_entropy(own, codes[:, level])
        total = total + alpha * tau**2 * divergence + (1 - alpha) * truth
    return total


def distill(
    student: Student,
    teacher: Teacher,
    split: Split,
    item_codes: np.ndarray,
    options: DistillOptions,
    loop: LoopOptions,
    *,
    max_examples: int | None = None,
    validation_users: int = 1000,
    validation_beams: int = 20,
    decode: Decode = decode_states,
    feature_directory: Path | None = None,
    feature_dtype: str = "float16",
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains the student in place; the weights of the best validation NDCG@10 stay.

    item_codes: int64 [num_items, L]. max_examples: a random sample of the training examples, all
    by default. feature_directory: where the teacher's outputs are kept between runs; in memory
    otherwise. decode: what validation recommends with, ``sidmlp.beam.decode_states`` by default.
    """
    teacher.requires_grad_(False)
    generator = np.random.default_rng(loop.seed)
    examples = split.train
    if max_examples is not None and max_examples < len(examples):
        examples = examples.take(np.sort(generator.permutation(len(examples))[:max_examples]))
    chosen = np.sort(generator.permutation(len(split.validation))[:validation_users])
    held_out = split.validation.take(chosen)
    features = compute_features(
        teacher,
        examples,
        item_codes,
        directory=feature_directory,
        fingerprint=f"{fingerprint} seed={loop.seed}",
        dtype=feature_dtype,
        progress=progress,
    )
    sizes = teacher.tokens.codes_per_level
    trie = Trie.from_codes(item_codes, codes_per_level=sizes)

    def loss_of(index: np.ndarray) -> Tensor:
        states, mask = features.batch_states(index)
        codes = torch.from_numpy(features.codes[index])
        wanted = features.batch_logits(index).split(list(sizes), dim=1)
        return distillation_loss(student(states, mask, codes), list(wanted), codes, options)

    held_out_features = compute_features(teacher, held_out, item_codes, progress=False)

    def validate() -> float:
        found = recommend(
            student, held_out_features, trie, histories(held_out), 10, validation_beams, decode
        )
        return ndcg_at_k(found, torch.from_numpy(held_out.target_items()), 10).mean

    return train(
        student,
        len(features),
        loss_of,
        validate,
        loop,
        name="student",
        state_file=state_file,
        fingerprint=f"{fingerprint} {options} {student.config}",
        progress=progress,
        log=log,
    )


def recommend(
    student: Student,
    features: Features,
    trie: Trie,
    exclude: list[np.ndarray],
    k: int,
    num_beams: int,
    decode: Decode = decode_states,
    batch_size: int = 128,
    progress: bool = False,
) -> Tensor:
    """The k best items of every example, int64 [n, k], -1 where there are fewer."""
    student.eval()
    found = []
    work = list(batches(len(features), batch_size))
    for index in bar(work, "student", progress):
        states, mask = features.batch_states(index)
        hidden = [exclude[i] for i in index]
        found.append(decode(student, states, mask, trie, k, num_beams, hidden).items)
    return torch.cat(found)
