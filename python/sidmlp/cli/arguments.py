"""Argument types and groups that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas."""
    return tuple(positive(part) for part in text.split(","))


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def share_below_one(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    namespace: argparse.Namespace | None = None,
) -> argparse.Namespace:
    """What the parser makes of the arguments, over those of ``namespace``; ValueError with its
    reason where it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments, namespace)
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1:]
        raise ValueError("".join(reason).partition("error: ")[2] or "refused") from None


def add_execution_arguments(
    parser: argparse.ArgumentParser, *, precision: str = "auto", compiles: bool = False
) -> None:
    """Where a model runs. precision: the default; compiles: whether --compile means anything."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default=precision,
        help="bf16: matrix products in bfloat16, weights and losses in fp32; auto: bf16 on a GPU",
    )
    if compiles:
        group.add_argument(
            "--compile",
            action="store_true",
            help="run training steps through torch.compile: slow at first, faster afterwards",
        )


@dataclass(frozen=True)
class TrainingDefaults:
    """Defaults of a training that differ between devices."""

    epochs: int
    batch_size: int
    learning_rate: float
    validate_every: int
    validation_users: int | None  # None: all


def add_training_arguments(
    parser: argparse.ArgumentParser, *, cpu: TrainingDefaults, cuda: TrainingDefaults
) -> None:
    """What teacher and student training have in common."""
    group = parser.add_argument_group("training")
    parser.set_defaults(training_defaults={"cpu": cpu, "cuda": cuda})

    def add_by_device(name: str, kind: Callable[[str], Any], field: str, text: str) -> None:
        values = [getattr(defaults, field) or "all" for defaults in (cpu, cuda)]
        text += " (default: {}, on a GPU {})".format(*values)
        group.add_argument(name, type=kind, metavar="N", dest=field, help=text)

    add = group.add_argument
    add_by_device("--epochs", positive, "epochs", "passes over the training examples")
    add_by_device("--batch-size", positive, "batch_size", "examples per step")
    add_by_device("--lr", float, "learning_rate", "largest learning rate (AdamW)")
    add("--warmup", type=int, default=200, help="steps over which the rate rises to --lr")
    add("--weight-decay", type=float, default=0.01, help="pull of the weights towards zero")
    add(
        "--examples-per-epoch",
        type=positive,
        metavar="N",
        help="a fresh random sample per epoch instead of all examples (default: all)",
    )
    add_by_device("--validate-every", positive, "validate_every", "epochs between validations")
    add_by_device(
        "--validation-users", positive, "validation_users", "at most that many users validate"
    )
    add(
        "--patience",
        type=positive,
        default=5,
        metavar="N",
        help="stop after that many validations without a better NDCG@10",
    )
    add(
        "--ema",
        type=share_below_one,
        default=0.0,
        metavar="DECAY",
        help="validate and keep a moving average of the weights instead of the weights: this share "
        "of it stays at every step; 0.999 averages about the last 1000 steps, but never more than "
        "a tenth of those taken; 0 is the weights themselves",
    )
    add("--seed", type=seed, default=0, help="start of all random numbers")
    add(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads; small models are fastest with 1 (default: PyTorch's choice)",
    )
    add(
        "--restart",
        action="store_true",
        help="forget earlier progress; without this an interrupted training continues",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write logs for TensorBoard, into tensorboard/ inside the run directory",
    )
