"""Between command-line options and the training loop."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from sidmlp.reporting import TrainingLog
from sidmlp.training import LoopOptions, TrainingResult

from .run_directory import RunDirectory


def loop_options(options: argparse.Namespace) -> LoopOptions:
    """The loop's options out of those that ``add_training_arguments`` declared."""
    return LoopOptions(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        examples_per_epoch=options.examples_per_epoch,
        validate_every=options.validate_every,
        patience=options.patience,
        seed=options.seed,
    )


def set_threads(threads: int | None) -> None:
    """Limits PyTorch to that many CPU threads, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def training_log(directory: RunDirectory, name: str, options: argparse.Namespace) -> TrainingLog:
    """What ``train`` reports to: logs/NAME.json and, with --tensorboard, tensorboard/NAME."""
    folder = directory.path / "tensorboard" / name if options.tensorboard else None
    return TrainingLog(directory.log(name), folder)


def summary(result: TrainingResult) -> dict[str, Any]:
    """What a command records of a training."""
    return {
        "validation_ndcg@10": result.best_score,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "history": result.history,
    }
