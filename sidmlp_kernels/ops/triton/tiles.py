"""Tile sizes of the kernels: one table keyed by sizes.

`python -m sidmlp_kernels.ops.triton.tiles` prints it, benchmarks/tune_triton.py measures others.

A row holds for students up to its hidden width, plans up to its number of beams and GPUs with its
shared memory; the first row that fits is taken. Tiles depend on model, settings, catalogue and GPU,
never on the batch, so that a request's bits do not either; the batch only chooses how many requests
a program groups (`GROUPS`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

MAX_HIDDEN = 16384
MAX_DIM = 16384
MAX_BEAMS = 1024
LEAST_SHARED, MOST_SHARED = 99, 227  # kilobytes: RTX 30 to 50, L4, L40; H100, H200


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, in elements; see the kernels for what each is.

    warps, stages  of the program and of its pipelined loops
    registers      that a thread may have; fewer let more programs share a multiprocessor
    row_tile       elements of a tile of hidden rows: rows x columns
    chunk          beams that are expanded together
    fanout, narrow  children of a beam in a tile of a dense and of a sparse level
    select, few    keys that are sorted together, and where there are few
    pairs, part    (beam, child) pairs of a sparse level at a time, and columns of theirs
    tokens, pool   of a tile of encoder states
    n, k           of products shared by a group of 16 rows
    n_dense, k_dense  of a dense level
    """

    warps: int
    stages: int
    registers: int
    row_tile: int
    chunk: int
    fanout: int
    narrow: int
    select: int
    few: int
    pairs: int
    part: int
    tokens: int
    pool: int
    n: int
    k: int
    n_dense: int
    k_dense: int


@dataclass(frozen=True)
class Row:
    """Tiles for half-precision or float32 weights up to these sizes."""

    half: bool
    max_hidden: int
    max_beams: int
    shared: int  # kilobytes of shared memory that the GPU offers a program, at least
    tiles: Tiles
    spills: str = ""  # why registers spill, where they do


# One line a row: its key, the numbers in the order of Tiles' fields, and why registers spill.
_TILES = """
weights  hidden beams shared   warps stages registers row_tile chunk fanout narrow select few pairs part tokens pool   n   k n_dense k_dense   spills
half        512    64    160       8      3       255     4096    64     64      8    512 128    64  128     32  128 128 128     128     128   scalars and 64-bit keys of all levels live at once
half      16384  1024    160       8      3       255     8192    64     64      8   1024 128    64  128     32  128 128  64      64      64   scalars and 64-bit keys of all levels live at once
float32   16384  1024    160       8      2       255     8192    64     64      8   1024 128    64   64     32   64  64  32      64      32   scalars and 64-bit keys of all levels live at once
half      16384  1024     99       8      3       255     4096    32     32      8   1024 128    32  128     32  128  64  64      64      64   scalars and 64-bit keys of all levels live at once
float32   16384  1024     99       8      2       255     4096    32     32      8   1024 128    32   64     32   64  64  32      64      32   scalars and 64-bit keys of all levels live at once
"""  # noqa: E501


def _parse(table: str) -> tuple[Row, ...]:
    """Rows of a table as text."""
    rows = []
    for line in table.strip().splitlines()[1:]:
        weights, *words = line.split()
        numbers = [int(word) for word in words[: 3 + len(dataclasses.fields(Tiles))]]
        reason = " ".join(words[len(numbers) :])
        hidden, beams, shared, *tiles = numbers
        rows.append(Row(weights == "half", hidden, beams, shared, Tiles(*tiles), reason))
    return tuple(rows)


TABLE = _parse(_TILES)

# Requests that a program groups, by (smallest batch per multiprocessor, group).
GROUPS: tuple[tuple[int, int], ...] = ((0, 1), (2, 2), (4, 4))


def choose_tiles(half: bool, hidden: int, beams: int, shared: int = MOST_SHARED) -> Tiles:
    """The first row of the table that fits; RuntimeError, as operators raise, where none does.

    shared: kilobytes of shared memory that the GPU offers a program.
    """
    for row in TABLE:
        fits = hidden <= row.max_hidden and beams <= row.max_beams and shared >= row.shared
        if row.half == half and fits:
            return row.tiles
    raise RuntimeError(
        f"hidden_dim and num_beams: expected up to {MAX_HIDDEN} and {MAX_BEAMS} live beams on a "
        f"GPU with {LEAST_SHARED} KB of shared memory, got {hidden} and {beams} ({shared} KB); use "
        "another backend"
    )


def choose_group(batch: int, multiprocessors: int) -> int:
    """Requests a program takes together: more share weights, fewer leave no multiprocessor idle."""
    group = 1
    for per_multiprocessor, size in GROUPS:
        if batch >= per_multiprocessor * multiprocessors:
            group = size
    return group


def print_table() -> None:
    """The table as text."""
    names = [field.name for field in dataclasses.fields(Tiles)]
    print(" ".join(f"{name:>10}" for name in ["weights", "hidden", "beams", "shared", *names]))
    for row in TABLE:
        cells = ["half" if row.half else "float32", row.max_hidden, row.max_beams, row.shared]
        print(
            " ".join(f"{cell:>10}" for cell in [*cells, *dataclasses.astuple(row.tiles)]),
            row.spills,
        )


if __name__ == "__main__":
    print_table()
