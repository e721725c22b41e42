"""SID-MLP++, stage 1: an encoder of MLPs learns to give the teacher's states.

loss = mean over valid tokens and over D of (states of the encoder - states of the teacher)^2

Stage 2, the student on these states, is ``sidmlp.distill``'s. Source: SID-MLP++ (arXiv 2605.12617).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import TokenTable
from sidmlp.lessons import Lessons
from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sidmlp.states_by_role import states_by_role
from sidmlp.teacher import Distillable
from sidmlp.teacher.train import batches
from sidmlp.training import Execution, Log, LoopOptions, TrainingResult, compiled, train
from sidmlp.training.features import Features, FeatureTable


def make_encoder(
    teacher: Distillable, *, num_layers: int = 4, hidden_dim: int = 512, seed: int = 0
) -> MLPEncoder:
    """An untrained encoder for a teacher: its width, its tokens, its code embeddings to begin with.

    The embeddings of other tokens begin as random rows of the same spread, and so do those of codes
    where the teacher's have another width; positions begin small.
    """
    tokens, tables = teacher.tokens, teacher.code_embeddings()
    dim = teacher.dim
    config = MLPEncoderConfig(
        num_layers=num_layers,
        num_roles=tokens.num_levels,
        dim=dim,
        hidden_dim=hidden_dim,
        vocab_size=tokens.vocab_size,
        max_length=tokens.max_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = MLPEncoder(config)
    with torch.no_grad():
        spread = float(torch.cat([rows.flatten() for rows in tables]).float().std())
        own = encoder.embed_tokens.weight
        own.mul_(spread)
        encoder.embed_positions.weight.mul_(0.1 * spread)
        if tables[0].shape[1] == dim:
            for start, rows in zip(tokens.code_offsets, tables, strict=True):
                own[start : start + len(rows)] = rows
    return encoder


@dataclass(frozen=True)
class StateError:
    """How far the encoder is from the teacher on validation examples.

    mse: mean over valid tokens and over D; explained: 1 - mse / the variance of the teacher's
    states around their mean, so 1 is perfect and 0 no better than a constant.
    """

    mse: float
    explained: float


def train_encoder(
    encoder: MLPEncoder,
    lessons: Lessons,
    loop: LoopOptions,
    *,
    execution: Execution | None = None,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains the encoder in place; the weights of the best validation MSE stay.

    execution: fp32 on the CPU by default; the encoder is moved to its device and stays there.
    Raises ValueError where the teacher's states have another width, and TrainingFailed.
    """
    execution = execution or Execution()
    device, features = execution.device, lessons.features
    config = encoder.config
    if config.dim != lessons.dim:
        raise ValueError(
            f"encoder: expected width {lessons.dim}, that of the teacher's states, got "
            f"{config.dim}; make it with make_encoder, for the same teacher"
        )
    encoder.to(device)
    tokens = TokenTable(lessons.tokens, lessons.train, lessons.item_codes, device)
    resident = execution.on_gpu and FeatureTable.fits(features, device)
    table = FeatureTable(features, device) if resident else None

    def error_of(ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        return squared_error(states_by_role(encoder, ids, mask), wanted, mask)

    error: Callable[..., Tensor] = compiled(error_of) if execution.compile else error_of

    def loss_of(longest: int, index: Tensor, *wanted: Tensor) -> Tensor:
        ids, mask = tokens.batch(index.clamp(min=0), longest)
        if table is not None:
            wanted = table.batch(index, ids.shape[1])[:1]
        return error(ids, mask & (index >= 0)[:, None], *wanted)

    def inputs_of(index: np.ndarray, longest: int) -> tuple[Tensor, ...]:
        longest = 2 + longest * lessons.tokens.num_levels
        batch = (torch.from_numpy(index), features.batch_states(index, longest)[0])
        return tuple(part.to(device) for part in batch)

    return train(
        encoder,
        len(features),
        loss_of,
        lambda: state_error(encoder, lessons, execution).mse,
        loop,
        name="encoder",
        execution=execution,
        lengths=tokens.lengths,
        inputs_of=inputs_of if table is None else None,
        state_file=state_file,
        fingerprint=f"{fingerprint} {config}",
        progress=progress,
        log=log,
        measure="MSE",
        lower_is_better=True,
    )


def squared_error(states: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """The module's formula; states, wanted [B, T, D], mask bool [B, T] with a True; never half."""
    error = (states.float() - wanted.float()).square().sum(-1)
    return (error * mask).sum() / (mask.sum() * states.shape[-1])


@torch.no_grad()
def state_error(encoder: MLPEncoder, lessons: Lessons, execution: Execution) -> StateError:
    """On the validation examples, of the encoder on execution's device, in fp32."""
    features: Features = lessons.validation_features
    data = TokenTable(lessons.tokens, lessons.validation, lessons.item_codes, execution.device)
    dim, device = encoder.config.dim, execution.device
    error = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.zeros(2, dim, dtype=torch.float64, device=device)
    for index in batches(len(features), 1024 if execution.on_gpu else 128):
        longest = int(data.lengths[index].max())
        ids, mask = data.batch(torch.from_numpy(index).to(device), longest)
        wanted = features.batch_states(index, ids.shape[1])[0].to(device)[mask].double()
        error += (states_by_role(encoder, ids, mask)[mask] - wanted).square().sum()
        sums += torch.stack([wanted.sum(0), wanted.square().sum(0)])
    count = int(features.token_offsets[-1])
    mean, square = (sums / count).cpu()
    mse = float(error) / (count * dim)
    variance = float((square - mean.square()).mean())
    return StateError(mse, 1 - mse / variance if variance > 0 else 0.0)
