"""Amazon Reviews 2023 and 2014, from the files as they are published, gzipped or not.

2023 (Hou et al., Bridging Language and Items for Retrieval and Recommendation, 2024):
    <Category>.csv        header user_id,parent_asin,rating,timestamp (the rating_only files)
    <Category>.jsonl      a review a line: user_id, parent_asin, timestamp (in ms) and more
    meta_<Category>.jsonl a product a line: parent_asin, title and more
2014 (McAuley et al., Image-based Recommendations on Styles and Substitutes, 2015):
    ratings_<Category>.csv       no header; user,item,rating,timestamp
    reviews_<Category>[_5].json  a review a line: reviewerID, asin, unixReviewTime and more
    meta_<Category>.json         a product a line: asin, title and more, as Python literals
2018 (Ni et al., Justifying Recommendations using Distantly-Labeled Reviews, 2019) has the names of
2014, and is read as that:
    <Category>.csv        no header; item,user,rating,timestamp: the other way round
    <Category>[_5].json, meta_<Category>.json   as in 2014, the products as JSON

A review's own "title" (2023) is its headline, not the product's; titles come from the meta file.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .amazon_products import product_texts
from .amazon_ratings import Event, Names, rating_events
from .core import first_of_each_pair, k_core
from .interactions import Interactions
from .lines import json_objects

logger = logging.getLogger(__name__)

NAMES = {
    2023: Names("user_id", "parent_asin", ("timestamp", "sort_timestamp")),
    2014: Names("reviewerID", "asin", ("unixReviewTime",)),
}


def load_amazon(
    path: Path,
    release: int,
    *,
    meta: Path | None = None,
    min_count: int = 5,
    columns: str | None = None,
) -> Interactions:
    """Reads a category's ratings (.csv) or reviews (.json, .jsonl), each also as .gz.

    release: 2023, or 2014, whose names 2018 has. meta: the product file, for ``titles`` and
    ``texts``. columns: "user,item" or "item,user", the first columns of a .csv without a header;
    None: by the look of the ids. Of a user's several reviews of one product the earliest is kept;
    then users and products with fewer than ``min_count`` reviews are removed until none is left
    (5-core; 1 keeps all). Products are ``item_names``, numbered from 0.
    Raises ValueError naming the file, and the line of the first bad event.
    """
    names = NAMES.get(release)
    if names is None:
        raise ValueError(
            f"release: expected 2023 or 2014, got {release}; the files of 2018 are read as 2014"
        )
    users, items = _Numbers(), _Numbers()
    user_index, item_index, stamps = array("q"), array("q"), array("d")
    for number, user, item, time in _events(path, names, columns):
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
    keys = [items.keys[j] for j in i[kept]]
    # Old product keys of books are digits with zeros in front, which numbers would lose.
    distinct = tuple(dict.fromkeys(keys))
    texts = None if meta is None else product_texts(meta, names.item, distinct)
    titles = None if texts is None else tuple(text.pop("title", "") for text in texts)
    data = Interactions.from_events([users.keys[j] for j in u[kept]], keys, t[kept])
    ids = np.arange(len(distinct))
    return replace(data, item_names=distinct, item_ids=ids, titles=titles, texts=texts)


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


def _events(path: Path, names: Names, columns: str | None) -> Iterator[Event]:
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix
    if suffix == ".csv":
        return rating_events(path, names, columns)
    if suffix in (".json", ".jsonl"):
        if columns is not None:
            raise ValueError(f"{path} has no columns, its reviews name everything; leave them out")
        return _json_events(path, names)
    raise ValueError(
        f"{path} must end in .csv, .json or .jsonl, or one of these and .gz, got {path.name!r}; "
        "name a ratings or reviews file as it is published"
    )


def _json_events(path: Path, names: Names) -> Iterator[Event]:
    for number, row in json_objects(path):
        time = next((row[name] for name in names.times if name in row), None)
        missing = [name for name in (names.user, names.item) if name not in row]
        missing += [names.times[0]] * (time is None)
        if missing:
            raise ValueError(
                f"{path}, line {number}: expected a review with {names.user}, {names.item} and "
                f"{names.times[0]}, {missing[0]} is missing; is it a file of another release?"
            )
        yield number, row[names.user], row[names.item], time
