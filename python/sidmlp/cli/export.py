"""Write the student as a directory that `sidmlp_kernels.load` reads.

It holds the student, the encoder that it reads, the items' codes and, for printing, their titles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
    from sidmlp.encoder_assets import mlp_encoder_assets, t5_encoder_assets
    from sidmlp.export import export_checkpoint

    from .artifacts import load_codes, load_data, load_encoder, load_student, load_teacher

    directory = RunDirectory(options.run)
    fingerprint = directory.require("distill")["fingerprint"]
    data, (codes, tokens) = load_data(directory), load_codes(directory)
    own = load_encoder(directory)
    encoder_config, encoder_weights = (
        t5_encoder_assets(load_teacher(directory).t5) if own is None else mlp_encoder_assets(own)
    )
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
    directory.finish("export", fingerprint, directory=str(target))
    print(f"exported to {target}; load it with sidmlp_kernels.load({str(target)!r})")
