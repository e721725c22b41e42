"""The training loop of teacher and student.

AdamW, linear warm-up and cosine decay, gradient clipping, validation every few epochs, the best
weights kept, early stopping. After every epoch all state goes to one file; training that starts
from that file continues with the same bits as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidmlp.progress import bar

from .states import load_tensors, save_tensors, seed_everything

logger = logging.getLogger(__name__)

# Called after every epoch with numbers by name.
Log = Callable[[dict[str, float]], None]


class TrainingFailed(ValueError):
    """Training cannot go on; the last good state is on disk where a state file was asked for."""


@dataclass(frozen=True)
class LoopOptions:
    """How to train.

    examples_per_epoch: a fresh random sample of that many per epoch; None takes all.
    validate_every: epochs between validations; patience: validations without a better score
    before stopping. learning_rate rises over warmup_steps (at most a tenth of all steps) and falls
    to zero as a cosine.
    """

    epochs: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    examples_per_epoch: int | None = None
    validate_every: int = 1
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.examples_per_epoch is not None and self.examples_per_epoch < 1:
            raise ValueError(
                f"examples_per_epoch must be at least 1, got {self.examples_per_epoch}"
            )


@dataclass
class TrainingResult:
    """What a training did: its best validation score, the epoch of it, and every epoch's record."""

    best_score: float
    best_epoch: int
    epochs: int
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    num_examples: int,
    loss_of: Callable[[np.ndarray], Tensor],
    validate: Callable[[], float],
    options: LoopOptions,
    *,
    name: str,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Trains ``model`` in place and leaves the weights of the best validation in it.

    loss_of: scalar loss of the examples at the given indices, int64 [<= batch_size].
    validate: a score, higher is better; it is called in evaluation mode without gradients.
    state_file: resumed from when it exists, written after every epoch. fingerprint names the data
    and model; a state file with another one, or other options, is refused. log: called after every
    epoch with its number ``epoch``, mean ``loss``, last ``learning_rate``, mean ``gradient_norm``
    before clipping, ``seconds`` with validation, and ``score`` where it was validated.
    Raises TrainingFailed when the loss is not finite.
    """
    if num_examples < 1:
        raise ValueError(f"{name} has no training example; its users need at least 4 interactions")
    seed_everything(options.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    per_epoch = min(options.examples_per_epoch or num_examples, num_examples)
    steps = options.epochs * -(-per_epoch // options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, min(options.warmup_steps, steps // 10), steps)
    )
    identity = {"fingerprint": fingerprint, "examples": num_examples, **asdict(options)}
    result = TrainingResult(best_score=-math.inf, best_epoch=0, epochs=0)
    best = _copy(model)
    stale = 0
    if state_file is not None and state_file.exists():
        state = load_tensors(state_file)
        _check_identity(state["identity"], identity, state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        best, stale = state["best"], state["stale"]
        result = TrainingResult(**state["result"])

    while result.epochs < options.epochs and stale < options.patience:
        epoch = result.epochs + 1
        # The order depends on seed and epoch alone, so resuming needs no memory of earlier ones.
        order = np.random.default_rng([options.seed, epoch]).permutation(num_examples)[:per_epoch]
        model.train()
        total = norm = 0.0
        begun = time.perf_counter()
        batches = range(0, per_epoch, options.batch_size)
        label = f"{name} epoch {epoch}/{options.epochs}"
        with bar(batches, label, progress) as steps_bar:
            for begin in steps_bar:
                batch = order[begin : begin + options.batch_size]
                loss = loss_of(batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingFailed(_not_finite(name, epoch, value, state_file))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm += float(nn.utils.clip_grad_norm_(parameters, options.clip_norm))
                rate = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                total += value * len(batch)
                steps_bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        result.epochs = epoch
        record = {"epoch": float(epoch), "loss": total / per_epoch}
        if epoch % options.validate_every == 0 or epoch == options.epochs:
            model.eval()
            with torch.no_grad():
                record["score"] = validate()
            if record["score"] > result.best_score:
                result.best_score, result.best_epoch, stale = record["score"], epoch, 0
                best = _copy(model)
            else:
                stale += 1
        result.history.append(record)
        if progress:
            logger.info(_line(label, record))
        if log is not None:
            seconds = time.perf_counter() - begun
            facts = {"learning_rate": rate, "gradient_norm": norm / len(batches)}
            log({**record, **facts, "seconds": seconds})
        if state_file is not None:
            save_tensors(
                state_file,
                {
                    "identity": identity,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "random": torch.get_rng_state(),
                    "best": best,
                    "stale": stale,
                    "result": asdict(result),
                },
            )
    model.load_state_dict(best)
    model.eval()
    return result


def _rate(step: int, warmup: int, steps: int) -> float:
    """Factor on the learning rate at a step: linear rise, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _line(label: str, record: dict[str, float]) -> str:
    score = f", validation NDCG@10 {record['score']:.4f}" if "score" in record else ""
    return f"{label}: loss {record['loss']:.3f}{score}"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _check_identity(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} was trained with {name}={saved.get(name)!r}, this call has {value!r}; "
                "use the same settings to resume, or start afresh (--restart)"
            )


def _not_finite(name: str, epoch: int, value: float, state_file: Path | None) -> str:
    kept = (
        f"the state after epoch {epoch - 1} is kept in {state_file}"
        if state_file is not None and epoch > 1
        else "nothing was saved yet"
    )
    return f"{name}: the loss is {value} in epoch {epoch}; {kept}; try a lower learning rate"
