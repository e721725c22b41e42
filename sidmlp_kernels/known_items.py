"""Items that a history may contain: id -> codes, for any ids and without a Python loop.

What may be *recommended* is the catalogue's business; an item that left the catalogue still counts
in the histories of those who bought it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sidmlp_kernels.spec import MAX_CODES, MAX_LEVELS

Integers: TypeAlias = npt.ArrayLike | torch.Tensor
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]

# A table indexed by id costs 4 bytes an id, sorted ids cost 12 bytes an item.
_TABLE_IDS_PER_ITEM = 3


def as_array(value: Integers, name: str) -> npt.NDArray[Any]:
    """`value` as a numpy array that may share its memory; ValueError for ragged nested lists."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise ValueError(f"{name}: expected integers, got {value.dtype}; convert with .long()")
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected a regular array of integers, got one that numpy cannot take "
            f"({error}); give every row the same length"
        ) from error


def integer_array(value: Integers, name: str) -> IntArray:
    """`value` as an integer numpy array of any shape that may share its memory.

    Raises ValueError for floats, booleans and anything else that is not an integer.
    """
    array = as_array(value, name)
    if array.size == 0 and not hasattr(value, "dtype"):
        return array.astype(np.int64)  # numpy calls an empty list float64
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected integers, got dtype {array.dtype}; convert with .astype(numpy.int64)"
        )
    if isinstance(value, (list, tuple)) and hides_booleans(value, array):
        raise ValueError(
            f"{name}: expected integers, got booleans among them; "
            f"write 0 and 1 if numbers are meant"
        )
    return array


def hides_booleans(value: Any, array: npt.NDArray[Any]) -> bool:
    """Whether numpy has made 0 and 1 of booleans that stood among the integers of nested lists."""
    # Only a 0 or a 1 can have been one, so that few entries of most lists are looked at.
    small = (array >> 1) == 0
    if not small.any():
        return False
    for position in np.argwhere(small).tolist():
        entry = value
        for index in position:
            if isinstance(entry, (list, tuple)):  # an array among them has one dtype
                entry = entry[index]
        if getattr(entry, "dtype", type(entry)) in (bool, np.bool_, torch.bool):
            return True
    return False


def id_array(value: Integers, name: str) -> npt.NDArray[np.int64]:
    """`value` as int64 of any shape; ValueError for non-integers and ids of 2^63 and above."""
    array = integer_array(value, name)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected ids below 2^63, got {array.max()}; renumber the items")
    return array.astype(np.int64, copy=False)


