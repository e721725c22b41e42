"""The training loop of teacher and student.

AdamW, linear warm-up and cosine decay, gradient clipping, validation every few epochs, the best
weights kept, early stopping. After every epoch all state goes to one file; training that starts
from that file continues with the same bits as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidmlp.progress import bar

from .average import MovingAverage
from .batches import Batch, batches_of
from .execution import Execution
from .states import load_tensors, random_state, save_tensors, seed_everything, set_random_state
from .step import LossOf, Step

logger = logging.getLogger(__name__)

# Called after every epoch with numbers by name.
Log = Callable[[dict[str, float]], None]
# (index int64 [B] with -1 for no example, longest) -> what the loss reads, on the device.
InputsOf = Callable[[np.ndarray, int], tuple[Tensor, ...]]

STEPS_PER_CHECK = 64  # asking for the loss waits for the device


# Options that trainings and sweeps of earlier versions know nothing of, and what they did.
LATER_OPTIONS = {"ema": 0.0}


class TrainingFailed(ValueError):
    """Training cannot go on; the last good state is on disk where a state file was asked for."""


@dataclass(frozen=True)
class LoopOptions:
    """How to train.

    examples_per_epoch: a fresh random sample of that many per epoch; None takes all.
    validate_every: epochs between validations; patience: validations without a better score
    before stopping. learning_rate rises over warmup_steps (at most a tenth of all steps) and falls
    to zero as a cosine. ema: decay of a moving average of the weights, which is then what is
    validated and kept (``MovingAverage``); 0 takes the weights themselves.
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
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
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
    loss_of: LossOf,
    validate: Callable[[], float],
    options: LoopOptions,
    *,
    name: str,
    execution: Execution | None = None,
    lengths: np.ndarray | None = None,
    inputs_of: InputsOf | None = None,
    state_file: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
    log: Log | None = None,
    measure: str = "NDCG@10",
    lower_is_better: bool = False,
) -> TrainingResult:
    """Trains ``model`` in place and leaves the weights of the best validation in it.

    loss_of: (longest, *inputs) -> scalar mean loss of a batch. By default the only input is the
    index of the examples, int64 [<= batch_size] on the device, -1 where the batch has none: those
    must not count, and at least one does. ``inputs_of(index, longest)`` makes others, on the
    device, from the index as a numpy array. lengths: int64 [num_examples]; ``longest`` bounds those
    of the batch, and is 0 without them. On a GPU or compiled, batches have one size and few values
    of ``longest``, and loss_of must not wait for the device, as it is captured in a CUDA graph.
    validate: a score by the name ``measure``, the higher the better unless ``lower_is_better``; it
    is called in evaluation mode without gradients.
    execution: fp32 on the CPU by default; the model must be on its device.
    state_file: resumed from when it exists, written after every epoch. fingerprint names the data
    and model; a state file with another one, or other options, is refused. log: called after every
    epoch with its number ``epoch``, mean ``loss``, last ``learning_rate``, mean ``gradient_norm``
    before clipping, ``seconds`` with validation, and ``score`` where it was validated.
    Raises TrainingFailed when a loss or a gradient is not finite, at the latest at the end of the
    epoch, whose weights are not saved then.
    """
    if num_examples < 1:
        raise ValueError(f"{name} has no training example; its users need at least 4 interactions")
    execution = execution or Execution()
    seed_everything(options.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    step = Step(
        trained,
        loss_of,
        options.learning_rate,
        options.weight_decay,
        options.clip_norm,
        execution,
    )
    average = MovingAverage(trained, options.ema) if options.ema else None
    per_epoch = min(options.examples_per_epoch or num_examples, num_examples)

    def batches_of_epoch(epoch: int) -> list[Batch]:
        # They depend on seed and epoch alone, so resuming needs no memory of earlier ones.
        rng = np.random.default_rng([options.seed, epoch])
        order = rng.permutation(num_examples)[:per_epoch]
        return batches_of(order, options.batch_size, lengths, execution, rng)

    steps = options.epochs * len(batches_of_epoch(1))
    warmup = min(options.warmup_steps, steps // 10)
    identity = {
        "fingerprint": fingerprint,
        "examples": num_examples,
        **execution.as_dict(),
        **asdict(options),
    }
    sign = -1 if lower_is_better else 1
    result = TrainingResult(best_score=-sign * math.inf, best_epoch=0, epochs=0)
    best = _copy(model)
    stale = done = 0
    if state_file is not None and state_file.exists():
        state = load_tensors(state_file)
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError(
                f"{state_file} holds no state of a training; delete it, or start afresh (--restart)"
            )
        _check_identity(state["identity"], identity, state_file)
        model.load_state_dict(state["model"])
        step.load_optimizer(state["optimizer"])
        set_random_state(state["random"])
        if average is not None:
            average.load(state["average"])
        best, stale, done = state["best"], state["stale"], state["steps"]
        result = TrainingResult(**state["result"])

    while result.epochs < options.epochs and stale < options.patience:
        epoch = result.epochs + 1
        model.train()
        step.begin_epoch()
        begun = time.perf_counter()
        batches = batches_of_epoch(epoch)
        label = f"{name} epoch {epoch}/{options.epochs}"
        inputs = _inputs(batches, inputs_of, execution)
        with bar(batches, label, progress) as steps_bar:
            for number, (batch, tensors) in enumerate(zip(steps_bar, inputs, strict=False), 1):
                rate = options.learning_rate * _rate(done, warmup, steps)
                step(batch, tensors, rate)
                if average is not None:
                    average.update()
                done += 1
                if number % STEPS_PER_CHECK == 0:
                    total, norm = step.totals()
                    value = total / (number * options.batch_size)
                    _check_finite(value, norm, name, epoch, state_file)
                    steps_bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        total, norm = step.totals()
        _check_finite(total / per_epoch, norm, name, epoch, state_file)
        result.epochs = epoch
        record = {"epoch": float(epoch), "loss": total / per_epoch}
        if epoch % options.validate_every == 0 or epoch == options.epochs:
            model.eval()
            with torch.no_grad(), average.applied() if average else nullcontext():
                record["score"] = validate()
                better = sign * record["score"] > sign * result.best_score
                if better:
                    best = _copy(model)
            if better:
                result.best_score, result.best_epoch, stale = record["score"], epoch, 0
            else:
                stale += 1
        result.history.append(record)
        if progress:
            logger.info(_line(label, record, measure))
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
                    "optimizer": step.optimizer.state_dict(),
                    "random": random_state(execution.device),
                    "average": average.state() if average is not None else None,
                    "best": best,
                    "stale": stale,
                    "steps": done,
                    "result": asdict(result),
                },
            )
    model.load_state_dict(best)
    model.eval()
    return result


