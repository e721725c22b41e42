"""Semantic IDs made elsewhere: arrays, or JSON of item to codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sidmlp.data import Interactions
from sidmlp.data.files import read_json
from sidmlp.data.tokens import MAX_CODES

from .array_files import ARRAY_SUFFIXES, read_array


def load_codes(path: Path, data: Interactions, name: str | None = None) -> np.ndarray:
    """Codes int64 [num_items, levels], 0-based, of a file; row i is dense item i's.

    ``.npy``, ``.npz`` and ``.safetensors`` hold an array [num_items, levels], of several ``name``
    says which; ``.json`` holds an object of item id (or the data's own key) to a list of codes,
    entries of items that are not in the data are passed over.
    Raises ValueError that names the item when one has no codes, or bad ones.
    """
    if path.suffix == ".json":
        if name is not None:
            raise ValueError(f"{path} holds no arrays; leave out the name {name!r}")
        codes = _from_json(path, data)
    elif path.suffix in ARRAY_SUFFIXES:
        codes = read_array(path, name)
    else:
        known = ", ".join((".json", *ARRAY_SUFFIXES))
        raise ValueError(f"{path}: expected one of {known}, got {path.suffix!r}")
    if codes.ndim != 2 or codes.shape[0] != data.num_items or not codes.shape[1]:
        raise ValueError(
            f"{path}: expected one row of codes per item, [{data.num_items}, levels], "
            f"got shape {codes.shape}; use the IDs that belong to the data"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"{path}: expected whole numbers, got {codes.dtype}; convert them")
    if codes.size and codes.min() < 0:
        item = int(np.flatnonzero((codes < 0).any(axis=1))[0])
        raise ValueError(
            f"{path}: item {data.key(item)!r} has the codes {codes[item].tolist()}, expected "
            "codes from 0 up; subtract the vocabulary offset"
        )
    large = np.flatnonzero((codes >= MAX_CODES).any(axis=1))
    if large.size:
        raise ValueError(
            f"{path}: item {data.key(large[0])!r} has the codes {codes[large[0]].tolist()}, "
            f"expected codes up to {MAX_CODES - 1}, the largest that sidmlp_kernels loads; "
            "subtract the vocabulary offset of each level, or use smaller codebooks"
        )
    return codes.astype(np.int64)


def _from_json(path: Path, data: Interactions) -> np.ndarray:
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(
            f"{path}: expected an object of item to codes, got {type(entries).__name__}"
        )
    rows: list[list[int]] = []
    for item in range(data.num_items):
        key = data.key(item)
        codes = entries.get(key)
        if codes is None:
            raise ValueError(
                f"{path}: item {key!r} has no codes; add them, or leave the item out of the data"
            )
        # bool is an int to Python, and no code.
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise ValueError(f"{path}: item {key!r}: expected a list of codes, got {codes!r}")
        if len(codes) != len(rows[0] if rows else codes):
            raise ValueError(
                f"{path}: item {key!r} has {len(codes)} codes, {data.key(0)!r} has "
                f"{len(rows[0])}; every item needs the same number"
            )
        rows.append(codes)
    try:
        return np.asarray(rows, dtype=np.int64).reshape(data.num_items, -1)
    except OverflowError:
        raise ValueError(f"{path}: a code is too large for 64 bits; codes count from 0") from None
