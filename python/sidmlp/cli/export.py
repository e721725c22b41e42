"""Write the student as a directory that `sidmlp_kernels.load` reads.

It holds the student, the encoder that it reads, the items' codes and, for printing, their titles.
Of a decoder-only teacher (qwen3, llama) there is no encoder that a checkpoint can hold: its student
is loaded with `sidmlp_kernels.load(DIR, encoder=teacher.encode)`, or decodes from states.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .run_directory import RunDirectory, add_run_argument

TITLES = "titles.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="checkpoint directory to write (default: student, inside the run directory)",
    )
    parser.add_argument(
        "--beams", type=int, default=50, help="candidates kept per level unless a caller says else"
    )


def run(options: argparse.Namespace) -> None:
    """Exports the run's student."""
    from sidmlp.data.files import write_errors, write_json
    from sidmlp.export import export_checkpoint

    from .artifacts import load_codes, load_data, load_student

    directory = RunDirectory(options.run)
    fingerprint = directory.require("distill")["fingerprint"]
    data, (codes, tokens) = load_data(directory), load_codes(directory)
    encoder_config, encoder_weights = _encoder_of(directory)
    target = options.out or directory.checkpoint
    with write_errors(target):
        export_checkpoint(
            target,
            load_student(directory),
            codes,
            data.item_ids,
            tokens=tokens.as_dict(),
            encoder_config=encoder_config,
            encoder_state_dict=encoder_weights,
            decode={"num_beams": options.beams},
        )
    if data.titles is not None or data.item_names is not None:
        titles = {str(data.item_ids[item]): data.title(item) for item in range(data.num_items)}
        write_json(target / TITLES, titles)
    # One inside the run directory moves with it; any other is found from wherever one asks.
    own = target.resolve() == directory.checkpoint.resolve()
    directory.finish("export", fingerprint, directory=None if own else str(target.resolve()))
    if encoder_config is not None:
        print(f"exported to {target}; load it with sidmlp_kernels.load({str(target)!r})")
    else:
        print(
            f"exported to {target}, without an encoder, as the teacher is decoder-only: load it "
            f"with sidmlp_kernels.load({str(target)!r}, encoder=teacher.encode) and teacher = "
            f"sidmlp.teacher.read_teacher({str(directory.teacher)!r})"
        )


def _encoder_of(directory: RunDirectory) -> tuple[Any, Any]:
    """Sizes and weights of what the student reads; None and None of a decoder-only teacher."""
    from sidmlp.encoder_assets import mlp_encoder_assets, t5_encoder_assets
    from sidmlp.teacher import Teacher

    from .artifacts import load_encoder, load_teacher

    own = load_encoder(directory)
    if own is not None:
        return mlp_encoder_assets(own)
    teacher = load_teacher(directory)
    return t5_encoder_assets(teacher.t5) if isinstance(teacher, Teacher) else (None, None)
