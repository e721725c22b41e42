"""Give every item a semantic ID: a tuple of codes, so that similar items share the first ones.

Item vectors are clustered (code 1), what is left of them is clustered again (code 2), and so on:
residual k-means. A last code tells items apart that share all others. The vectors come from which
items are chosen near each other, or from a file of yours. Ready-made IDs can be used instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import positive, sizes
from .run_directory import RunDirectory, add_run_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    add = parser.add_argument
    add(
        "--codes",
        type=sizes,
        default=(64, 64),
        metavar="N,N,..",
        help="clusters per level, first level first; one more level for duplicates is added",
    )
    add(
        "--max-duplicates",
        type=positive,
        default=256,
        metavar="N",
        help="largest group of items that may share all codes of the clustered levels",
    )
    add(
        "--max-items",
        type=positive,
        default=20,
        metavar="N",
        help="items of a history that the models read, the newest ones",
    )
    vectors = parser.add_argument_group("item vectors")
    vectors.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help=".npy array [items, d], rows in the order of the data (default: co-occurrence)",
    )
    vectors.add_argument("--dim", type=positive, default=64, help="width of co-occurrence vectors")
    vectors.add_argument(
        "--window",
        type=positive,
        default=5,
        help="how far apart in a history two items still count as chosen together",
    )
    vectors.add_argument(
        "--backend",
        choices=("auto", "faiss", "torch"),
        default="auto",
        help="what runs k-means; auto takes faiss where it is installed",
    )
    vectors.add_argument("--seed", type=int, default=0, help="start of all random numbers")
    ready = parser.add_argument_group("ready-made semantic IDs")
    ready.add_argument(
        "--semantic-ids",
        nargs=2,
        metavar=("DIR", "NAME"),
        help="array NAME of DIR/semantic_ids.npz, codes [items, levels]; used as they are",
    )


def run(options: argparse.Namespace) -> None:
    """Tokenises the run's items."""
    import numpy as np

    from sidmlp.data import check_servable, leave_last_out, load_semantic_ids
    from sidmlp.tokenizers import (
        cooccurrence_vectors,
        deduplicate,
        load_vectors,
        residual_kmeans,
    )

    from .artifacts import load_data, save_codes

    directory = RunDirectory(options.run)
    data = load_data(directory)
    if options.semantic_ids is None:  # before minutes of clustering; one level is still to come
        check_servable((*options.codes, 1))
    if options.semantic_ids is not None:
        codes = load_semantic_ids(Path(options.semantic_ids[0]), options.semantic_ids[1])
        if len(codes) != data.num_items:
            raise ValueError(
                f"the semantic IDs are for {len(codes)} items, the data has {data.num_items}; "
                "use the IDs that belong to the data"
            )
        if codes.min() < 0:
            raise ValueError("semantic IDs must be codes from 0 up; subtract the vocabulary offset")
        facts: dict[str, object] = {"source": options.semantic_ids[1]}
        per_level = codes.max(0) + 1
    else:
        if options.vectors is not None:
            vectors = load_vectors(options.vectors, data.num_items)
        else:
            split = leave_last_out(data)
            vectors = cooccurrence_vectors(
                data, split, options.dim, options.window, seed=options.seed
            )
        books = residual_kmeans(vectors, options.codes, seed=options.seed, backend=options.backend)
        codes, collisions = deduplicate(books.codes, options.max_duplicates)
        print(f"before the last code {collisions}")
        facts = {"residual": [round(value, 4) for value in books.residual]}
        per_level = np.asarray([*options.codes, int(codes[:, -1].max()) + 1])
    check_servable(per_level.tolist())
    unique = len(np.unique(codes, axis=0))
    fingerprint = save_codes(directory, codes)
    directory.finish(
        "tokenize",
        f"{fingerprint} max_items={options.max_items}",
        codes_per_level=per_level.tolist(),
        max_items=options.max_items,
        unique_ids=unique,
        **facts,
    )
    levels = " x ".join(str(count) for count in per_level)
    print(f"{data.num_items:,} items have {unique:,} different IDs of {levels} codes")
