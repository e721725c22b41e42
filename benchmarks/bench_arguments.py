"""What the command lines of bench_decode_gpu and bench_requests have in common."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import parse_count

GIVEN = ("data", "seconds", "compile_seconds")  # options that are taken over as they are


def words(text: str) -> list[str]:
    """a,b -> [a, b]."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """1,4k -> [1, 4000]."""
    return [parse_count(word) for word in words(text)]


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Effort, data and the file to write."""
    parser.add_argument("--no-energy", action="store_true", help="leave out joules and power")
    parser.add_argument("--compile-seconds", type=float, help="most to spend on compiling peers")
    parser.add_argument("--seconds", type=float, help="begin no point after so many seconds")
    parser.add_argument("--data", type=Path, help="folder of the real catalogues and histories")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="what is measured, where the tree is no git checkout")


def changes_of(
    args: argparse.Namespace,
    choices: Mapping[str, Collection[str]],
    sizes: Sequence[str],
    may_be_empty: Sequence[str] = (),
) -> dict[str, Any]:
    """Options that were given, by name; ValueError names what is wrong.

    choices       name -> the words to choose from; "none" means none of them
    sizes         names of sequences of sizes >= 1, of which some may be empty
    """
    changes: dict[str, Any] = {}
    for name, known in choices.items():
        given = getattr(args, name)
        if given is None:
            continue
        if not given or any(word not in known for word in given):
            raise ValueError(f"{name}: expected some of {sorted(known)}, got {given}")
        changes[name] = tuple(word for word in given if word != "none")
    for name in sizes:
        given = getattr(args, name)
        if given is None:
            continue
        if (not given and name not in may_be_empty) or any(size < 1 for size in given):
            raise ValueError(f"{name}: expected sizes >= 1, got {given}")
        changes[name] = tuple(given)
    changes |= {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    if args.no_energy:
        changes["energy"] = False
    return changes
