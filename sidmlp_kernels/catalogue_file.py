"""The catalogue's file: one safetensors file, checked when read and replaced at once when written.

    codes           int32 [N, L]   0-based per level
    item_ids        int64 [N]
    available       uint8 [N]      0 or 1
    known_codes     int32 [M, L]   items that histories may contain but that are never recommended;
    known_item_ids  int64 [M]      both tensors or none

Metadata entries, both optional: `codes_per_level`, a JSON list of C_1..C_L, and `sha256` over that
list as it stands there and the names, dtypes, shapes and bytes of the tensors in the order of their
names. A catalogue inside a checkpoint may do without, since config.json has its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sidmlp_kernels.spec import check_codes_per_level

# Name -> dtype as safetensors spells it, dimensions.
_TENSORS = {"codes": ("I32", 2), "item_ids": ("I64", 1), "available": ("U8", 1)}
_KNOWN_TENSORS = {"known_codes": ("I32", 2), "known_item_ids": ("I64", 1)}


def read_catalogue_file(path: Path) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...] | None]:
    """The tensors by name, and codes_per_level if the file states it.

    Raises FileNotFoundError for no file; ValueError for a damaged one and for names, dtypes or
    dimensions other than the above.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a catalogue file (safetensors), found none")
    try:
        with safe_open(path, framework="numpy") as file:
            _check_names(path, file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got a damaged one ({error}); "
            f"write or download it again"
        ) from error
    _check_sum(path, tensors, metadata)
    return tensors, _stored_sizes(path, metadata)


def write_catalogue_file(
    path: Path, tensors: Mapping[str, npt.NDArray[Any]], codes_per_level: Sequence[int]
) -> None:
    """Writes a temporary sibling and renames it, so that a reader sees the old file or the new."""
    metadata = {"codes_per_level": json.dumps(list(codes_per_level))}
    metadata["sha256"] = _sha256(tensors, metadata["codes_per_level"])
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:  # to learn the mode that the umask gives
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        # save_file replaces the file by one that only its owner may read.
        save_file(dict(tensors), temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_names(path: Path, file: Any) -> None:
    names = set(file.keys())
    expected = dict(_TENSORS)
    if names & set(_KNOWN_TENSORS):
        expected |= _KNOWN_TENSORS
    if names != set(expected):
        raise ValueError(
            f"{path}: expected the tensors {sorted(expected)}, got {sorted(names)}; "
            f"write the file with Catalogue.save or sidmlp export"
        )
    for name, (dtype, dimensions) in expected.items():
        tensor = file.get_slice(name)
        if tensor.get_dtype() != dtype or len(tensor.get_shape()) != dimensions:
            raise ValueError(
                f"{path}: {name}: expected {dtype} with {dimensions} dimensions, "
                f"got {tensor.get_dtype()} {tensor.get_shape()}; "
                f"write the file with Catalogue.save or sidmlp export"
            )


def _sha256(tensors: Mapping[str, npt.NDArray[Any]], codes_per_level: str) -> str:
    digest = hashlib.sha256(codes_per_level.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _check_sum(
    path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    if "sha256" not in metadata:
        return
    got = _sha256(tensors, metadata.get("codes_per_level", ""))
    if got != metadata["sha256"]:
        raise ValueError(
            f"{path}: expected sha256 {metadata['sha256']} of the tensors, got {got}, so the file "
            f"is damaged or altered; write or download it again"
        )


def _stored_sizes(path: Path, metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    if "codes_per_level" not in metadata:
        return None
    try:
        return check_codes_per_level(json.loads(metadata["codes_per_level"]))
    except ValueError as error:  # json.JSONDecodeError is one
        raise ValueError(f"{path}: metadata entry codes_per_level: {error}") from error
