"""Arrays of many examples, computed batch by batch: in memory, or on disk shard by shard.

    NAME.npy        the rows of all examples, one example after another
    progress.json   {"key", "done": examples, "bytes": {NAME: size}}, after every shard
    features.json   key, in the place of progress.json when all examples are there

A shard is a fixed number of batches. Whatever ends the process, the next one with the same key goes
on behind the last complete shard, with the same batches, so that the arrays have the same bits as
if it had never ended. With another key they are made anew.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sidmlp.data.files import read_json, write_json
from sidmlp.progress import bar

from .memory import GIB, available_memory

SHARD_BATCHES = 16
DONE, PROGRESS = "features.json", "progress.json"

# (begin, end) -> rows [n, width] by name of the examples begin..end-1, in the arrays' dtype.
Make = Callable[[int, int], Mapping[str, np.ndarray]]


def make_in_memory(
    make: Make,
    shapes: Mapping[str, tuple[int, int]],
    dtype: np.dtype,
    examples: int,
    batch_size: int,
    label: str,
    progress: bool,
) -> dict[str, np.ndarray]:
    """All arrays; ValueError where they are larger than the memory that is available."""
    size, room = _bytes_of(shapes, dtype), available_memory()
    if size > room:
        raise ValueError(
            f"{label} take {size / GIB:.1f} GiB, {room / GIB:.1f} GiB of memory are available; "
            "name a directory for them, or take fewer examples"
        )
    arrays = {name: np.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    filled = dict.fromkeys(shapes, 0)
    for begin in bar(range(0, examples, batch_size), label, progress):
        for name, rows in make(begin, min(begin + batch_size, examples)).items():
            arrays[name][filled[name] : filled[name] + len(rows)] = rows
            filled[name] += len(rows)
    return arrays


def make_on_disk(
    make: Make,
    shapes: Mapping[str, tuple[int, int]],
    dtype: np.dtype,
    examples: int,
    batch_size: int,
    label: str,
    progress: bool,
    *,
    directory: Path,
    key: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """All arrays, memory-mapped; those that are there are read, those that are not are computed.

    Raises OSError that says what is kept and what to do where ``directory`` takes no more.
    """
    key = {**key, "examples": examples, "batch_size": batch_size}
    if _json(directory / DONE) != key:
        begin = _done(directory, key)
        shard = SHARD_BATCHES * batch_size
        # The bar counts whole shards, as they are what is kept.
        work = range(begin, examples, shard)
        with _write_errors(directory, examples), ExitStack() as stack:
            files = _open(stack, directory, key, shapes, dtype)
            for first in bar(work, f"{label}, shards", progress):
                last = min(first + shard, examples)
                for batch in range(first, last, batch_size):
                    for name, rows in make(batch, min(batch + batch_size, last)).items():
                        files[name].write(np.ascontiguousarray(rows, dtype=dtype).data)
                _keep(directory, key, files, last)
            write_json(directory / DONE, key)
        (directory / PROGRESS).unlink(missing_ok=True)
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in shapes}


def _open(
    stack: ExitStack,
    directory: Path,
    key: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    dtype: np.dtype,
) -> dict[str, BinaryIO]:
    """The arrays' files, cut behind the last complete shard, with room for what is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DONE).unlink(missing_ok=True)
    state = _json(directory / PROGRESS) if _done(directory, key) else {}
    headers = {name: _header(shape, dtype) for name, shape in shapes.items()}
    kept = {name: state.get("bytes", {}).get(name, len(head)) for name, head in headers.items()}
    files = {}
    for name, header in headers.items():
        path = directory / f"{name}.npy"
        file = stack.enter_context(path.open("r+b" if state else "wb"))
        if not state:
            file.write(header)
        file.truncate(kept[name])
        file.seek(kept[name])
        files[name] = file
    # Found out now rather than after an hour of computing.
    missing = _bytes_of(shapes, dtype) - sum(kept.values())
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise _Full(missing, free)
    return files


class _Full(OSError):
    def __init__(self, missing: int, free: int) -> None:
        needs = f"{missing / GIB:.2f} GiB more are needed, {free / GIB:.2f} GiB are free"
        super().__init__(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {needs}")


def _keep(
    directory: Path, key: Mapping[str, Any], files: Mapping[str, BinaryIO], done: int
) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    sizes = {name: file.tell() for name, file in files.items()}
    write_json(directory / PROGRESS, {"key": dict(key), "done": done, "bytes": sizes})


def _done(directory: Path, key: Mapping[str, Any]) -> int:
    """How many examples of this key are there already."""
    state = _json(directory / PROGRESS)
    if not isinstance(state, dict) or state.get("key") != key:
        return 0
    for name, size in state["bytes"].items():
        path = directory / f"{name}.npy"
        if not path.is_file() or path.stat().st_size < size:
            return 0
    return int(state["done"])


@contextmanager
def _write_errors(directory: Path, examples: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        reason = error.strerror if isinstance(error, _Full) else os.strerror(number)
        done = (_json(directory / PROGRESS) or {}).get("done", 0)
        raise OSError(
            number,
            f"{reason}; {done:,} of {examples:,} examples are kept; make room, or let it be a link "
            "to a larger disk, and run the same again",
            str(directory),
        ) from None


def _json(path: Path) -> Any:
    """None where there is no such file, or a damaged one."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _bytes_of(shapes: Mapping[str, tuple[int, int]], dtype: np.dtype) -> int:
    return sum(rows * width for rows, width in shapes.values()) * np.dtype(dtype).itemsize