def flag_array(value: Integers, name: str) -> npt.NDArray[np.uint8]:
    """`value`, booleans or 0 and 1, as uint8 of any shape; ValueError for anything else."""
    array = as_array(value, name)
    if array.size == 0:
        return np.zeros(array.shape, np.uint8)
    if array.dtype.kind not in "biu" or array.min() < 0 or array.max() > 1:
        got = (
            f"values {array.min()}..{array.max()}"
            if array.dtype.kind in "iu"
            else f"dtype {array.dtype}"
        )
        raise ValueError(
            f"{name}: expected booleans (or 0 and 1), got {got}; "
            f"pass True for what may be recommended and False for the rest"
        )
    return array.astype(np.uint8)


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array` itself, made read-only."""
    array.setflags(write=False)
    return array


def checked_codes(
    value: Integers,
    item_ids: npt.NDArray[np.int64],
    codes_per_level: Sequence[int],
    name: str = "codes",
) -> npt.NDArray[np.int16]:
    """A private int16 [N, L] copy of codes that all lie in 0..C_l-1.

    `item_ids` [N] names the item in the error. Raises ValueError for a wrong shape or dtype and for
    the first item with a code out of range.
    """
    codes = integer_array(value, name)
    if codes.ndim != 2 or codes.shape[1] != len(codes_per_level):
        raise ValueError(
            f"{name}: expected [items, {len(codes_per_level)}], one column per level, "
            f"got shape {list(codes.shape)}; pass codes of the same tokenizer"
        )
    bad = -1  # position of the first offender
    for level, size in enumerate(codes_per_level):
        column = codes[:, level]
        if len(column) and (column.min() < 0 or column.max() >= size):
            position = int(np.argmax((column < 0) | (column >= size)))
            if bad < 0 or position < bad:
                bad, bad_level = position, level
    if bad >= 0:
        raise ValueError(
            f"{name}: the code of item {item_ids[bad]} (position {bad}) at level {bad_level + 1} "
            f"is out of range: expected 0..{codes_per_level[bad_level] - 1}, "
            f"got {codes[bad, bad_level]}; correct the code or raise codes_per_level"
        )
    return frozen(np.array(codes, np.int16, order="C"))


def checked_item_ids(value: Integers, num_items: int, name: str) -> npt.NDArray[np.int64]:
    """A private int64 [N] copy of ids that are all >= 0 (-1 pads results); ValueError otherwise."""
    item_ids = id_array(value, name)
    if item_ids.shape != (num_items,):
        raise ValueError(
            f"{name}: expected one id per row of codes, shape [{num_items}], "
            f"got shape {list(item_ids.shape)}; pass them in the order of the codes"
        )
    if num_items and item_ids.min() < 0:
        position = int(np.argmax(item_ids < 0))
        raise ValueError(
            f"{name}: expected ids >= 0, since -1 pads results; got {item_ids[position]} at "
            f"position {position}; renumber the items"
        )
    return frozen(np.array(item_ids, np.int64))


class KnownItems:
    """Ids and codes of every item that a history may contain.

    item_ids int64 [M], all different and >= 0; codes int16 [M, L], 0-based per level. Immutable, so
    any number of threads may read it. Raises ValueError for duplicate ids, wrong shapes or dtypes.
    """

    def __init__(self, item_ids: Integers, codes: Integers) -> None:
        code_values = integer_array(codes, "codes")
        if code_values.ndim != 2 or not 1 <= code_values.shape[1] <= MAX_LEVELS:
            raise ValueError(
                f"codes: expected [items, levels] with 1..{MAX_LEVELS} levels, "
                f"got shape {list(code_values.shape)}; pass one row of codes per item"
            )
        ids = checked_item_ids(item_ids, len(code_values), "item_ids")
        limits = [MAX_CODES] * code_values.shape[1]
        self._set(ids, checked_codes(code_values, ids, limits), "item_ids")

    @classmethod
    def adopt(
        cls, item_ids: npt.NDArray[np.int64], codes: npt.NDArray[np.int16], name: str = "item_ids"
    ) -> KnownItems:
        """Takes over checked, read-only arrays without a copy; ValueError for duplicate ids."""
        known = cls.__new__(cls)
        known._set(item_ids, codes, name)
        return known

    def _set(
        self, item_ids: npt.NDArray[np.int64], codes: npt.NDArray[np.int16], name: str
    ) -> None:
        self._item_ids, self._codes = item_ids, codes
        # Three ways to find an id: it is its own position; a table by id; binary search.
        self._table: npt.NDArray[np.int32] | None = None
        self._sorted_ids: npt.NDArray[np.int64] | None = None
        self._order: npt.NDArray[np.int32] | None = None
        count = len(item_ids)
        if np.array_equal(item_ids, np.arange(count)):
            return
        positions = np.arange(count, dtype=np.int32)
        if int(item_ids.max()) < _TABLE_IDS_PER_ITEM * count:
            self._table = np.full(int(item_ids.max()) + 1, -1, np.int32)
            self._table[item_ids] = positions  # of equal ids the last stays
            repeated = self._table[item_ids] != positions
        else:
            self._order = np.argsort(item_ids, kind="stable").astype(np.int32)
            self._sorted_ids = item_ids[self._order]
            repeated = np.zeros(count, bool)
            repeated[self._order[:-1]] = self._sorted_ids[1:] == self._sorted_ids[:-1]
        if repeated.any():
            first = int(np.argmax(repeated))
            both = np.flatnonzero(item_ids == item_ids[first])[:2]
            raise ValueError(
                f"{name}: expected every id once, got id {item_ids[first]} at positions "
                f"{both[0]} and {both[1]}; remove or renumber one of them"
            )

    @property
    def item_ids(self) -> npt.NDArray[np.int64]:
        """Ids [M], read-only."""
        return self._item_ids

    @property
    def codes(self) -> npt.NDArray[np.int16]:
        """Codes [M, L] in the order of `item_ids`, read-only."""
        return self._codes

    @property
    def num_levels(self) -> int:
        """Code positions of an item, L."""
        return self._codes.shape[1]

    def __len__(self) -> int:
        return len(self._item_ids)

    def __repr__(self) -> str:
        return f"KnownItems({len(self)} items, {self.num_levels} levels)"

    @property
    def index(
        self,
    ) -> tuple[
        npt.NDArray[np.int32] | None, npt.NDArray[np.int64] | None, npt.NDArray[np.int32] | None
    ]:
        """How an id is found, for `place_requests`: a table of positions by id, or ids ascending
        and the position of each; all None where an id is its own position."""
        return self._table, self._sorted_ids, self._order

    def lookup(self, ids: Integers) -> npt.NDArray[np.int64]:
        """Positions int64 of `ids` in `item_ids` and `codes`, -1 where unknown; the shape of `ids`.

        Raises ValueError for ids that are not integers.
        """
        wanted = id_array(ids, "ids")
        if self._sorted_ids is not None:
            assert self._order is not None
            at = np.minimum(np.searchsorted(self._sorted_ids, wanted), len(self) - 1)
            return np.where(self._sorted_ids[at] == wanted, self._order[at], -1).astype(np.int64)
        size = len(self) if self._table is None else len(self._table)
        inside = (wanted >= 0) & (wanted < size)
        if self._table is None:
            return np.where(inside, wanted, -1)
        return np.where(inside, self._table[np.where(inside, wanted, 0)], -1).astype(np.int64)

    def merged(self, other: KnownItems) -> KnownItems:
        """The items of both: `other` first, in its order and with its codes, then the rest of self.

        Raises ValueError when the two differ in their number of levels.
        """
        if other.num_levels != self.num_levels:
            raise ValueError(
                f"merged: expected items of {self.num_levels} levels, got {other.num_levels}; "
                f"both must come from the same tokenizer"
            )
        only_here = other.lookup(self._item_ids) < 0
        if not only_here.any():
            return other
        return KnownItems.adopt(
            frozen(np.concatenate([other._item_ids, self._item_ids[only_here]])),
            frozen(np.concatenate([other._codes, self._codes[only_here]])),
        )
