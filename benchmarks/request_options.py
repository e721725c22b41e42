"""What bench_requests measures, how much effort it spends, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import parse_count
from gpu_options import Options
from request_inputs import HISTORIES, T5_SIZES

PEERS = ("compiled", "plain")
HOST_CALLS = {1: 300, 512: 100}  # batch -> calls from lists to lists


@dataclass(frozen=True)
class RequestOptions(Options):
    """Options of bench_decode_gpu with what requests have beside them.

    histories     of request_inputs
    peer_batches  where peers are compiled; at the others they run as they are
    host_calls    batch -> how many calls from lists to lists are timed
    """

    peers: tuple[str, ...] = PEERS
    batches: tuple[int, ...] = (512, 1, 32, 4096)  # the most important first
    histories: tuple[str, ...] = HISTORIES
    peer_batches: tuple[int, ...] = (1, 512)
    host_calls: dict[int, int] = field(default_factory=lambda: dict(HOST_CALLS))
    encoder_sizes: dict[str, Any] = field(default_factory=lambda: dict(T5_SIZES))
    cold: bool = False
    single_rounds: int = 100
    point_seconds: float = 1.0
    compile_seconds: float = 60.0
    seconds: float = 95.0


def on_gpu(options: RequestOptions) -> bool:
    """Whether a GPU is measured."""
    return torch.device(options.device).type != "cpu"


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [parse_count(word) for word in words(text)]  # noqa: E731
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--backends", type=words, help="default: cuda, and cpu with --device cpu")
    made.add_argument("--batches", type=numbers, help="default 512,1,32,4096; on the CPU 1,32")
    made.add_argument(
        "--peer-batches", type=numbers, help="where peers are compiled; default 1,512"
    )
    made.add_argument("--histories", type=words, help=f"of {','.join(HISTORIES)}; default both")
    made.add_argument("--peers", type=words, help=f"of {','.join(PEERS)}, or none; default both")
    made.add_argument("--no-energy", action="store_true", help="leave out joules and the power cap")
    made.add_argument("--compile-seconds", type=float, help="most to spend on compiling peers")
    made.add_argument("--seconds", type=float, help="begin no point after so many seconds")
    made.add_argument("--threads", type=int, help="of torch and our CPU backend; default all cores")
    made.add_argument("--data", type=Path, help="folder of the real catalogues and histories")
    made.add_argument("--out", type=Path, help="JSON file")
    made.add_argument("--commit", help="what is measured, where the tree is no git checkout")
    return made


def options_of(args: argparse.Namespace, backends: Sequence[str]) -> RequestOptions:
    """Checked options; ValueError names what is wrong."""
    options = RequestOptions(backends=tuple(backends), device=args.device)
    if args.device == "cpu":
        options = dataclasses.replace(
            options,
            dtypes=(torch.float32, torch.bfloat16),
            batches=(1, 32),
            peer_batches=(1, 32),
            host_calls={1: 300, 32: 100},
            energy=False,
            point_seconds=10.0,
            compile_seconds=600.0,
            seconds=1200.0,
        )
    changes: dict[str, Any] = {}
    for name, known in (("histories", HISTORIES), ("peers", (*PEERS, "none"))):
        given = getattr(args, name)
        if given is None:
            continue
        if not given or any(word not in known for word in given):
            raise ValueError(f"{name}: expected some of {sorted(known)}, got {given}")
        changes[name] = tuple(word for word in given if word != "none")
    for name in ("batches", "peer_batches"):
        given = getattr(args, name)
        if given is None:
            continue
        if (not given and name == "batches") or any(size < 1 for size in given):
            raise ValueError(f"{name}: expected sizes >= 1, got {given}")
        changes[name] = tuple(given)
    for name in ("data", "seconds", "compile_seconds"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    if args.no_energy:
        changes["energy"] = False
    return dataclasses.replace(options, **changes)
