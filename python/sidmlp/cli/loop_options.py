"""Between command-line options and the training loop."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

import torch

from sidmlp.reporting import TrainingLog
from sidmlp.training import Execution, LoopOptions, TrainingResult

from .arguments import TrainingDefaults
from .run_directory import RunDirectory


def execution_of(options: argparse.Namespace) -> Execution:
    """Where to run, out of the options that ``add_execution_arguments`` declared."""
    return Execution.choose(options.device, options.precision, getattr(options, "compile", False))


def loop_options(options: argparse.Namespace, execution: Execution) -> LoopOptions:
    """The loop's options out of those that ``add_training_arguments`` declared."""
    chosen = training_choices(options, execution)
    return LoopOptions(
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        examples_per_epoch=options.examples_per_epoch,
        validate_every=chosen.validate_every,
        patience=options.patience,
        ema=options.ema,
        seed=options.seed,
    )


def training_choices(options: argparse.Namespace, execution: Execution) -> TrainingDefaults:
    """What was asked for and, where nothing was, the device's defaults."""
    defaults = options.training_defaults[execution.device.type]
    asked = {field.name: getattr(options, field.name) for field in fields(defaults)}
    return replace(defaults, **{name: v for name, v in asked.items() if v is not None})


def set_threads(threads: int | None) -> None:
    """Limits PyTorch to that many CPU threads, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def training_log(
    directory: RunDirectory, name: str, options: argparse.Namespace, measure: str = "NDCG@10"
) -> TrainingLog:
    """What ``train`` reports to: logs/NAME.json and, with --tensorboard, tensorboard/NAME."""
    folder = directory.path / "tensorboard" / name if options.tensorboard else None
    return TrainingLog(directory.log(name), folder, measure)


def summary(result: TrainingResult) -> dict[str, Any]:
    """What a command records of a training."""
    return {
        "validation_ndcg@10": result.best_score,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "history": result.history,
    }
