"""Get item histories: who chose which item, in which order.

Give exactly one source:
  --movielens        943 people's ratings of 1,682 films (2 MB, downloaded once from PyPI)
  --table FILE       your own: .csv with a header user,item,timestamp[,title], or .jsonl with these
                     keys
  --arrays DIR       numpy: sequences.npz with items (0-based, oldest first) and offsets per user
  --amazon2023 FILE  a category of Amazon Reviews 2023: its rating_only .csv, or its reviews .jsonl
  --amazon2014 FILE  a category of the 2014 or 2018 release: its reviews .json or its ratings .csv

The Amazon files are read as they are published, gzipped or not; --meta adds the products' titles,
brands, categories, descriptions and features, which `sidmlp tokenize --texts` reads.

Of every user the last item is kept for testing and the one before it for validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import positive
from .run_directory import RunDirectory, add_run_argument

COLUMNS = ("user,item", "item,user")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--movielens", action="store_true", help="MovieLens-100K")
    source.add_argument("--table", type=Path, metavar="FILE", help=".csv or .jsonl file")
    source.add_argument("--arrays", type=Path, metavar="DIR", help="directory with sequences.npz")
    source.add_argument("--amazon2023", type=Path, metavar="FILE", help="ratings or reviews file")
    source.add_argument("--amazon2014", type=Path, metavar="FILE", help="ratings or reviews file")
    parser.add_argument(
        "--meta", type=Path, metavar="FILE", help="meta_* file of the same Amazon category"
    )
    parser.add_argument(
        "--columns",
        choices=COLUMNS,
        metavar="A,B",
        help="what the lines of an Amazon .csv without a header start with: user,item (2014) or "
        "item,user (2018) (default: by the look of the ids)",
    )
    parser.add_argument(
        "--min-count",
        type=positive,
        metavar="K",
        help="reviews that every user and product of an Amazon category must have; 1 keeps all "
        "(default: 5)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/cache"),
        metavar="DIR",
        help="where the MovieLens download is kept",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="a recbole-1.2.1 wheel that is already there, to work offline (default: download)",
    )


def run(options: argparse.Namespace) -> None:
    """Reads the source and writes it into the run directory."""
    from sidmlp.data import (
        leave_last_out,
        load_amazon,
        load_arrays,
        load_movielens,
        load_table,
    )

    from .artifacts import data_fingerprint
    from .staging import staged

    if options.wheel is not None and not options.movielens:
        raise ValueError("--wheel belongs to --movielens; leave it out")
    amazon = options.amazon2023 or options.amazon2014
    if amazon is None and (options.meta, options.min_count, options.columns) != (None,) * 3:
        raise ValueError(
            "--meta, --min-count and --columns belong to --amazon2023 and --amazon2014"
        )
    if amazon is not None:
        data = load_amazon(
            amazon,
            2014 if options.amazon2023 is None else 2023,
            meta=options.meta,
            min_count=options.min_count or 5,
            columns=options.columns,
        )
    elif options.movielens:
        data = load_movielens(options.cache, options.wheel)
    elif options.table is not None:
        data = load_table(options.table)
    else:
        data = load_arrays(options.arrays)
    split = leave_last_out(data)
    if not len(split.train) or not len(split.test):
        raise ValueError(
            f"the data has {len(split.train)} training and {len(split.test)} test examples; "
            "it needs users with at least 4 interactions"
        )
    counts = {
        "users": data.num_users,
        "items": data.num_items,
        "interactions": int(data.items.size),
        "training_examples": len(split.train),
        "test_users": len(split.test),
    }
    with staged(RunDirectory(options.run)) as directory:
        data.save(directory.data)
        directory.finish("data", data_fingerprint(data), **counts)
    print(
        f"{data.num_users:,} users, {data.num_items:,} items, {data.items.size:,} interactions; "
        f"{len(split.test):,} users are tested on their last item"
    )
