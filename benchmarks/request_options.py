"""What bench_requests measures, how much effort it spends, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_arguments import add_shared, changes_of, numbers, words
from gpu_options import Options
from request_inputs import HISTORIES, MAX_ITEMS, MLP_SIZES, T5_SIZES

PEERS = ("compiled", "plain")
HOST_CALLS = {1: 300, 512: 100}  # batch -> calls from lists to lists
LONG_TOKENS, LONG_DIM = 1000, 256


@dataclass(frozen=True)
class RequestOptions(Options):
    """Options of bench_decode_gpu with what requests have beside them.

    histories     of request_inputs
    peer_batches  where peers are compiled; at the others they run as they are
    host_calls    batch -> how many calls from lists to lists are timed
    long_*        of the point of long inputs, see `long_options`
    mlp_*         of SID-MLP++'s encoder, see `mlp_options`
    """

    peers: tuple[str, ...] = PEERS
    batches: tuple[int, ...] = (512, 1, 32, 4096)  # the most important first
    histories: tuple[str, ...] = HISTORIES
    peer_batches: tuple[int, ...] = (1, 512)
    host_calls: dict[int, int] = field(default_factory=lambda: dict(HOST_CALLS))
    encoder_sizes: dict[str, Any] = field(default_factory=lambda: dict(T5_SIZES))
    long_batches: tuple[int, ...] = (32, 1)
    long_peer_batches: tuple[int, ...] = (32,)
    mlp_batches: tuple[int, ...] = (512, 1)
    mlp_peer_batches: tuple[int, ...] = (512,)
    max_items: int = MAX_ITEMS
    cold: bool = False
    single_rounds: int = 100
    point_seconds: float = 1.0
    compile_seconds: float = 60.0
    seconds: float = 95.0


def long_options(options: RequestOptions) -> RequestOptions:
    """Requests of 1,000 tokens for an encoder and a student of width 256."""
    return dataclasses.replace(
        options,
        histories=("long",),
        batches=options.long_batches,
        peer_batches=options.long_peer_batches,
        host_calls={},
        sizes={**options.sizes, "dim": LONG_DIM},
        encoder_sizes={**options.encoder_sizes, "dim": LONG_DIM},
        tokens=LONG_TOKENS,
        max_items=(LONG_TOKENS - 2) // len(options.sizes["codes_per_level"]),
    )


def mlp_options(options: RequestOptions) -> RequestOptions:
    """SID-MLP++: full histories, its own encoder, the same student."""
    return dataclasses.replace(
        options,
        histories=("mlp",),
        batches=options.mlp_batches,
        peer_batches=options.mlp_peer_batches,
        host_calls={},
        encoder_sizes={**MLP_SIZES, "dim": options.sizes["dim"]},
    )


# Settings with an encoder of their own, by the name of their histories.
OTHER_SETTINGS = {"long": long_options, "mlp": mlp_options}


def on_gpu(options: RequestOptions) -> bool:
    """Whether a GPU is measured."""
    return torch.device(options.device).type != "cpu"


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--backends", type=words, help="default: cuda, and cpu with --device cpu")
    made.add_argument("--batches", type=numbers, help="default 512,1,32,4096; on the CPU 1,32")
    made.add_argument(
        "--peer-batches", type=numbers, help="where peers are compiled; default 1,512"
    )
    made.add_argument(
        "--long-batches", type=numbers, help="of requests of 1,000 tokens; default 32,1, or empty"
    )
    made.add_argument("--long-peer-batches", type=numbers, help="of these; default 32")
    made.add_argument(
        "--mlp-batches", type=numbers, help="with SID-MLP++'s encoder; default 512,1, or empty"
    )
    made.add_argument("--mlp-peer-batches", type=numbers, help="of these; default 512")
    made.add_argument("--histories", type=words, help=f"of {','.join(HISTORIES)}; default both")
    made.add_argument("--peers", type=words, help=f"of {','.join(PEERS)}, or none; default both")
    made.add_argument("--threads", type=int, help="of torch and our CPU backend; default all cores")
    add_shared(made)
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
            long_batches=(1,),
            long_peer_batches=(1,),
            mlp_batches=(1,),
            mlp_peer_batches=(1,),
            energy=False,
            point_seconds=10.0,
            compile_seconds=600.0,
            seconds=1200.0,
        )
    choices = {"histories": HISTORIES, "peers": (*PEERS, "none")}
    kinds = [f"{kind}_{which}" for kind in OTHER_SETTINGS for which in ("batches", "peer_batches")]
    sizes = ("batches", "peer_batches", *kinds)
    changes = changes_of(args, choices, sizes, may_be_empty=sizes[1:])
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    return dataclasses.replace(options, **changes)
