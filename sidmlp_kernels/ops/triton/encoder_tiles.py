"""Tile sizes of the encoders: one table keyed by weights, width and GPU, as tiles.py is.

`python -m sidmlp_kernels.ops.triton.encoder_tiles` prints it. Nothing here knows the batch or the
length of requests, so that the bits of a request do not depend on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sidmlp_kernels.ops.triton.tiles import LEAST_SHARED, MOST_SHARED

MAX_DIM = 1024  # D, of which a program holds whole rows in registers
MAX_HEAD_DIM = 256
MAX_HEADS = 4096
MAX_HIDDEN = 16384  # of an MLP encoder, whose hidden rows lie in scratch memory
_HEAD_DIM = 64  # that `keys` is meant for; wider heads take fewer


@dataclass(frozen=True)
class EncoderTiles:
    """Sizes of tiles, in elements.

    warps, stages  of the program and of its pipelined loops
    rows           tokens that a program of encode_t5 takes through a layer
    role_rows      the same of encode_mlp: tokens of one role
    keys           that meet these rows at a time in attention
    hidden         columns of the feed-forward, or of an MLP's hidden layer, at a time
    inner          elements of a row of D that a product takes at a time
    columns        of queries, keys and values at a time, and inner elements of attention's output
    """

    warps: int
    stages: int
    rows: int
    role_rows: int
    keys: int
    hidden: int
    inner: int
    columns: int


@dataclass(frozen=True)
class EncoderRow:
    """Tiles for half-precision or float32 weights up to this (padded) width."""

    half: bool
    max_dim: int
    shared: int  # kilobytes of shared memory that the GPU offers a program, at least
    tiles: EncoderTiles
    spills: str = ""  # why registers spill, where they do


# A line is a row: its key, the numbers in the order of EncoderTiles' fields, why registers spill.
_TILES = """
weights   dim shared   warps stages rows role_rows keys hidden inner columns   spills
half      128    160       4      2   32        32   32     64   128      64
half      256    160       8      2   32        32   64     64   128      64
half     1024    160       8      2   16        16   32     32    64      32   whole rows of D in registers
float32   128    160       4      2   32        16   32     32    32      32   operands of float32 products in registers
float32  1024    160       8      1   16        16   32     16    32      16   operands of float32 products in registers
half      128     99       4      2   32        32   32     32   128      32
half     1024     99       8      2   16        16   32     16    64      16   whole rows of D in registers
float32  1024     99       8      1   16        16   16     16    32      16   operands of float32 products in registers
"""  # noqa: E501


def _parse(table: str) -> tuple[EncoderRow, ...]:
    rows = []
    for line in table.strip().splitlines()[1:]:
        weights, *words = line.split()
        numbers = words[: 2 + len(dataclasses.fields(EncoderTiles))]
        dim, shared, *tiles = map(int, numbers)
        reason = " ".join(words[len(numbers) :])
        rows.append(EncoderRow(weights == "half", dim, shared, EncoderTiles(*tiles), reason))
    return tuple(rows)


TABLE = _parse(_TILES)


def choose_encoder_tiles(
    half: bool, dim: int, head_dim: int = _HEAD_DIM, shared: int = MOST_SHARED
) -> EncoderTiles:
    """The first row of the table that fits; RuntimeError, as operators raise, where none does.

    dim, head_dim: padded. shared: kilobytes of shared memory that the GPU offers a program.
    """
    for row in TABLE:
        if row.half == half and dim <= row.max_dim and shared >= row.shared:
            tiles = row.tiles
            keys = tiles.keys * _HEAD_DIM // max(head_dim, _HEAD_DIM)
            return dataclasses.replace(tiles, keys=max(16, keys), inner=min(tiles.inner, dim))
    raise RuntimeError(
        f"dim: expected up to {MAX_DIM} on a GPU with {LEAST_SHARED} KB of shared memory, got "
        f"{dim} ({shared} KB); use another backend, or encoder_form='torch'"
    )


def print_table() -> None:
    """The table as text."""
    names = [field.name for field in dataclasses.fields(EncoderTiles)]
    print(" ".join(f"{name:>9}" for name in ["weights", "dim", "shared", *names]))
    for row in TABLE:
        cells = ["half" if row.half else "float32", row.max_dim, row.shared]
        numbers = [*cells, *dataclasses.astuple(row.tiles)]
        print(" ".join(f"{number:>9}" for number in numbers), row.spills)


if __name__ == "__main__":
    print_table()
