"""Print recommendations for a list of items, oldest first, from an exported checkpoint.

Items are ids or titles; a part of a title is enough where only one item has it.
Example: sidmlp recommend runs/films/student "Toy Story" "Aladdin" "Lion King"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="directory that `sidmlp export` wrote")
    parser.add_argument("items", nargs="+", metavar="ITEM", help="ids or titles, oldest first")
    parser.add_argument("--k", type=positive, default=10, help="how many recommendations")
    parser.add_argument(
        "--beams",
        type=positive,
        help="candidates kept per level (default: what the checkpoint says, at least k)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run whose teacher reads the list, for a checkpoint without an encoder, as of a "
        "decoder-only teacher (default: the checkpoint's own encoder reads it)",
    )
    parser.add_argument(
        "--repeat", action="store_true", help="allow items of the list to be recommended again"
    )


def run(options: argparse.Namespace) -> None:
    """Loads the checkpoint with the kernels and prints what they recommend."""
    import numpy as np

    from sidmlp.data import Interactions
    from sidmlp.data.files import read_json

    from .artifacts import load_served
    from .export import TITLES
    from .run_directory import RunDirectory

    run = None if options.run is None else RunDirectory(options.run)
    model = load_served(options.checkpoint, run)
    names = options.checkpoint / TITLES
    titles = read_json(names) if names.is_file() else {}
    ids = np.asarray([int(i) for i in titles], dtype=np.int64)
    catalogue = Interactions(
        np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), ids, tuple(titles.values())
    )
    history = []
    for item in options.items:
        if titles:
            history.append(int(ids[catalogue.find(item)]))
        elif item.isdigit():
            history.append(int(item))
        else:
            raise ValueError(
                f"{options.checkpoint} has no {TITLES}, so items must be ids, got {item!r}"
            )
    beams = options.beams or max(model.defaults.num_beams, options.k)
    exclude = None if options.repeat else [history]
    found = model.decode(model.batch([history]), k=options.k, num_beams=beams, exclude=exclude)
    print("after " + ", ".join(titles.get(str(item), f"item {item}") for item in history) + ":")
    for rank in range(int(found.counts[0])):
        item, score = int(found.items[0, rank]), float(found.scores[0, rank])
        print(
            f"{rank + 1:4}. {titles.get(str(item), f'item {item}')}  (log-probability {score:.2f})"
        )
