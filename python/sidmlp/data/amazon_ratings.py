"""Amazon's ratings files: .csv with a header, or without one and in either order of columns.

A file without a header starts with user,item (2014) or item,user (2018) and nothing but the look of
the ids says which. Reviewers are A and at least nine capitals and digits, products B and nine, or
the ten digits of a book.
"""

from __future__ import annotations

import csv
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lines import text_lines

logger = logging.getLogger(__name__)

Event = tuple[int, Any, Any, Any]  # line number, user, item, time

COLUMNS = ("user,item", "item,user")
REVIEWER = re.compile(r"(?:A|#oc-R)[0-9A-Z]{9,}")
PRODUCT = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
UNDECIDED = 10_000  # lines that are held back at most until one tells the order

_Rows = Iterable[tuple[int, list[str]]]


@dataclass(frozen=True)
class Names:
    """What a release calls things; of several names for the time the first present one counts."""

    user: str
    item: str
    times: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its ratings file."""
        return (self.user, self.item, "rating", self.times[0])


def rating_events(path: Path, names: Names, columns: str | None = None) -> Iterator[Event]:
    """The ratings of a .csv file, a line each.

    columns: one of COLUMNS, which a file without a header starts with; None: what the ids look
    like. Raises ValueError naming the file and line: for a line with too few or too many columns, a
    header without a column that is needed, ids that do not tell the order or contradict an earlier
    line, and `columns` for a file whose header says them.
    """
    if columns not in (None, *COLUMNS):
        raise ValueError(f"columns: expected {' or '.join(COLUMNS)}, got {columns!r}")
    reader = csv.reader(text_lines(path))
    rows = ((reader.line_num, row) for row in reader if row)
    try:
        first = next(rows, None)
        if first is None:
            return
        head = tuple(first[1])
        if not {names.user, names.item} & set(head):
            every = itertools.chain([first], rows)
            yield from _without_header(path, every, names, columns)
            return
        if columns is not None:
            raise ValueError(
                f"{path} has a header, which says what the columns are; leave --columns out"
            )
        user, item, time = _places(head, names, path)
        for number, row in rows:
            _check_width(path, number, row, head)
            yield number, row[user], row[item], row[time]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1} is not CSV ({error})") from None


def _without_header(path: Path, rows: _Rows, names: Names, columns: str | None) -> Iterator[Event]:
    held: list[tuple[int, list[str]]] = []
    user = None if columns is None else columns.split(",").index("user")
    told = 0  # the line that told the order
    for number, row in rows:
        _check_width(path, number, row, names.columns)
        if number == 1 and not _is_number(row[2]) and not _is_number(row[3]):
            raise ValueError(
                f"{path}, line 1: expected the header {','.join(names.columns)} or none, got "
                f"{','.join(row)}; delete that line, or is it a file of another release?"
            )
        if user is None:
            held.append((number, row))
            user = _user_column(row)
            if user is None:
                if len(held) == UNDECIDED:
                    break
                continue
            told = number
            logger.info("%s: no header; by line %d it is %s", path.name, told, COLUMNS[user])
            for earlier, kept in held:
                yield earlier, kept[user], kept[1 - user], kept[3]
            held = []
            continue
        # The second test is for few: nearly every product begins otherwise than a reviewer.
        if told and REVIEWER.fullmatch(row[1 - user]) and _user_column(row) == 1 - user:
            raise ValueError(
                f"{path}, line {number}: expected {COLUMNS[user]} as in line {told}, got "
                f"{row[0]!r} and {row[1]!r}, the other way round; say which is right with "
                f"--columns {COLUMNS[0]} or --columns {COLUMNS[1]}"
            )
        yield number, row[user], row[1 - user], row[3]
    if held:
        raise ValueError(
            f"{path} has no header, and its ids do not tell which column is the user: expected "
            "reviewers such as A2SUAM1J3GNN3B and products such as B00005N7P0, got "
            f"{held[0][1][0]!r} and {held[0][1][1]!r}; say it with --columns {COLUMNS[0]} or "
            f"--columns {COLUMNS[1]}"
        )


def _user_column(row: list[str]) -> int | None:
    """0 or 1, in which column the reviewer stands; None when the two do not tell."""
    for user in (0, 1):
        if REVIEWER.fullmatch(row[user]) and PRODUCT.fullmatch(row[1 - user]):
            return user
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_width(path: Path, number: int, row: list[str], columns: tuple[str, ...]) -> None:
    if len(row) != len(columns):
        raise ValueError(
            f"{path}, line {number}: expected {len(columns)} columns ({','.join(columns)}), got "
            f"{len(row)}; name a file as it is published"
        )


def _places(columns: tuple[str, ...], names: Names, path: Path) -> list[int]:
    """Where user, item and time stand under a header line."""
    if "history" in columns:
        raise ValueError(
            f"{path} is one part of a finished split, with a column of histories; name the "
            "rating_only file of the category, which has every event once"
        )
    time = next((name for name in names.times if name in columns), names.times[0])
    wanted = (names.user, names.item, time)
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{path}, line 1: expected the columns {','.join(wanted)}, {', '.join(missing)} is "
            f"missing from {','.join(columns)}; name a file as it is published"
        )
    return [columns.index(name) for name in wanted]
