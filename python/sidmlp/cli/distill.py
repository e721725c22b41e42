"""Train the student: one context vector per user and one small MLP per code, taught by the teacher.

The student (SID-MLP) reads the teacher's encoder output and learns to give the teacher's
probabilities for every code, which a fused kernel then computes in microseconds. What the teacher
says about every training example is computed once and kept in the run directory. An interrupted
training continues with the same command.
"""

from __future__ import annotations

import argparse

from .arguments import (
    TrainingDefaults,
    add_execution_arguments,
    add_training_arguments,
    positive,
    share,
)
from .run_directory import RunDirectory, add_run_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    size = parser.add_argument_group("size of the model")
    add = size.add_argument
    add("--hidden", type=positive, default=512, help="width of the MLP of each code")
    add("--blocks", type=positive, default=1, help="hidden layers of each MLP")
    add("--attention", type=positive, help="width of the attention (default: the teacher's width)")
    add("--heads", type=positive, default=4, help="attention heads")
    add("--ffn", type=positive, help="width of the feed-forward layer (default: 4 x the width)")
    add("--dropout", type=share, default=0.2, help="share of activations dropped")
    add_execution_arguments(parser, compiles=True)
    add_training_arguments(
        parser,
        cpu=TrainingDefaults(50, 512, 1e-3, validate_every=1, validation_users=1000),
        cuda=TrainingDefaults(200, 1024, 1e-3, validate_every=5, validation_users=None),
    )
    loss = parser.add_argument_group("what is learnt")
    loss.add_argument(
        "--alpha",
        type=share,
        default=0.5,
        help="weight of the teacher's probabilities against the true codes",
    )
    loss.add_argument(
        "--tau", type=float, default=1.0, help="temperature that softens the probabilities"
    )
    loss.add_argument(
        "--max-examples",
        type=positive,
        metavar="N",
        help="a random sample of the training examples (default: all)",
    )
    loss.add_argument(
        "--feature-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="number format in which the teacher's outputs are kept",
    )
    loss.add_argument(
        "--feature-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision in which the teacher computes them",
    )
    loss.add_argument(
        "--beams", type=positive, default=20, help="candidates kept per level in validation"
    )
    loss.add_argument(
        "--validate-with",
        choices=("kernel", "reference"),
        default="kernel",
        help="what decodes the student in validation: sidmlp_kernels, or plain PyTorch",
    )


def run(options: argparse.Namespace) -> None:
    """Distils and writes the student."""
    from sidmlp.data import leave_last_out
    from sidmlp.data.files import sha256_of_file
    from sidmlp.distill import DistillOptions, distill, make_student, reference_decode

    from .artifacts import load_codes, load_data, load_teacher, save_student
    from .kernel_validation import kernel_decode
    from .loop_options import (
        execution_of,
        loop_options,
        set_threads,
        summary,
        training_choices,
        training_log,
    )

    set_threads(options.threads)
    execution = execution_of(options)
    directory = RunDirectory(options.run)
    record = directory.require("train-teacher")
    data, (codes, _) = load_data(directory), load_codes(directory)
    teacher = load_teacher(directory)
    if options.restart:
        directory.restart_student()
    student = make_student(
        teacher,
        attention_dim=options.attention,
        num_heads=options.heads,
        ffn_dim=options.ffn,
        hidden_dim=options.hidden,
        blocks_per_head=options.blocks,
        dropout=options.dropout,
        seed=options.seed,
    )
    decode_by = {"kernel": kernel_decode, "reference": reference_decode}[options.validate_with]
    result = distill(
        student,
        teacher,
        leave_last_out(data),
        codes,
        DistillOptions(alpha=options.alpha, tau=options.tau),
        loop_options(options, execution),
        max_examples=options.max_examples,
        validation_users=training_choices(options, execution).validation_users,
        validation_beams=max(options.beams, 10),
        decode=decode_by(codes),
        execution=execution,
        feature_directory=directory.features,
        feature_dtype=options.feature_dtype,
        feature_precision=options.feature_precision,
        state_file=directory.student_progress,
        fingerprint=record["fingerprint"],
        log=training_log(directory, "student", options),
    )
    save_student(directory, student)
    directory.finish("distill", sha256_of_file(directory.student), **summary(result))
    print(
        f"student: validation NDCG@10 {result.best_score:.4f} "
        f"in epoch {result.best_epoch} of {result.epochs}"
    )
