"""The catalogue: which items may be recommended, their codes, and the trie that the kernels walk.

    codes [N, L], item ids [N]  ->  Catalogue  ->  CatalogueSnapshot  ->  trie tensors on a device

A Catalogue changes only in stock (`set_available`); each change publishes a new immutable snapshot
under a new version, so that a reader who took a snapshot never sees half of a change. A catalogue
with other items or codes is another Catalogue (see Recommender.swap). The file format is described
in sidmlp_kernels.catalogue_file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sidmlp_kernels.catalogue_file import read_catalogue_file, write_catalogue_file
from sidmlp_kernels.known_items import (
    Integers,
    KnownItems,
    checked_codes,
    checked_item_ids,
    flag_array,
    frozen,
    id_array,
    integer_array,
)
from sidmlp_kernels.spec import MAX_CODES, MAX_LEVELS, check_codes_per_level
from sidmlp_kernels.trie import CatalogueStatistics, CatalogueTrie, DeviceTensors

MAX_ITEMS = 2**31 - 1  # items and nodes are counted in int32

_version_lock = threading.Lock()
_last_version = 0


def _next_version() -> int:
    """1, 2, ..: unique and increasing over all catalogues of the process."""
    global _last_version
    with _version_lock:
        _last_version += 1
        return _last_version


@dataclass(frozen=True, eq=False)
class CatalogueSnapshot:
    """One version of a catalogue, never changing; any number of threads may read it.

    version          process-wide unique and increasing
    num_items        N, available or not
    codes_per_level  C_1..C_L
    known            every item that a history may contain; its first N positions are the catalogue
    trie             what all versions of one catalogue share
    leaf_available   uint8 [N] in leaf order, on the CPU
    """

    version: int
    num_items: int
    codes_per_level: tuple[int, ...]
    known: KnownItems
    trie: CatalogueTrie = field(repr=False)
    leaf_available: torch.Tensor = field(repr=False)
    _stock: DeviceTensors = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stock", DeviceTensors([self.leaf_available]))

    def trie_tensors(self, device: torch.device | str | int) -> list[torch.Tensor]:
        """The trie on `device` in the operators' order (see sidmlp_kernels.trie); do not write.

        Copied at most once to each device. All but the last, leaf_available, are the very tensors
        of this catalogue's other versions.
        """
        return [*self.trie.tensors(device), *self._stock.on(device)]

    def statistics(self) -> CatalogueStatistics:
        """Nodes and children of every level; computed once for all versions."""
        return self.trie.statistics()

    @property
    def available(self) -> npt.NDArray[np.bool_]:
        """Which items may be recommended, bool [N] in catalogue order, read-only."""
        in_leaf_order = self.leaf_available.numpy()
        return frozen(in_leaf_order[self.trie.leaf_slot].astype(bool))


class Catalogue:
    """Items that may be recommended, with their codes; made by `from_codes` or `load`.

    Any number of threads may read, and several may call `set_available`, at the same time.
    """

    def __init__(self, snapshot: CatalogueSnapshot) -> None:
        self._snapshot = snapshot
        self._write_lock = threading.Lock()

    @classmethod
    def from_codes(
        cls,
        codes: Integers,
        item_ids: Integers | None = None,
        codes_per_level: Sequence[int] | None = None,
        *,
        available: Integers | None = None,
        known_codes: Integers | None = None,
        known_item_ids: Integers | None = None,
    ) -> Catalogue:
        """Builds the catalogue of N items; numpy arrays, tensors and nested lists alike.

        codes [N, L], integers, 0-based per level: 0..C_l-1; several items may share their codes.
        item_ids [N], integers >= 0, all different; None: 0..N-1.
        codes_per_level: C_1..C_L; None: the largest code of each level plus one.
        available [N], booleans (or 0 and 1); None: all of them may be recommended.
        known_codes [M, L] and known_item_ids [M]: further items that histories may contain. They
        may repeat items of the catalogue with the same codes.

        Copies what it keeps. Raises ValueError for a code out of range (naming the item), an empty
        catalogue, duplicate ids, shapes that do not agree and values that are not integers.
        """
        code_values = integer_array(codes, "codes")
        if code_values.size == 0 and code_values.shape[:1] == (0,):
            raise ValueError(
                "codes: the catalogue is empty: expected at least 1 item, got 0; "
                "pass codes [items, levels]"
            )
        if code_values.ndim != 2 or not 1 <= code_values.shape[1] <= MAX_LEVELS:
            raise ValueError(
                f"codes: expected [items, levels] with 1..{MAX_LEVELS} levels, "
                f"got shape {list(code_values.shape)}; pass one row of codes per item"
            )
        num_items = len(code_values)
        if num_items > MAX_ITEMS:
            raise ValueError(
                f"codes: expected at most {MAX_ITEMS} items, got {num_items}; "
                f"split them over several catalogues"
            )
        if (known_codes is None) != (known_item_ids is None):
            raise ValueError(
                "known_codes and known_item_ids: expected both or none, got one; pass the other too"
            )
        extra_values = None
        if known_codes is not None:
            extra_values = integer_array(known_codes, "known_codes")
            if extra_values.ndim != 2 or extra_values.shape[1] != code_values.shape[1]:
                raise ValueError(
                    f"known_codes: expected [items, {code_values.shape[1]}], one column per level, "
                    f"got shape {list(extra_values.shape)}; pass codes of the same tokenizer"
                )
        if codes_per_level is None:
            sizes = _inferred_sizes(code_values, extra_values)
        else:
            sizes = _checked_sizes(codes_per_level, code_values.shape[1])

        if item_ids is None:
            ids = frozen(np.arange(num_items, dtype=np.int64))
        else:
            ids = checked_item_ids(item_ids, num_items, "item_ids")
        own_codes = checked_codes(code_values, ids, sizes)
        known = KnownItems.adopt(ids, own_codes)
        if extra_values is not None and known_item_ids is not None and len(extra_values):
            known = _with_further_items(known, extra_values, known_item_ids, sizes)

        trie = CatalogueTrie(own_codes, ids, sizes)
        leaf_available = np.ones(num_items, np.uint8)
        if available is not None:
            flags = flag_array(available, "available")
            if flags.shape != (num_items,):
                raise ValueError(
                    f"available: expected one flag per item, shape [{num_items}], "
                    f"got shape {list(flags.shape)}; pass them in the order of codes"
                )
            leaf_available[trie.leaf_slot] = flags
        return cls(
            CatalogueSnapshot(
                version=_next_version(),
                num_items=num_items,
                codes_per_level=sizes,
                known=known,
                trie=trie,
                leaf_available=torch.from_numpy(leaf_available),
            )
        )

    def snapshot(self) -> CatalogueSnapshot:
        """The present version; it stays as it is whatever happens to the catalogue."""
        return self._snapshot

    @property
    def version(self) -> int:
        """Of the present snapshot: unique in this process, and larger after every change."""
        return self._snapshot.version

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """C_1..C_L."""
        return self._snapshot.codes_per_level

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self._snapshot.codes_per_level)

    @property
    def num_items(self) -> int:
        """N, available or not."""
        return self._snapshot.num_items

    @property
    def item_ids(self) -> npt.NDArray[np.int64]:
        """Ids [N] in catalogue order, read-only."""
        return self._snapshot.known.item_ids[: self.num_items]

    @property
    def codes(self) -> npt.NDArray[np.int16]:
        """Codes [N, L] in catalogue order, read-only."""
        return self._snapshot.known.codes[: self.num_items]

    @property
    def available(self) -> npt.NDArray[np.bool_]:
        """Which items may be recommended now, bool [N] in catalogue order, read-only."""
        return self._snapshot.available

    def statistics(self) -> CatalogueStatistics:
        """Nodes and children of every level; `print` shows a table."""
        return self._snapshot.statistics()

    def __len__(self) -> int:
        return self.num_items

    def __repr__(self) -> str:
        return (
            f"Catalogue({self.num_items} items, codes_per_level={self.codes_per_level}, "
            f"version={self.version})"
        )

    def set_available(self, ids: Integers, available: Integers) -> None:
        """Takes items out of stock (False) or back into it (True) without a rebuild.

        ids: one id or a sequence of ids; available: one flag for all or one per id, booleans (or 0
        and 1). All change at once, in one new version; when every item is so already, nothing
        changes and the version stays. Of an id that stands there twice the last flag counts.
        Raises ValueError, and changes nothing, for an id that is not in the catalogue.
        """
        wanted = np.atleast_1d(id_array(ids, "ids"))
        flags = flag_array(available, "available")
        if wanted.ndim != 1 or (flags.ndim != 0 and flags.shape != wanted.shape):
            raise ValueError(
                f"set_available: expected a sequence of ids and one flag, or one flag per id; got "
                f"ids of shape {list(wanted.shape)} and flags of shape {list(flags.shape)}; "
                f"pass True or False for all of them, or as many flags as ids"
            )
        positions = self._snapshot.known.lookup(wanted)
        outside = (positions < 0) | (positions >= self.num_items)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"set_available: expected ids of this catalogue's {self.num_items} items, got "
                f"{wanted[at]} (position {at}); build a new catalogue with it and swap"
            )
        slots = self._snapshot.trie.leaf_slot[positions]
        with self._write_lock:  # two writers must not start from one snapshot
            current = self._snapshot
            before = current.leaf_available.numpy()
            after = before.copy()
            after[slots] = flags
            if np.array_equal(before[slots], after[slots]):
                return
            self._snapshot = CatalogueSnapshot(
                version=_next_version(),
                num_items=current.num_items,
                codes_per_level=current.codes_per_level,
                known=current.known,
                trie=current.trie,
                leaf_available=torch.from_numpy(after),
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the catalogue file; a file of that name is replaced at once or not at all.

        Raises OSError when the folder does not exist or cannot be written.
        """
        snapshot = self._snapshot
        known, num_items = snapshot.known, snapshot.num_items
        tensors: dict[str, npt.NDArray[Any]] = {
            "codes": known.codes[:num_items].astype(np.int32),
            "item_ids": known.item_ids[:num_items],
            "available": snapshot.available.astype(np.uint8),
        }
        if len(known) > num_items:
            tensors["known_codes"] = known.codes[num_items:].astype(np.int32)
            tensors["known_item_ids"] = known.item_ids[num_items:]
        write_catalogue_file(Path(path), tensors, snapshot.codes_per_level)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], codes_per_level: Sequence[int] | None = None
    ) -> Catalogue:
        """Reads a catalogue file, checking every name, shape, dtype and value, and its checksum.

        codes_per_level: C_1..C_L of the model; None: what the file says.
        Raises ValueError for a damaged file or one that contradicts `codes_per_level`, and
        FileNotFoundError for none.
        """
        path = Path(path)
        tensors, stored = read_catalogue_file(path)
        sizes = stored if codes_per_level is None else check_codes_per_level(codes_per_level)
        if stored is not None and sizes != stored:
            raise ValueError(
                f"{path}: expected codes_per_level {list(sizes or ())}, got {list(stored)}; "
                f"the catalogue belongs to another model"
            )
        try:
            return cls.from_codes(
                tensors["codes"],
                tensors["item_ids"],
                sizes,
                available=tensors["available"],
                known_codes=tensors.get("known_codes"),
                known_item_ids=tensors.get("known_item_ids"),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _checked_sizes(codes_per_level: Sequence[int], num_levels: int) -> tuple[int, ...]:
    if isinstance(codes_per_level, (np.ndarray, torch.Tensor)):
        codes_per_level = codes_per_level.tolist()
    sizes = check_codes_per_level(codes_per_level)
    if len(sizes) != num_levels:
        raise ValueError(
            f"codes_per_level: expected {num_levels} sizes, one per column of codes, "
            f"got {len(sizes)}; give every level its own, or None to take the largest codes"
        )
    return sizes


def _inferred_sizes(*codes: npt.NDArray[np.integer] | None) -> tuple[int, ...]:
    """Largest code of each level plus one, no more than a code can be; `checked_codes` follows."""
    largest = [
        [int(array[:, level].max()) for level in range(array.shape[1])]
        for array in codes
        if array is not None and array.ndim == 2 and len(array)
    ]
    return tuple(min(max(*of_level, 0) + 1, MAX_CODES) for of_level in zip(*largest, strict=False))


def _with_further_items(
    known: KnownItems, codes: npt.NDArray[np.integer], item_ids: Integers, sizes: tuple[int, ...]
) -> KnownItems:
    """The catalogue's items first, then the further ones; ValueError where codes disagree."""
    ids = checked_item_ids(item_ids, len(codes), "known_item_ids")
    further = KnownItems.adopt(
        ids, checked_codes(codes, ids, sizes, "known_codes"), "known_item_ids"
    )
    at = known.lookup(ids)
    differs = (at >= 0) & (known.codes[at] != further.codes).any(axis=1)
    if differs.any():
        position = int(np.argmax(differs))
        raise ValueError(
            f"known_codes: expected the codes {known.codes[at[position]].tolist()} that item "
            f"{ids[position]} has in the catalogue, got {further.codes[position].tolist()}; "
            f"give an item one tuple of codes"
        )
    return further.merged(known)
