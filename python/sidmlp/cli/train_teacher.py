"""Train the teacher: a small Transformer that reads a history and writes an item's codes.

On a T5, encoder and decoder, this is TIGER (Rajput et al. 2023); on Qwen3 or Llama one stack of
layers reads the history and goes on with the codes. It is accurate but slow to ask;
`sidmlp distill` then makes the fast student from it. Training stops by itself when the validation
score no longer rises, and an interrupted training continues with the same command.
"""

from __future__ import annotations

import argparse

from .arguments import (
    TrainingDefaults,
    add_execution_arguments,
    add_training_arguments,
    positive,
    share,
    share_below_one,
)
from .run_directory import RunDirectory, add_run_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    size = parser.add_argument_group("size of the model")
    size.add_argument(
        "--backbone", choices=("t5", "qwen3", "llama"), default="t5", help="kind of Transformer"
    )
    size.add_argument("--dim", type=positive, default=128, help="width")
    size.add_argument(
        "--layers", type=positive, default=4, help="layers; of a t5, encoder and decoder each"
    )
    size.add_argument("--heads", type=positive, default=6, help="attention heads")
    size.add_argument(
        "--kv-heads",
        type=positive,
        help="heads of keys and values, which fewer than --heads share (default: --heads; not t5)",
    )
    size.add_argument("--head-dim", type=positive, default=64, help="width of a head")
    size.add_argument("--ffn", type=positive, default=1024, help="width of the feed-forward layers")
    size.add_argument("--dropout", type=share, default=0.1, help="share of activations dropped")
    add_execution_arguments(parser, compiles=True)
    add_training_arguments(
        parser,
        cpu=TrainingDefaults(30, 256, 1e-3, validate_every=1, validation_users=1000),
        cuda=TrainingDefaults(110, 1024, 2e-3, validate_every=5, validation_users=None),
    )
    parser.add_argument(
        "--targets-per-history",
        type=positive,
        default=1,
        metavar="N",
        help="predict that many following items from each history, not the next one alone; "
        "faster where the order within a session means little",
    )
    parser.add_argument(
        "--history-dropout",
        type=share_below_one,
        default=0.0,
        metavar="P",
        help="share of a history's items left out whenever it is trained on, at random, never the "
        "latest; against overfitting",
    )
    parser.add_argument(
        "--beams", type=positive, default=20, help="candidates kept per level in validation"
    )


def run(options: argparse.Namespace) -> None:
    """Trains and writes the teacher."""
    from sidmlp.data import leave_last_out
    from sidmlp.data.files import sha256_of_file
    from sidmlp.teacher import make_teacher
    from sidmlp.teacher.train import train_teacher
    from sidmlp.training import seed_everything

    from .artifacts import load_codes, load_data, save_teacher
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
    record = directory.require("tokenize")
    data, (codes, tokens) = load_data(directory), load_codes(directory)
    if options.restart:
        directory.restart_teacher()
    seed_everything(options.seed)
    sizes = {} if options.kv_heads is None else {"num_kv_heads": options.kv_heads}
    teacher = make_teacher(
        options.backbone,
        tokens,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        head_dim=options.head_dim,
        ffn_dim=options.ffn,
        dropout=options.dropout,
        **sizes,
    )
    result = train_teacher(
        teacher,
        leave_last_out(data),
        codes,
        loop_options(options, execution),
        targets_per_history=options.targets_per_history,
        history_dropout=options.history_dropout,
        validation_users=training_choices(options, execution).validation_users,
        validation_beams=max(options.beams, 10),
        execution=execution,
        state_file=directory.teacher_progress,
        fingerprint=record["fingerprint"],
        log=training_log(directory, "teacher", options),
    )
    save_teacher(directory, teacher)
    directory.finish("train-teacher", sha256_of_file(directory.teacher), **summary(result))
    print(
        f"teacher: validation NDCG@10 {result.best_score:.4f} "
        f"in epoch {result.best_epoch} of {result.epochs}"
    )
