"""The plain numpy layout: ``sequences.npz`` and, for ready-made IDs, ``semantic_ids.npz``."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np

from .interactions import Interactions


def load_arrays(directory: Path) -> Interactions:
    """Sequences of a directory with ``sequences.npz`` (items [n], offsets [users + 1]).

    Items are 0-based; where ``semantic_ids.npz`` is present it says how many there are. Titles come
    from ``item_text.jsonl.gz`` (a line an item, keys item_id and title) where present.
    """
    arrays = _read(directory / "sequences.npz")
    missing = {"items", "offsets"} - set(arrays)
    if missing:
        raise ValueError(
            f"{directory / 'sequences.npz'} lacks the array {sorted(missing)[0]!r}; it needs items "
            "(0-based, oldest first) and offsets (user u is items[offsets[u]:offsets[u+1]])"
        )
    items = arrays["items"]
    num_items = int(items.max()) + 1 if items.size else 0
    if (directory / "semantic_ids.npz").is_file():
        variants = _read(directory / "semantic_ids.npz")
        num_items = max(num_items, *(codes.shape[0] for codes in variants.values()))
    return Interactions(
        items=items,
        offsets=arrays["offsets"],
        item_ids=np.arange(num_items, dtype=np.int64),
        titles=_titles(directory / "item_text.jsonl.gz", num_items),
    )


def load_semantic_ids(directory: Path, variant: str) -> np.ndarray:
    """One variant of ``semantic_ids.npz``: codes int64 [num_items, L], 0-based per level.

    Raises ValueError that lists the variants when there is none of that name.
    """
    path = directory / "semantic_ids.npz"
    variants = _read(path)
    if variant not in variants:
        raise ValueError(f"{path} has no variant {variant!r}; it has {', '.join(sorted(variants))}")
    return variants[variant].astype(np.int64)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable numpy .npz file ({error})") from None


def _titles(path: Path, num_items: int) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    titles = [""] * num_items
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if 0 <= entry["item_id"] < num_items:
                titles[entry["item_id"]] = entry["title"]
    return tuple(titles)
