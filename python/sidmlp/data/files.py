"""Small files written whole or not at all, and their fingerprints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary sibling of ``path`` and renames it into place afterwards.

    A reader sees the old file or the new one, never a part; a failed write leaves no trace. Raises
    OSError that names ``path`` when it cannot be written, as on a full disk.
    """
    # The suffix stays last: numpy appends ".npz" to names that lack it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Failures to write ``path`` become an OSError with a reason and this name, and say that what
    was there is kept; for writers that see to that."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "the disk is full or takes no more data"
        number = error.errno or errno.EIO
        room = number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        raise OSError(
            number,
            f"{reason}, so nothing was replaced; {'make room' if room else 'mend that'}, or write "
            "elsewhere, and run it again",
            str(path),
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises ValueError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and make it anew"
        ) from None


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
