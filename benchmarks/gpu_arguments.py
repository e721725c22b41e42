"""The command line of bench_decode_gpu."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from bench_arguments import add_shared, changes_of, numbers, words
from decode_catalogues import BEAUTY, REAL
from gpu_options import AXES, Options
from gpu_participants import PEERS

from sidmlp_kernels.backends import DTYPES


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
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
    made.add_argument("--no-cpu", action="store_true", help="leave out our CPU backend")
    add_shared(made)
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
    choices = {
        "axes": AXES,
        "dtypes": tuple(DTYPES),
        "peers": (*PEERS, "none"),
        "catalogues": REAL,
    }
    sizes = ("batches", "base_batches", "items", "beams", "codes")
    changes = changes_of(args, choices, sizes)
    if "dtypes" in changes:
        changes["dtypes"] = tuple(DTYPES[word] for word in changes["dtypes"])
    if min(changes.get("beams", options.beams)) < options.k:
        raise ValueError(f"beams: expected at least k = {options.k}, got {changes['beams']}")
    for name, word in (("cold", "no_cold"), ("host_backend", "no_cpu")):
        if getattr(args, word):
            changes[name] = False
    return dataclasses.replace(options, **changes)
