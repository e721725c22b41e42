"""What distillation learns from: examples, and what the frozen teacher says of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from sidmlp.data import Examples, Split, TokenSpec
from sidmlp.mlp_encoder import MLPEncoder
from sidmlp.teacher import Distillable
from sidmlp.training import Execution
from sidmlp.training.features import Features, compute_features, own_states


@dataclass(frozen=True)
class Lessons:
    """Training and validation examples with the teacher's states and logits of each.

    item_codes: int64 [num_items, L]; tokens: how histories become token ids.
    """

    train: Examples
    features: Features
    validation: Examples
    validation_features: Features
    item_codes: np.ndarray
    tokens: TokenSpec

    @property
    def dim(self) -> int:
        """Width of the states."""
        return int(self.features.states.shape[1])

    def read_by(
        self,
        encoder: MLPEncoder,
        *,
        directory: Path | None = None,
        fingerprint: str = "",
        dtype: str = "float16",
        execution: Execution | None = None,
        progress: bool = True,
    ) -> Lessons:
        """The same with the states of a frozen encoder, which is moved to execution's device.

        directory, fingerprint, dtype: as in ``own_states``; in memory without a directory.
        """
        execution = execution or Execution()
        encoder.to(execution.device).eval()
        features = own_states(
            encoder,
            self.tokens,
            self.train,
            self.item_codes,
            self.features,
            directory=directory,
            fingerprint=fingerprint,
            dtype=dtype,
            execution=execution,
            progress=progress,
        )
        held_out = self.validation_read_by(encoder, dtype=dtype, execution=execution)
        return replace(self, features=features, validation_features=held_out)

    def validation_read_by(
        self, encoder: MLPEncoder, *, dtype: str = "float16", execution: Execution
    ) -> Features:
        """``validation_features`` with the encoder's states, in memory."""
        return own_states(
            encoder,
            self.tokens,
            self.validation,
            self.item_codes,
            self.validation_features,
            dtype=dtype,
            execution=execution,
            progress=False,
        )


def take_lessons(
    teacher: Distillable,
    split: Split,
    item_codes: np.ndarray,
    *,
    seed: int = 0,
    max_examples: int | None = None,
    validation_users: int | None = 1000,
    execution: Execution | None = None,
    directory: Path | None = None,
    dtype: str = "float16",
    precision: str = "fp32",
    fingerprint: str = "",
    progress: bool = True,
) -> Lessons:
    """Asks the teacher, which is moved to execution's device and stays there.

    item_codes: int64 [num_items, L]. max_examples: a random sample of the training examples, all by
    default. validation_users: at most that many; None takes all. precision: of the teacher's
    forward, which is over in seconds, so that bf16 would gain little. directory: where its answers
    to the training examples are kept between runs; in memory otherwise.
    """
    asking = replace(execution or Execution(), precision=precision)
    if isinstance(teacher, nn.Module):
        teacher.requires_grad_(False)
    generator = np.random.default_rng(seed)
    examples = split.train
    if max_examples is not None and max_examples < len(examples):
        examples = examples.take(np.sort(generator.permutation(len(examples))[:max_examples]))
    chosen = np.sort(generator.permutation(len(split.validation))[:validation_users])
    held_out = split.validation.take(chosen)
    features = compute_features(
        teacher,
        examples,
        item_codes,
        directory=directory,
        fingerprint=f"{fingerprint} seed={seed}",
        dtype=dtype,
        execution=asking,
        progress=progress,
    )
    held_out_features = compute_features(
        teacher, held_out, item_codes, execution=asking, progress=False
    )
    return Lessons(examples, features, held_out, held_out_features, item_codes, teacher.tokens)
