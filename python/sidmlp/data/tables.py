"""Interactions from a CSV or JSON-lines file, an event a line: user, item, timestamp[, title]."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sidmlp.progress import lines_with_bar

from .interactions import Interactions

REQUIRED = ("user", "item", "timestamp")

_MANY = 1_000_000  # events that take more than a moment to sort

logger = logging.getLogger(__name__)


def load_table(path: Path) -> Interactions:
    """Reads ``.csv`` (header ``user,item,timestamp`` and optionally ``title``) or ``.jsonl``.

    Timestamps are numbers of any unit. Raises ValueError naming the line of the first bad event.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} must end in .csv or .jsonl, got {suffix or 'no ending'!r}")
    users, items, times = [], [], []
    titles: dict[str, str] = {}
    try:
        for number, row in _csv_rows(path) if suffix == ".csv" else _json_rows(path):
            for name in REQUIRED:
                if row.get(name) in (None, ""):
                    raise ValueError(f"{path}, line {number}: {name!r} is missing or empty")
            try:
                time = float(row["timestamp"])
            except ValueError:
                time = math.nan
            if not math.isfinite(time):
                raise ValueError(
                    f"{path}, line {number}: timestamp must be a finite number, got "
                    f"{row['timestamp']!r}"
                )
            users.append(row["user"])
            items.append(row["item"])
            times.append(time)
            if row.get("title"):
                titles.setdefault(row["item"], row["title"])
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; name a file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    if not users:
        raise ValueError(f"{path} holds no interaction; a line is one event of one user")
    if len(users) >= _MANY:
        logger.info("%s: sorting %s events", path.name, f"{len(users):,}")
    return Interactions.from_events(users, items, times, titles or None)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    return lines_with_bar(file, path.stat().st_size, path.name)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(_lines(file, path))
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(
                f"{path} needs a header line with user,item,timestamp[,title]; "
                f"{', '.join(missing)} is missing from {reader.fieldnames or 'an empty file'}"
            )
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + 1} is not CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number} must be an object like "
                    '{"user": "u1", "item": "i1", "timestamp": 1}'
                )
            yield number, {key: str(value) for key, value in row.items() if value is not None}
