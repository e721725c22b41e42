"""Candidates of tune_triton: changes of one row of the Triton backend's tile table.

A candidate says what differs from the row, {"warps": 4, "stages": 2}; "groups" replaces GROUPS,
which hold for all rows. The row as it is is {}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidmlp_kernels.ops.triton import tiles

Changes = dict[str, Any]

FIELDS = tuple(field.name for field in dataclasses.fields(tiles.Tiles))
MOST_GROUPED = 16  # requests are the rows of one tile
MIN_GAIN = 0.01  # a table is not rewritten for less

_TABLE_TEXT = re.compile(r'(?<=^_TILES = """\n).*?(?=^""")', re.DOTALL | re.MULTILINE)


def parse_vary(words: Sequence[str]) -> list[Changes]:
    """["warps=4,8", "stages=2,3"] -> all four combinations."""
    choices: dict[str, list[int]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name in choices or not re.fullmatch(r"\d+(,\d+)*", values):
            raise ValueError(
                f"vary: expected each field once with its values, as in warps=4,8, got {word!r}; "
                "a file of candidates may hold anything else"
            )
        choices[name] = [int(value) for value in values.split(",")]
    grid = itertools.product(*choices.values())
    return [dict(zip(choices, values, strict=True)) for values in grid]


def read_candidates(path: Path) -> list[Changes]:
    """The candidates of a JSON file; ValueError where it is no list of objects."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"candidates: expected a JSON file, got {path}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(changes, dict) for changes in found):
        raise ValueError(
            f'candidates: expected a list such as [{{"warps": 4}}, {{"stages": 2}}], got '
            f"{json.dumps(found)[:80]} in {path}"
        )
    return found


def checked(candidates: Sequence[Mapping[str, Any]], row: tiles.Row) -> list[Changes]:
    """What each changes in the row, without repetitions; ValueError names what is wrong."""
    groups = _groups(tiles.GROUPS)
    current = {**dataclasses.asdict(row.tiles), "groups": groups}
    found: list[Changes] = []
    for candidate in candidates:
        for name, value in candidate.items():
            if name not in current:
                raise ValueError(
                    f"candidates: expected fields of {sorted(current)}, got {name!r} in {candidate}"
                )
            if name == "groups":
                _check_groups(value)
            elif type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}")
        changes = {name: value for name, value in candidate.items() if value != current[name]}
        if changes and changes not in found:
            found.append(changes)
    if not found:
        raise ValueError("candidates: expected some that differ from the row, got none")
    return found


def _groups(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(pair) for pair in groups]


def _check_groups(value: Any) -> None:
    """That groups are those of GROUPS: from batch 0 on, both numbers ascending."""
    try:
        batches, sizes = zip(*((int(batch), int(size)) for batch, size in value), strict=True)
    except (TypeError, ValueError):
        batches, sizes = (), ()
    ascending = all(a < b for a, b in itertools.pairwise(batches))
    ascending = ascending and all(a < b for a, b in itertools.pairwise(sizes))
    if not ascending or batches[:1] != (0,) or not 1 <= sizes[0] <= sizes[-1] <= MOST_GROUPED:
        raise ValueError(
            f"groups: expected ascending [smallest batch per multiprocessor, group up to "
            f"{MOST_GROUPED}] from batch 0 on, such as {_groups(tiles.GROUPS)}, got {value!r}"
        )


def changed(row: tiles.Row, changes: Mapping[str, Any]) -> tiles.Tiles:
    """The row's tiles with the changes."""
    numbers = {name: value for name, value in changes.items() if name != "groups"}
    return dataclasses.replace(row.tiles, **numbers)


@contextlib.contextmanager
def applied(number: int, changes: Mapping[str, Any]) -> Iterator[None]:
    """Plans made and called inside take the changed row."""
    table, groups = tiles.TABLE, tiles.GROUPS
    row = dataclasses.replace(table[number], tiles=changed(table[number], changes))
    tiles.TABLE = (*table[:number], row, *table[number + 1 :])
    tiles.GROUPS = tuple((batch, size) for batch, size in changes.get("groups", groups))
    try:
        yield
    finally:
        tiles.TABLE, tiles.GROUPS = table, groups


def usual_sizes(number: int) -> tuple[int, int]:
    """Hidden width and beams to measure a row with: the published ones or the next that take it."""
    row = tiles.TABLE[number]
    widths = [*(512 << i for i in range(6)), row.max_hidden]
    for beams in (50, 256, row.max_beams):
        for hidden in widths:
            if hidden > tiles.MAX_HIDDEN:
                continue
            if tiles.choose_tiles(row.half, hidden, beams, row.shared) is row.tiles:
                return hidden, beams
    raise ValueError(f"row: expected one that some student takes, got {row}, hidden by those above")


def describe(changes: Mapping[str, Any]) -> str:
    """As on the command line: warps=4 stages=2."""
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "the row as it is"


def choose_best(measured: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The candidate with the smallest `relative_time`; None where it gains less than MIN_GAIN, or
    no more than the row as it is differs from itself."""
    rivals = [one for one in measured if one["changes"]]
    noise = [abs(1 - one["relative_time"]) for one in measured if not one["changes"]]
    best = min(rivals, key=lambda one: one["relative_time"], default=None)
    if best is None or 1 - best["relative_time"] <= max([MIN_GAIN, *noise]):
        return None
    return best


def rewritten(source: str, number: int, new: tiles.Tiles) -> str:
    """The text of tiles.py with the numbers of one row of its table replaced, column by column."""
    table = _TABLE_TEXT.search(source)
    lines = table[0].splitlines() if table else []
    names = [(word[0], word.end()) for word in re.finditer(r"\S+", lines[0] if lines else "")]
    names = names[: 4 + len(FIELDS)]  # words follow: why registers spill
    if tuple(name for name, _ in names[4:]) != FIELDS or number + 1 >= len(lines):
        raise ValueError(
            f"tiles.py: expected a table _TILES with the columns of Tiles and a row {number}, got "
            f"{lines[:1]} and {len(lines) - 1} rows; adapt `rewritten` to the new table"
        )
    line = lines[number + 1]
    first, last = names[3][1], names[-1][1]
    cells = ""
    for field, (_, begin), (_, end) in zip(FIELDS, names[3:], names[4:], strict=False):
        cell = f"{getattr(new, field):>{end - begin}}"
        if len(cell) > end - begin or not cell.startswith(" "):
            raise ValueError(f"{field}: expected a number that its column holds, got{cell!r}")
        cells += cell
    lines[number + 1] = line[:first] + cells + line[last:]
    assert table is not None
    return source[: table.start()] + "\n".join(lines) + "\n" + source[table.end() :]
