"""The first stage of `sidmlp distill --encoder mlp`: the encoder of a SID-MLP++ student."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arguments import positive
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from sidmlp.lessons import Lessons
    from sidmlp.mlp_encoder import MLPEncoder
    from sidmlp.teacher import Distillable
    from sidmlp.training import Execution, LoopOptions

ENCODERS = ("teacher", "mlp")
EPOCHS = {"cpu": 20, "cuda": 100}


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose states the student reads, and how its own encoder is trained."""
    group = parser.add_argument_group("encoder")
    add = group.add_argument
    add(
        "--encoder",
        choices=ENCODERS,
        default="teacher",
        help="whose states the student reads: the teacher's, or those of MLPs that are first "
        "trained to give the same (SID-MLP++), so that nothing of the Transformer is left",
    )
    add("--encoder-layers", type=positive, default=4, help="layers of the MLP encoder")
    add("--encoder-hidden", type=positive, default=512, help="width of its MLPs")
    add(
        "--encoder-epochs",
        type=positive,
        metavar="N",
        help="passes over the training examples (default: {cpu}, on a GPU {cuda})".format(**EPOCHS),
    )
    add("--encoder-lr", type=float, default=1e-3, metavar="N", help="its largest learning rate")
    add(
        "--joint",
        action="store_true",
        help="train it further together with the student; without this it is frozen by then",
    )


def trained_encoder(
    options: argparse.Namespace,
    directory: RunDirectory,
    teacher: Distillable,
    lessons: Lessons,
    loop: LoopOptions,
    execution: Execution,
    fingerprint: str,
) -> tuple[MLPEncoder, str, dict[str, Any]]:
    """The encoder, what it is made from, and what to record of its training.

    loop: the student's. Raises ValueError where a student on other states is under way.
    """
    from sidmlp.distill_encoder import make_encoder, state_error, train_encoder

    from .loop_options import summary, training_log

    if directory.student_progress.exists() and not directory.encoder_progress.exists():
        raise ValueError(
            f"{directory.student_progress} is of a student on the teacher's states; give this one "
            f"a run directory of its own (--into {directory.path / 'plus'}), or start afresh "
            "(--restart)"
        )
    encoder = make_encoder(
        teacher,
        num_layers=options.encoder_layers,
        hidden_dim=options.encoder_hidden,
        seed=options.seed,
    )
    epochs = options.encoder_epochs or EPOCHS[execution.device.type]
    loop = replace(loop, epochs=epochs, learning_rate=options.encoder_lr)

    write = training_log(directory, "encoder", options, measure="MSE")

    def log(facts: dict[str, float]) -> None:
        # Whatever the second stage has done was done on another encoder's states.
        directory.restart_second_stage()
        write(facts)

    result = train_encoder(
        encoder,
        lessons,
        loop,
        execution=execution,
        state_file=directory.encoder_progress,
        fingerprint=fingerprint,
        log=log,
    )
    error = state_error(encoder, lessons, execution)
    print(
        f"encoder: validation MSE {error.mse:.5f}, {error.explained:.2%} of the variance of the "
        f"teacher's states, in epoch {result.best_epoch} of {result.epochs}"
    )
    facts = summary(result)
    del facts["validation_ndcg@10"]
    facts |= {"validation_mse": error.mse, "explained_variance": error.explained}
    return encoder, f"encoder={encoder.config} {loop}", facts
