"""Lines of a text file that may be gzipped, with one sentence for every way it can be damaged."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sidmlp.progress import lines_with_bar


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, unpacked when the name ends in ``.gz``, behind a progress bar.

    Line ends are kept. Raises ValueError that names the file, and where reading stopped, when it is
    missing, a directory, cut off, no gzip data or not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            # How long the text of a gzip file is, nobody knows; 0 shows a count in place of a bar.
            size = 0 if path.suffix == ".gz" else path.stat().st_size
            for line in lines_with_bar(file, size, path.name):
                number += 1
                yield line
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; name one of the files in it") from None
    except EOFError:
        raise ValueError(
            f"{path} ends in the middle of its gzip data after line {number}; it was cut off, so "
            "fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or no gzip file after line {number} ({error}); fetch it again, or "
            "drop .gz from the name of a file that is not packed"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text after line {number} ({error}); convert it first"
        ) from None


def _open(path: Path) -> IO[str]:
    # Line ends are left alone: a quoted field of a CSV file may hold one.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def json_objects(path: Path, *, literals: bool = False) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of every line that is not blank.

    literals: lines may be Python literals, too. Raises ValueError naming the file and the line.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = _literal(line) if literals else None
            if row is None:
                reason = (
                    f"{error.msg} at column {error.colno}"
                    if isinstance(error, json.JSONDecodeError)
                    else error
                )
                raise ValueError(
                    f"{path}, line {number} is not JSON ({reason}); fetch the file again"
                ) from None
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{path}, line {number} must be an object in braces, got {type(row).__name__}; "
                "name a file as it is published"
            )
        yield number, row


def _literal(line: str) -> Any:
    """The value of a Python literal; None when the line is none."""
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def flat_text(value: Any) -> str:
    """One text without line breaks of a text, a number or a list of these; else empty."""
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(flat_text, value)))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return " ".join(str(value).split())
    return ""
