"""Argument types and groups that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


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


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What the parser makes of the arguments; ValueError with its reason where it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1:]
        raise ValueError("".join(reason).partition("error: ")[2] or "refused") from None


def add_training_arguments(
    parser: argparse.ArgumentParser, *, epochs: int, learning_rate: float, batch_size: int
) -> None:
    """What teacher and student training have in common."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=positive, default=epochs, help="passes over the training examples")
    add("--batch-size", type=positive, default=batch_size, help="examples per step")
    add("--lr", type=float, default=learning_rate, help="largest learning rate (AdamW)")
    add("--warmup", type=int, default=200, help="steps over which the rate rises to --lr")
    add("--weight-decay", type=float, default=0.01, help="pull of the weights towards zero")
    add(
        "--examples-per-epoch",
        type=positive,
        metavar="N",
        help="a fresh random sample per epoch instead of all examples (default: all)",
    )
    add(
        "--validate-every", type=positive, default=1, metavar="N", help="epochs between validations"
    )
    add(
        "--patience",
        type=positive,
        default=5,
        metavar="N",
        help="stop after that many validations without a better NDCG@10",
    )
    add("--seed", type=int, default=0, help="start of all random numbers")
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
