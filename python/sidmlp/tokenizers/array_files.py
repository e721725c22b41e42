"""One array of a ``.npy``, ``.npz`` or ``.safetensors`` file; nothing in it is executed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")


def read_array(path: Path, name: str | None = None) -> np.ndarray:
    """The array ``name`` of a file; None: the only one. bfloat16 becomes float32.

    Raises ValueError when the file is missing or damaged, when it has no array of that name, or
    several and no name is given.
    """
    readers = dict(zip(ARRAY_SUFFIXES, (_npy, _npz, _safetensors), strict=True))
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected one of {', '.join(readers)}, got {path.suffix!r}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return readers[path.suffix](path, name)
    except (OSError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a readable {path.suffix} file ({error}); make it anew"
        ) from None


def _npy(path: Path, name: str | None) -> np.ndarray:
    if name is not None:
        raise ValueError(f"{path} holds one array without a name; leave out the name {name!r}")
    return _of_numpy(np.load, path, allow_pickle=False)


def _npz(path: Path, name: str | None) -> np.ndarray:
    with _of_numpy(np.load, path, allow_pickle=False) as archive:
        return _of_numpy(archive.__getitem__, _choose(path, archive.files, name))


def _of_numpy(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except ValueError as error:  # numpy's word for damage and for pickled objects
        raise OSError(str(error)) from None


def _safetensors(path: Path, name: str | None) -> np.ndarray:
    with safe_open(path, framework="pt") as archive:
        tensor = archive.get_tensor(_choose(path, list(archive.keys()), name))
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _choose(path: Path, names: list[str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    held = ", ".join(sorted(names)) or "nothing"
    if name is None:
        raise ValueError(f"{path}: expected one array, it holds {held}; say which one is meant")
    if name not in names:
        raise ValueError(f"{path} has no array {name!r}; it holds {held}")
    return name
