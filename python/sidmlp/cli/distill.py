"""Train the student: one context vector per user and one small MLP per code, taught by the teacher.

The student (SID-MLP) reads the teacher's encoder output and learns to give the teacher's
probabilities for every code, which a fused kernel then computes in microseconds. What the teacher
says about every training example is computed once and kept in the run directory. An interrupted
training continues with the same command.

With --encoder mlp the student is a SID-MLP++: an encoder of MLPs first learns the teacher's states,
then the student learns on those. With --into both kinds of one teacher can be kept and compared:

  sidmlp distill --run runs/films
  sidmlp distill --run runs/films --encoder mlp --into runs/films/plus
  sidmlp export --run runs/films; sidmlp export --run runs/films/plus
  sidmlp evaluate --run runs/films --plus runs/films/plus
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    TrainingDefaults,
    add_execution_arguments,
    add_training_arguments,
    positive,
    share,
)
from .encoder_stage import add_encoder_arguments
from .run_directory import RunDirectory, add_run_argument

if TYPE_CHECKING:
    from torch import nn

    from sidmlp.student import Student


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="a further student of the same teacher goes there: a run directory with links to the "
        "data, codes and teacher of --run",
    )
    size = parser.add_argument_group("size of the model")
    add = size.add_argument
    add("--hidden", type=positive, default=512, help="width of the MLP of each code")
    add("--blocks", type=positive, default=1, help="hidden layers of each MLP")
    add("--attention", type=positive, help="width of the attention (default: the teacher's width)")
    add("--heads", type=positive, default=4, help="attention heads")
    add("--ffn", type=positive, help="width of the feed-forward layer (default: 4 x the width)")
    add("--dropout", type=share, default=0.2, help="share of activations dropped")
    add(
        "--init-from",
        type=Path,
        metavar="DIR",
        help="begin with the weights of another run's student of the same size and teacher",
    )
    add_encoder_arguments(parser)
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
    """Distils and writes the student, with its encoder if that is its own."""
    import shutil

    from sidmlp.data import leave_last_out
    from sidmlp.data.files import sha256_of_file
    from sidmlp.distill import DistillOptions, make_student, reference_decode, train_student
    from sidmlp.lessons import take_lessons

    from .artifacts import load_codes, load_data, load_teacher, save_encoder, save_student
    from .encoder_stage import trained_encoder
    from .kernel_validation import kernel_decode
    from .loop_options import (
        execution_of,
        loop_options,
        set_threads,
        summary,
        training_choices,
        training_log,
    )
    from .shared_run import student_run
    from .staging import staged

    if options.joint and options.encoder != "mlp":
        raise ValueError("--joint trains the student's own encoder; say --encoder mlp, too")
    set_threads(options.threads)
    execution = execution_of(options)
    directory = RunDirectory(options.run)
    if options.into is not None:
        directory = student_run(directory, options.into)
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
    loop = loop_options(options, execution)
    fingerprint = record["fingerprint"]
    made_from, facts = [fingerprint], {}
    if options.init_from is not None:
        made_from.append(_init(student, RunDirectory(options.init_from), record))
    lessons = take_lessons(
        teacher,
        leave_last_out(data),
        codes,
        seed=options.seed,
        max_examples=options.max_examples,
        validation_users=training_choices(options, execution).validation_users,
        execution=execution,
        directory=directory.features,
        dtype=options.feature_dtype,
        precision=options.feature_precision,
        fingerprint=fingerprint,
    )
    encoder = None
    if options.encoder == "mlp":
        encoder, text, training = trained_encoder(
            options, directory, teacher, lessons, loop, execution, fingerprint
        )
        made_from += [text, f"joint={options.joint}"]
        facts = {"encoder": "mlp", "joint": options.joint, "encoder_training": training}
        if not options.joint:
            encoder.requires_grad_(False)
            lessons = lessons.read_by(
                encoder,
                directory=directory.encoder_features,
                fingerprint=f"{fingerprint} {weights_fingerprint(encoder)}",
                dtype=options.feature_dtype,
                execution=replace(execution, precision=options.feature_precision),
            )
    decode_by = {"kernel": kernel_decode, "reference": reference_decode}[options.validate_with]
    result = train_student(
        student,
        lessons,
        DistillOptions(alpha=options.alpha, tau=options.tau),
        loop,
        together_with=encoder if options.joint else None,
        validation_beams=max(options.beams, 10),
        decode=decode_by(codes),
        execution=execution,
        state_file=directory.student_progress,
        fingerprint=" ".join([*made_from, options.feature_dtype, options.feature_precision]),
        log=training_log(directory, "student", options),
    )
    with staged(directory) as new:
        save_student(new, student)
        made = [new.student]
        if encoder is not None:
            save_encoder(new, encoder)
            made.append(new.encoder)
        new.finish("distill", " ".join(map(sha256_of_file, made)), **facts, **summary(result))
    if encoder is None:
        directory.encoder.unlink(missing_ok=True)  # an earlier student's
    shutil.rmtree(directory.encoder_features, ignore_errors=True)
    print(
        f"student: validation NDCG@10 {result.best_score:.4f} "
        f"in epoch {result.best_epoch} of {result.epochs}"
    )


def _init(student: Student, other: RunDirectory, record: dict[str, Any]) -> str:
    """Gives the student another's weights; what they are, for the fingerprint.

    Raises ValueError where that is of another size or teacher.
    """
    from .artifacts import load_student

    found = load_student(other)
    if other.require("train-teacher")["fingerprint"] != record["fingerprint"]:
        raise ValueError(f"--init-from {other.path}: its student is of another teacher")
    if found.config != student.config:
        raise ValueError(
            f"--init-from: expected a student of {student.config}, got {found.config} in "
            f"{other.path}; say the same sizes"
        )
    student.load_state_dict(found.state_dict())
    return f"init={weights_fingerprint(found)}"


def weights_fingerprint(model: nn.Module) -> str:
    """Changes with any weight."""
    from sidmlp.data.files import sha256_of_bytes

    weights = model.state_dict().values()
    return sha256_of_bytes(b"".join(weight.cpu().numpy().tobytes() for weight in weights))
