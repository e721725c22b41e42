"""Who interacted with what, in order: the one form that loaders make and later steps read."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import read_json, write_atomically, write_json

TEXTS = "texts.jsonl.gz"  # of a saved directory; sidmlp.tokenizers.load_texts reads it

YEAR = re.compile(r" \(\d{4}\)$")


@dataclass(frozen=True)
class Interactions:
    """Item sequences of users, oldest first.

    items: int64 [interactions], dense item indices 0..num_items-1.
    offsets: int64 [num_users + 1]; user u is ``items[offsets[u]:offsets[u + 1]]``.
    item_ids: int64 [num_items], the id by which the world knows item i (unique).
    titles: text of item i, or None.
    item_names: the data's own item keys where those are not integers, or None.
    texts: further texts of item i by name (brand, description, ..), or None.
    """

    items: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    titles: tuple[str, ...] | None = None
    item_names: tuple[str, ...] | None = None
    texts: tuple[Mapping[str, str], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("items", "offsets", "item_ids"):
            array = getattr(self, name)
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"{name} must be a one-dimensional integer array, "
                    f"got {array.dtype} of shape {array.shape}"
                )
            object.__setattr__(self, name, np.ascontiguousarray(array, dtype=np.int64))
        offsets = self.offsets
        if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != self.items.size:
            raise ValueError(
                f"offsets must run from 0 to the number of interactions ({self.items.size}), "
                f"got {offsets[:1].tolist()}..{offsets[-1:].tolist()}"
            )
        if np.any(np.diff(offsets) < 0):
            raise ValueError("offsets must not descend; user u is items[offsets[u]:offsets[u+1]]")
        if self.items.size and (self.items.min() < 0 or self.items.max() >= self.num_items):
            raise ValueError(
                f"items must lie in 0..{self.num_items - 1} (one per item id), "
                f"got {self.items.min()}..{self.items.max()}"
            )
        if np.unique(self.item_ids).size != self.num_items:
            raise ValueError("item_ids must be unique; two items share an id")
        for name in ("titles", "item_names", "texts"):
            texts = getattr(self, name)
            if texts is not None and len(texts) != self.num_items:
                raise ValueError(f"{name} must have {self.num_items} entries, got {len(texts)}")

    @property
    def num_items(self) -> int:
        """Number of items of the catalogue, seen or not."""
        return int(self.item_ids.size)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return int(self.offsets.size - 1)

    def sequence(self, user: int) -> np.ndarray:
        """Dense item indices of one user, oldest first, int64 [length]."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def key(self, item: int) -> str:
        """What the data itself calls dense item ``item``."""
        return str(self.item_ids[item]) if self.item_names is None else self.item_names[item]

    def title(self, item: int) -> str:
        """Something to print for dense item ``item``: its title, else its key, else its id."""
        for texts in (self.titles, self.item_names):
            if texts is not None and texts[item]:
                return texts[item]
        return f"item {self.item_ids[item]}"

    def find(self, query: str) -> int:
        """Dense index of the item with this id, key or title (any case; a unique part is enough).

        A whole number is an id, never a title, where the data's own keys are numbers. A year in
        brackets at the end of a title may be left out.
        Raises ValueError when nothing or more than one item matches.
        """
        text = query.strip()
        if not text:
            raise ValueError("an item id or title must not be empty")
        if self.item_names is None and _is_item_id(text):
            hits = np.flatnonzero(self.item_ids == int(text))
            if not hits.size:
                raise ValueError(f"no item has the id {text}")
            return int(hits[0])
        lowered = text.lower()
        for texts in (self.item_names, self.titles):
            if texts is None:
                continue
            whole = [YEAR.sub("", text.lower()) for text in texts]
            exact = [i for i, text in enumerate(texts) if text.lower() == lowered]
            exact = exact or [i for i, text in enumerate(whole) if text == lowered]
            if len(exact) == 1:
                return exact[0]
            parts = exact or [i for i, name in enumerate(texts) if lowered in name.lower()]
            if len(parts) == 1:
                return parts[0]
            if parts:
                named = "; ".join(f"{self.item_ids[i]} = {texts[i]}" for i in parts[:5])
                raise ValueError(
                    f"{query!r} matches {len(parts)} items ({named}"
                    f"{'; ..' if len(parts) > 5 else ''}); give the id of the one that is meant"
                )
        raise ValueError(f"no item has the id or title {query!r}")

    def save(self, directory: Path) -> None:
        """Writes ``interactions.npz``, ``titles.json`` and, with texts, ``texts.jsonl.gz``."""

        def write(path: Path) -> None:
            np.savez_compressed(
                path, items=self.items, offsets=self.offsets, item_ids=self.item_ids
            )

        if self.texts is None:
            (directory / TEXTS).unlink(missing_ok=True)
        else:
            write_atomically(directory / TEXTS, self._write_texts)
        write_json(directory / "titles.json", {"titles": self.titles, "names": self.item_names})
        write_atomically(directory / "interactions.npz", write)

    def _write_texts(self, path: Path) -> None:
        """A line an item that has a text: item_id (its own key where it has one) and its texts."""
        assert self.texts is not None
        with gzip.open(path, "wt", encoding="utf-8") as lines:
            for item, texts in enumerate(self.texts):
                title = self.titles[item] if self.titles is not None else ""
                entry = ({"title": title} if title else {}) | dict(texts)
                if entry:
                    key = {"item_id": self.key(item)}
                    lines.write(json.dumps(key | entry, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Interactions:
        """Reads what ``save`` wrote, but for the texts, which only tokenizers want.

        Raises ValueError when a file is missing or damaged.
        """
        path = directory / "interactions.npz"
        try:
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in ("items", "offsets", "item_ids")}
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}); make it anew with `sidmlp data`"
            ) from None
        texts = read_json(directory / "titles.json")
        return cls(
            **arrays,
            titles=None if texts["titles"] is None else tuple(texts["titles"]),
            item_names=None if texts["names"] is None else tuple(texts["names"]),
        )

    @classmethod
    def from_events(
        cls,
        users: Sequence[str],
        items: Sequence[str],
        times: Sequence[float] | np.ndarray,
        titles: dict[str, str] | None = None,
    ) -> Interactions:
        """Groups events by user and sorts each user's by time.

        users, items: keys of equal length, one per event; times: sortable numbers.
        Events of one user at the same time keep the order they are given in. Users and items are
        numbered by first appearance; items that only ``titles`` names are not added.
        When every item key is a whole number >= 0 it becomes the item's id, else ids count from 0.
        Raises ValueError for unequal lengths, no event, or a time that is not finite.
        """
        if not len(users) == len(items) == len(times):
            raise ValueError(
                f"users, items and times must have one entry per event, "
                f"got {len(users)}, {len(items)} and {len(times)}"
            )
        if not len(users):
            raise ValueError("there is no interaction in the data")
        stamps = np.asarray(times, dtype=np.float64)
        if not np.isfinite(stamps).all():
            bad = int(np.flatnonzero(~np.isfinite(stamps))[0])
            raise ValueError(f"time of event {bad} is {stamps[bad]}; it must be a finite number")
        user_index, _ = _number(users)
        item_index, keys = _number(items)
        # lexsort is stable: equal users and times keep the order of the file.
        order = np.lexsort((stamps, user_index))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user_index))]).astype(np.int64)
        whole = all(_is_item_id(key) for key in keys)
        ids = np.asarray([int(key) for key in keys] if whole else range(len(keys)), dtype=np.int64)
        if np.unique(ids).size != ids.size:  # "7" and "07" are different keys of one number
            whole, ids = False, np.arange(len(keys), dtype=np.int64)
        return cls(
            items=item_index[order],
            offsets=offsets,
            item_ids=ids,
            titles=None if titles is None else tuple(titles.get(key, "") for key in keys),
            item_names=None if whole else tuple(keys),
        )


def _number(keys: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers keys by first appearance: (int64 [len(keys)], the distinct keys)."""
    numbers: dict[str, int] = {}
    index = np.fromiter(
        (numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64, count=len(keys)
    )
    return index, list(numbers)


def _is_item_id(key: str) -> bool:
    """Whether a key is a whole number that can serve as an id; negative ones cannot (-1 = none)."""
    return key.isascii() and key.isdigit() and len(key) <= 18
