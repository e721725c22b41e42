"""The command line of bench_decode_gpu."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import parse_count
from decode_catalogues import BEAUTY, REAL
from gpu_options import AXES, Options
from gpu_participants import PEERS

from sidmlp_kernels.backends import DTYPES


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [parse_count(word) for word in words(text)]  # noqa: E731
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="Beauty, batch 32 and 512, L2 warm")
    made.add_argument("--axes", type=words, help=f"of {','.join(AXES)}; default all, in that order")
    made.add_argument("--backends", type=words, help="e.g. cuda,triton; default: all that run here")
    made.add_argument("--dtypes", type=words, help="of the weights; default bfloat16")
    made.add_argument("--peers", type=words, help=f"of {','.join(PEERS)}, or none; default all")
    made.add_argument("--catalogues", type=words, help=f"of the axis batch: {','.join(REAL)}")
    made.add_argument("--batches", type=numbers, help="values of the axis batch")
    made.add_argument("--items", type=numbers, help="values of the axis items, e.g. 48k,20M")
    made.add_argument("--beams", type=numbers, help="values of the axis beams")
    made.add_argument("--codes", type=numbers, help="values of the axis codes")
    made.add_argument("--base-batches", type=numbers, help="of the other axes; default 32,512")
    made.add_argument("--no-cold", action="store_true", help="leave out the times with a cold L2")
    made.add_argument("--no-energy", action="store_true", help="leave out joules")
    made.add_argument("--no-cpu", action="store_true", help="leave out our CPU backend")
    made.add_argument("--compile-seconds", type=float, help="most to spend on compiling peers")
    made.add_argument("--seconds", type=float, help="begin no point after so many seconds")
    made.add_argument("--data", type=Path, help="folder of the real catalogues")
    made.add_argument("--out", type=Path, help="JSON file")
    made.add_argument("--commit", help="what is measured, where the tree is no git checkout")
    return made


def options_of(args: argparse.Namespace, backends: Sequence[str]) -> Options:
    """Checked options; ValueError names what is wrong."""
    options = Options(backends=tuple(backends))
    if args.quick:
        options = dataclasses.replace(
            options,
            quick=True,
            cold=False,
            energy=False,
            axes=("batch",),
            catalogues=(BEAUTY,),
            batches=(32, 512),
        )
    changes: dict[str, Any] = {}
    choices: tuple[tuple[str, Any], ...] = (
        ("axes", AXES),
        ("dtypes", DTYPES),
        ("peers", (*PEERS, "none")),
        ("catalogues", REAL),
    )
    for name, known in choices:
        given = getattr(args, name)
        if given is None:
            continue
        wrong = [word for word in given if word not in known]
        if wrong or not given:
            raise ValueError(f"{name}: expected some of {sorted(known)}, got {given}")
        changes[name] = tuple(word for word in given if word != "none")
    if "dtypes" in changes:
        changes["dtypes"] = tuple(DTYPES[word] for word in changes["dtypes"])
    for name in ("batches", "base_batches", "items", "beams", "codes"):
        given = getattr(args, name)
        if given is None:
            continue
        if not given or min(given) < 1:
            raise ValueError(f"{name}: expected sizes >= 1, got {given}")
        changes[name] = tuple(given)
    if min(changes.get("beams", options.beams)) < options.k:
        raise ValueError(f"beams: expected at least k = {options.k}, got {changes['beams']}")
    for name in ("data", "seconds", "compile_seconds"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    for name, word in (("cold", "no_cold"), ("energy", "no_energy"), ("host_backend", "no_cpu")):
        if getattr(args, word):
            changes[name] = False
    return dataclasses.replace(options, **changes)
