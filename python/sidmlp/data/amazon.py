"""Amazon Reviews 2023 and 2014, from the files as they are published, gzipped or not.

2023 (Hou et al., Bridging Language and Items for Retrieval and Recommendation, 2024):
    <Category>.csv        header user_id,parent_asin,rating,timestamp (the rating_only files)
    <Category>.jsonl      a review a line: user_id, parent_asin, timestamp (in ms) and more
    meta_<Category>.jsonl a product a line: parent_asin, title and more
2014 (McAuley et al., Image-based Recommendations on Styles and Substitutes, 2015):
    ratings_<Category>.csv       no header; user,item,rating,timestamp
    reviews_<Category>[_5].json  a review a line: reviewerID, asin, unixReviewTime and more
    meta_<Category>.json         a product a line: asin, title and more, as Python literals

A review's own "title" (2023) is its headline, not the product's; titles come from the meta file.
"""

from __future__ import annotations

import ast
import csv
import json
import logging
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .core import first_of_each_pair, k_core
from .interactions import Interactions
from .lines import text_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Names:
    """What a release calls things; of several names for the time the first present one counts."""

    user: str
    item: str
    times: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its ratings file."""
        return (self.user, self.item, "rating", self.times[0])


NAMES = {
    2023: _Names("user_id", "parent_asin", ("timestamp", "sort_timestamp")),
    2014: _Names("reviewerID", "asin", ("unixReviewTime",)),
}

Event = tuple[int, Any, Any, Any]  # line number, user, item, time


def load_amazon(
    path: Path, release: int, *, meta: Path | None = None, min_count: int = 5
) -> Interactions:
    """Reads a category's ratings (.csv) or reviews (.json, .jsonl), each also as .gz.

    release: 2023 or 2014. meta: the product file, for titles. Of a user's several reviews of one
    product the earliest is kept; then users and products with fewer than ``min_count`` reviews are
    removed until none is left (5-core; 1 keeps all). Products are ``item_names``, numbered from 0.
    Raises ValueError naming the file, and the line of the first bad event.
    """
    names = NAMES.get(release)
    if names is None:
        raise ValueError(f"release: expected 2023 or 2014, got {release}; no others are read")
    users, items = _Numbers(), _Numbers()
    user_index, item_index, stamps = array("q"), array("q"), array("d")
    for number, user, item, time in _events(path, names):
        where = f"{path}, line {number}"
        for name, value in ((names.user, user), (names.item, item)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: {name} must be a text that is not empty, got {value!r}")
        user_index.append(users.of(user))
        item_index.append(items.of(item))
        stamps.append(_time(time, where, names.times[0]))
    if not stamps:
        raise ValueError(f"{path} holds no review; a line is one review")
    u, i, t = (np.asarray(values) for values in (user_index, item_index, stamps))
    kept = np.flatnonzero(first_of_each_pair(u, i, t))
    repeated = t.size - kept.size
    kept = kept[k_core(u[kept], i[kept], min_count)]
    logger.info(
        "%s: %s reviews, %s of them repeated, %s in the %d-core",
        *(path.name, f"{t.size:,}", f"{repeated:,}", f"{kept.size:,}", min_count),
    )
    if not kept.size:
        raise ValueError(
            f"{path} has no review left after removing users and products with fewer than "
            f"{min_count} reviews; lower the limit"
        )
    titles = None if meta is None else _titles(meta, names, {items.keys[j] for j in set(i[kept])})
    keys = [items.keys[j] for j in i[kept]]
    data = Interactions.from_events([users.keys[j] for j in u[kept]], keys, t[kept], titles)
    # Old product keys of books are digits with zeros in front, which numbers would lose.
    distinct = tuple(dict.fromkeys(keys))
    return replace(data, item_names=distinct, item_ids=np.arange(len(distinct)))


class _Numbers:
    """Numbers texts by first appearance, so that a large file is held as numbers."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._index: dict[str, int] = {}

    def of(self, key: str) -> int:
        number = self._index.setdefault(key, len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
        return number


def _time(value: Any, where: str, name: str) -> float:
    try:
        time = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        time = math.nan
    if not math.isfinite(time):
        raise ValueError(f"{where}: {name} must be a finite number, got {value!r}")
    return time


def _events(path: Path, names: _Names) -> Iterator[Event]:
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix
    if suffix == ".csv":
        return _csv_events(path, names)
    if suffix in (".json", ".jsonl"):
        return _json_events(path, names)
    raise ValueError(
        f"{path} must end in .csv, .json or .jsonl, or one of these and .gz, got {path.name!r}; "
        "name a ratings or reviews file as it is published"
    )


def _csv_events(path: Path, names: _Names) -> Iterator[Event]:
    reader = csv.reader(text_lines(path))
    columns = names.columns
    place = [0, 1, 3]
    try:
        for row in reader:
            if not row:
                continue
            if reader.line_num == 1 and names.user in row:
                columns = tuple(row)
                place = _places(columns, names, path)
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} columns "
                    f"({','.join(columns)}), got {len(row)}; name a file as it is published"
                )
            user, item, time = (row[column] for column in place)
            yield reader.line_num, user, item, time
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error})") from None


def _places(columns: tuple[str, ...], names: _Names, path: Path) -> list[int]:
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


def _json_events(path: Path, names: _Names) -> Iterator[Event]:
    for number, row in _objects(path, literals=False):
        time = next((row[name] for name in names.times if name in row), None)
        missing = [name for name in (names.user, names.item) if name not in row]
        missing += [names.times[0]] * (time is None)
        if missing:
            raise ValueError(
                f"{path}, line {number}: expected a review with {names.user}, {names.item} and "
                f"{names.times[0]}, {missing[0]} is missing; is it a file of another release?"
            )
        yield number, row[names.user], row[names.item], time


def _titles(path: Path, names: _Names, wanted: set[str]) -> dict[str, str]:
    """Titles of the wanted products; what the file does not name has none."""
    titles: dict[str, str] = {}
    for number, row in _objects(path, literals=True):
        if names.item not in row:
            raise ValueError(
                f"{path}, line {number}: expected a product with {names.item}, got "
                f"{', '.join(map(str, list(row)[:4])) or 'nothing'}; is it a file of another "
                "release?"
            )
        if row[names.item] in wanted and row.get("title"):
            titles[row[names.item]] = " ".join(str(row["title"]).split())
    return titles


def _objects(path: Path, *, literals: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of every line that is not blank; Python literals too where allowed."""
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = _literal(line) if literals else None
            if row is None:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}); "
                    "fetch the file again"
                ) from None
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{path}, line {number} must be an object in braces, got {type(row).__name__}; "
                "name a file as it is published"
            )
        yield number, row


def _literal(line: str) -> Any:
    """A line of the 2014 product files, which are Python literals; None when it is none."""
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
