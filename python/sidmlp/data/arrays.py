"""The plain numpy layout: ``sequences.npz`` and, for ready-made IDs, ``semantic_ids.npz``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .interactions import Interactions
from .lines import flat_text, json_objects


def load_arrays(directory: Path) -> Interactions:
    """Sequences of a directory with ``sequences.npz`` (items [n], offsets [users + 1]).

    Items are 0-based; where ``semantic_ids.npz`` is present it says how many there are. Titles and
    texts come from ``item_text.jsonl.gz`` (a line an item, keys item_id, title and others) where
    present.
    """
    arrays = _read(directory / "sequences.npz")
    missing = {"items", "offsets"} - set(arrays)
    if missing:
        raise ValueError(
            f"{directory / 'sequences.npz'} lacks the array {sorted(missing)[0]!r}; it needs items "
            "(0-based, oldest first) and offsets (user u is items[offsets[u]:offsets[u+1]])"
        )
    items = arrays["items"]
    if not np.issubdtype(items.dtype, np.integer):
        raise ValueError(
            f"{directory / 'sequences.npz'}: items must be whole numbers from 0 up, got "
            f"{items.dtype}; number the items"
        )
    num_items = int(items.max()) + 1 if items.size else 0
    if (directory / "semantic_ids.npz").is_file():
        variants = _read_codes(directory / "semantic_ids.npz")
        num_items = max(num_items, *(codes.shape[0] for codes in variants.values()))
    titles, texts = _texts(directory / "item_text.jsonl.gz", num_items)
    return Interactions(
        items=items,
        offsets=arrays["offsets"],
        item_ids=np.arange(num_items, dtype=np.int64),
        titles=titles,
        texts=texts,
    )


def load_semantic_ids(directory: Path, variant: str) -> np.ndarray:
    """One variant of ``semantic_ids.npz``: codes int64 [num_items, L], 0-based per level.

    Raises ValueError that lists the variants when there is none of that name.
    """
    path = directory / "semantic_ids.npz"
    variants = _read_codes(path)
    if variant not in variants:
        raise ValueError(f"{path} has no variant {variant!r}; it has {', '.join(sorted(variants))}")
    return variants[variant].astype(np.int64)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable numpy .npz file ({error})") from None


def _read_codes(path: Path) -> dict[str, np.ndarray]:
    variants = _read(path)
    for name, codes in variants.items():
        if codes.ndim != 2 or not codes.size or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"{path}: {name}: expected whole numbers [items, levels], got {codes.dtype} "
                f"{list(codes.shape)}; leave other arrays out of this file"
            )
    return variants


def _texts(
    path: Path, num_items: int
) -> tuple[tuple[str, ...] | None, tuple[dict[str, str], ...] | None]:
    """Titles and further texts of all items; None and None without the file."""
    if not path.is_file():
        return None, None
    titles = [""] * num_items
    texts: list[dict[str, str]] = [{} for _ in range(num_items)]
    for number, entry in json_objects(path):
        item = entry.get("item_id")
        if type(item) is not int:
            raise ValueError(
                f"{path}, line {number}: expected item_id, a whole number, got {item!r}; items are "
                "numbered from 0 as in sequences.npz"
            )
        if 0 <= item < num_items:
            found = {name: flat_text(value) for name, value in entry.items() if name != "item_id"}
            titles[item] = found.pop("title", "")
            texts[item] = {name: text for name, text in found.items() if text}
    return tuple(titles), tuple(texts)