def _inputs(
    batches: list[Batch], inputs_of: InputsOf | None, execution: Execution
) -> Iterator[tuple[Tensor, ...]]:
    """What the loss reads of each batch, on the device."""
    if inputs_of is not None:
        for batch in batches:
            yield inputs_of(batch.index, batch.longest)
    elif execution.static:
        # One copy an epoch: a copy a step would cost as much as the step's launch.
        index = torch.from_numpy(np.stack([batch.index for batch in batches]))
        for row in index.to(execution.device):
            yield (row,)
    else:
        for batch in batches:
            yield (torch.from_numpy(batch.index),)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Factor on the learning rate at a step: linear rise, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _line(label: str, record: dict[str, float], measure: str) -> str:
    score = f", validation {measure} {record['score']:.4f}" if "score" in record else ""
    return f"{label}: loss {record['loss']:.4g}{score}"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _check_identity(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    saved = {**LATER_OPTIONS, **saved}
    for name, value in wanted.items():
        if saved.get(name) != value:
            if name == "fingerprint":
                raise ValueError(
                    f"{path} belongs to other data, another model, loss or validation than this "
                    "call's; use the same to resume, or start afresh (--restart)"
                )
            raise ValueError(
                f"{path} was trained with {name}={saved.get(name)!r}, this call has {value!r}; "
                "use the same settings to resume, or start afresh (--restart)"
            )


def _check_finite(loss: float, norm: float, name: str, epoch: int, state_file: Path | None) -> None:
    # A gradient alone may be: of the last step, its weights would show in the next epoch's loss.
    wrong = [
        f"{what} is {value}"
        for what, value in (("loss", loss), ("gradient norm", norm))
        if not math.isfinite(value)
    ]
    if not wrong:
        return
    kept = (
        f"the state after epoch {epoch - 1} is kept in {state_file}"
        if state_file is not None and epoch > 1
        else "nothing was saved yet"
    )
    raise TrainingFailed(
        f"{name}: the {wrong[0]} in epoch {epoch}; {kept}; try a lower learning rate, from the "
        f"start (--restart)"
    )
