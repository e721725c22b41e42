"""Give every item a semantic ID: a tuple of codes, so that similar items share the first ones.

Item vectors become codes, by one of
  rkmeans  residual k-means: cluster the vectors, then what is left of them, and so on
  rqvae    the same inside an autoencoder that is trained with its codes (TIGER's tokenizer)
  pq       product quantisation: every level clusters its own share of the coordinates
  opq      pq after a rotation that makes the shares about equally hard (needs faiss)
A last code tells items apart that share all others. The vectors come from which items are chosen
near each other, from item texts, or from a file of yours. Ready-made IDs can be used instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive, sizes
from .run_directory import RunDirectory, add_run_argument
from .tokenizer_options import (
    add_tokenizer_arguments,
    add_vector_arguments,
    facts_of,
    item_vectors,
    make_tokenizer,
)

if TYPE_CHECKING:
    import numpy as np

    from sidmlp.data import Interactions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    add = parser.add_argument
    add(
        "--codes",
        type=sizes,
        default=(64, 64),
        metavar="N,N,..",
        help="codes per level, first level first; one more level for duplicates is added",
    )
    add(
        "--duplicates",
        choices=("level", "report"),
        help="items that share all codes: get a last level that tells them apart, or stay as they "
        "are and are counted (default: level; report for ready-made IDs)",
    )
    add(
        "--max-duplicates",
        type=positive,
        default=256,
        metavar="N",
        help="largest group of items that the last level may tell apart",
    )
    add(
        "--max-items",
        type=positive,
        default=20,
        metavar="N",
        help="items of a history that the models read, the newest ones",
    )
    add_tokenizer_arguments(parser)
    add_vector_arguments(parser)
    group = parser.add_argument_group("ready-made semantic IDs, used as they are")
    ready = group.add_mutually_exclusive_group()
    ready.add_argument(
        "--semantic-ids",
        nargs=2,
        metavar=("DIR", "NAME"),
        help="array NAME of DIR/semantic_ids.npz, codes [items, levels]",
    )
    ready.add_argument(
        "--given-codes",
        type=Path,
        metavar="FILE",
        help=".npy, .npz, .safetensors array [items, levels], or .json object of item to codes",
    )
    group.add_argument(
        "--given-name", metavar="NAME", help="which array of --given-codes, where it holds several"
    )


def run(options: argparse.Namespace) -> None:
    """Tokenises the run's items."""
    import numpy as np

    from sidmlp.data import check_servable
    from sidmlp.tokenizers import count_collisions, deduplicate

    from .artifacts import load_data, save_codes
    from .staging import staged

    directory = RunDirectory(options.run)
    data = load_data(directory)
    if options.given_name is not None and options.given_codes is None:
        raise ValueError("--given-name belongs to --given-codes; leave it out")
    ready = options.semantic_ids is not None or options.given_codes is not None
    level = options.duplicates == "level" or (options.duplicates is None and not ready)
    facts: dict[str, Any]
    if ready:
        codes, facts = _ready_made(options, data)
        per_level = (codes.max(0) + 1).tolist()
    else:
        # Before minutes of clustering; the level for duplicates has at least one code.
        check_servable((*options.codes, 1) if level else options.codes)
        tokenizer = make_tokenizer(options)
        vectors, source = item_vectors(options, data)
        books = tokenizer(vectors)
        codes, per_level = books.codes, list(options.codes)
        facts = {"source": source, **facts_of(books, options.tokenizer)}
    if level:
        codes, collisions = deduplicate(codes, options.max_duplicates)
        per_level.append(int(codes[:, -1].max()) + 1)
    else:
        collisions = count_collisions(codes)
    check_servable(per_level)
    print(f"before the last code {collisions}" if level else str(collisions))
    unique = len(np.unique(codes, axis=0))
    with staged(directory) as new:
        fingerprint = save_codes(new, codes)
        new.finish(
            "tokenize",
            f"{fingerprint} max_items={options.max_items}",
            codes_per_level=per_level,
            max_items=options.max_items,
            unique_ids=unique,
            colliding_items=collisions.items,
            largest_collision=collisions.largest,
            duplicates="level" if level else "report",
            **facts,
        )
    levels = " x ".join(str(count) for count in per_level)
    print(f"{data.num_items:,} items have {unique:,} different IDs of {levels} codes")


def _ready_made(
    options: argparse.Namespace, data: Interactions
) -> tuple[np.ndarray, dict[str, Any]]:
    """The given codes int64 [num_items, levels], and where they came from."""
    from sidmlp.data import load_semantic_ids
    from sidmlp.tokenizers import load_codes

    if options.given_codes is not None:
        codes = load_codes(options.given_codes, data, options.given_name)
        return codes, {"source": str(options.given_codes)}
    codes = load_semantic_ids(Path(options.semantic_ids[0]), options.semantic_ids[1])
    if len(codes) != data.num_items:
        raise ValueError(
            f"the semantic IDs are for {len(codes)} items, the data has {data.num_items}; "
            "use the IDs that belong to the data"
        )
    if codes.min() < 0:
        raise ValueError("semantic IDs must be codes from 0 up; subtract the vocabulary offset")
    return codes, {"source": options.semantic_ids[1]}
