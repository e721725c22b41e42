"""Item vectors from item texts: TF-IDF of words, then a truncated SVD."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from sidmlp.data import Interactions

from .svd import truncated_svd

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")


def load_texts(
    path: Path, data: Interactions, fields: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The text of every dense item from a ``.jsonl`` or ``.jsonl.gz`` file, a line an item.

    Each line is an object with ``item_id`` (the id of ``data``, or its own key where those are not
    integers) and texts; ``fields`` says which, default all values that are strings or lists of
    strings. Items without a line get "", lines of items that are not in the data are passed over;
    both are counted in the log. Raises ValueError for a damaged line, for two lines of one item,
    for a field that no line has, and when no line belongs to the data.
    """
    keys = data.item_names if data.item_names is not None else map(str, data.item_ids.tolist())
    place = {key: item for item, key in enumerate(keys)}
    texts: dict[int, str] = {}
    seen: set[str] = set()
    unknown = 0
    for number, entry in _entries(path):
        item = place.get(str(entry["item_id"]))
        if item is None:
            unknown += 1
            continue
        if item in texts:
            raise ValueError(
                f"{path}, line {number}: item {entry['item_id']!r} occurs twice; keep one line"
            )
        seen.update(entry)
        chosen = [f for f in entry if f != "item_id"] if fields is None else fields
        texts[item] = " ".join(_words_of(entry.get(field)) for field in chosen)
    missing = sorted(set(fields or ()) - seen)
    if texts and missing:
        raise ValueError(
            f"{path}: no line has the field {missing[0]!r}; the fields are "
            f"{', '.join(sorted(seen - {'item_id'}))}"
        )
    if not texts:
        raise ValueError(
            f"{path}: expected lines with an item_id of the data, such as {next(iter(place), '')!r}"
            f", got {unknown} lines of other items; use the texts that belong to the data"
        )
    logger.info(
        "texts: %d of %d items have one, %d lines are of other items",
        len(texts),
        data.num_items,
        unknown,
    )
    return tuple(texts.get(item, "") for item in range(data.num_items))


def text_vectors(
    texts: Sequence[str], dim: int = 64, *, min_items: int = 2, seed: int = 0
) -> np.ndarray:
    """Item vectors float32 [N, dim] whose inner products approximate the texts' TF-IDF cosines.

    Words are runs of letters, digits and underscores in lower case that occur in at least
    ``min_items`` texts. Word w of
    text i weighs (1 + ln n_iw)(1 + ln((1 + N) / (1 + N_w))), n_iw times in the text and in N_w
    texts; rows have length 1. With X = U S V^T truncated to ``dim``, the vectors are U S. Texts
    without such a word get zeros. Raises ValueError when no text has one.
    """
    if not any(texts):
        raise ValueError("expected texts of items, all are empty; use other item vectors")
    logger.info("item vectors: TF-IDF of %d texts, then an SVD of width %d", len(texts), dim)
    bags = [Counter(WORD.findall(text.lower())) for text in texts]
    spread = Counter(word for bag in bags for word in bag)
    # Sorted, so that neither hashing nor the order of items decides which column a word gets.
    column = {w: c for c, w in enumerate(sorted(w for w, n in spread.items() if n >= min_items))}
    if not column:
        raise ValueError(
            f"no word is in {min_items} texts or more; use longer texts, or other item vectors"
        )
    rows: list[int] = []
    columns: list[int] = []
    weights: list[int] = []
    for number, bag in enumerate(bags):
        found = {column[word]: count for word, count in bag.items() if word in column}
        rows += [number] * len(found)
        columns += found.keys()
        weights += found.values()
    row, col = np.asarray(rows), np.asarray(columns)
    rarity = np.asarray([spread[word] for word in column], dtype=np.float64)
    rarity = 1 + np.log((1 + len(texts)) / (1 + rarity))
    values = (1 + np.log(np.asarray(weights, dtype=np.float64))) * rarity[col]
    values /= np.sqrt(np.bincount(row, weights=values**2, minlength=len(texts)))[row]
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([row, col])),
        torch.from_numpy(values),
        (len(texts), len(column)),
        check_invariants=True,
    ).coalesce()
    u, s = truncated_svd(matrix, dim, seed)
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    vectors[:, : s.numel()] = (u * s).numpy()
    return vectors


def _entries(path: Path) -> Iterable[tuple[int, dict]]:
    """Number and content of every line that is not blank."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                if not isinstance(entry, dict) or "item_id" not in entry:
                    raise ValueError("expected an object with the key item_id")
                yield number, entry
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable after line {max(number - 1, 0)} ({error}); "
            "write one JSON object a line"
        ) from None


def _words_of(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(_words_of(part) for part in value)
    return ""
