"""decode_states: our CPU kernel against the PyTorch reference, eager and compiled.

    python benchmarks/bench_decode.py [--quick] [--axes batch,catalogue,beams,isa] [--threads 2]

From a base point (batch 32, 50 beams, k 10, 82 tokens, published sizes, Beauty's catalogue) one
thing varies at a time: the batch, the catalogue, the number of beams, the kernel's instruction set.
At each point every participant is verified on the very requests that are then timed
(decode_checks), and a wrong result ends the benchmark without a report. Participants take turns
call by call, so the kernel's caches are cold after each peer; "warm" times are of kernels alone.

Histories are full, the worst case for the kernel, which never reads a padded token. Prints tables
and the goals, and writes results/decode-<cpu>.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    OthersCpuShare,
    cpu_name,
    machine_facts,
    parse_count,
    results_path,
    system_memory,
    write_json,
)
from decode_catalogues import BEAUTY, REAL, ItemCodes, load_catalogue, uniform_catalogue
from decode_checks import Judge, VerificationError
from decode_variants import (
    KERNEL_DTYPES,
    PUBLISHED_SIZES,
    SEED,
    TOKENS,
    Contest,
    Variant,
    dtype_name,
)
from make_tables import QUIET, decode_tables, goal_lines
from work_counts import dense_flop, least_flop

from sidmlp_kernels.testing import Timing, time_interleaved
from sidmlp_kernels.trie import host_library

AXES = ("batch", "catalogue", "beams", "isa")
PEERS = ("eager", "compiled")
K = 10

# What building reference and kernel takes at most, measured from 1 to 20 million items.
BYTES_PER_ITEM = 400

# batch -> peer -> how many times faster Recommender.decode_states in float32 has to be.
GOALS = {32: {"eager": 10.0, "compiled": 4.0}, 1: {"eager": 5.0, "compiled": 5.0}}


@dataclass(frozen=True)
class Values:
    """The values that each axis takes."""

    batches: tuple[int, ...]
    catalogues: tuple[str, ...]  # a name of REAL or a number of items, e.g. "20M"
    beams: tuple[int, ...]


FULL = Values(
    batches=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    catalogues=(*REAL, "200k", "1M", "5M", "20M"),
    beams=(10, 20, 50, 100, 200, 512),
)
QUICK = Values(batches=(1, 32), catalogues=("amazon14_beauty", "200k"), beams=(10, 50, 200))


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of all participants, and of the kernels alone."""

    rounds: int
    max_seconds: float
    warm_rounds: int
    warm_max_seconds: float
    judged_requests: int


FULL_EFFORT = Effort(200, 15.0, 500, 5.0, 16)
QUICK_EFFORT = Effort(20, 5.0, 50, 2.0, 4)


@dataclass(frozen=True)
class Point:
    """One measurement. isas: not empty = compare these instead of peers."""

    axes: tuple[str, ...]
    catalogue: str
    batch: int
    num_beams: int
    isas: tuple[str, ...] = ()


def make_points(values: Values, axes: Sequence[str], base: Point) -> list[Point]:
    """The base point and one for every other value of each axis, grouped by catalogue."""
    points = {replace(base, axes=()): set(axes) - {"isa"}}
    for axis, field, wanted in (
        ("batch", "batch", values.batches),
        ("catalogue", "catalogue", values.catalogues),
        ("beams", "num_beams", values.beams),
    ):
        if axis in axes:
            for value in wanted:
                point = replace(base, axes=(), **{field: value})
                points.setdefault(point, set()).add(axis)
    if "isa" in axes:
        points[replace(base, axes=(), isas=supported_isas())] = {"isa"}
    ordered = sorted(points, key=lambda p: [base.catalogue, *values.catalogues].index(p.catalogue))
    return [replace(p, axes=tuple(a for a in AXES if a in points[p])) for p in ordered]


def supported_isas() -> tuple[str, ...]:
    """The kernel's instruction sets that this processor has."""
    here = host_library().build_info()["instruction_sets"]
    needed = {"plain": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw")}
    return tuple(isa for isa, features in needed.items() if set(features) <= set(here))


def items_of(catalogue: str, data: Path) -> ItemCodes:
    """The catalogue of a point's name."""
    if catalogue in REAL:
        return load_catalogue(catalogue, data)
    return uniform_catalogue(parse_count(catalogue))


def measure(contest: Contest, point: Point, peers: Sequence[str], effort: Effort) -> dict[str, Any]:
    """Verifies every participant at this point, then times them; the point's JSON object."""
    states, mask = contest.requests(point.batch)
    if point.isas:
        variants = contest.instruction_sets(point.batch, point.num_beams, point.isas)
    else:
        variants = contest.kernels(point.batch, point.num_beams)
        variants += contest.peers(point.batch, point.num_beams, peers)
    judge = Judge(
        contest.reference,
        states,
        mask,
        k=contest.k,
        num_beams=point.num_beams,
        dtypes=KERNEL_DTYPES,
        requests=effort.judged_requests,
    )
    verified = {v.key: judge.check(v.key, v.results(), v.dtype) for v in variants}

    calls = {v.key: v.call for v in variants}
    kernels = {v.key: v.call for v in variants if v.side == "kernel"}
    with OthersCpuShare() as others:
        cold = time_interleaved(
            calls, rounds=effort.rounds, warmup=2, max_seconds=effort.max_seconds
        )
        warm = time_interleaved(
            kernels, rounds=effort.warm_rounds, warmup=5, max_seconds=effort.warm_max_seconds
        )
    rows = [variant_row(v, point.batch, cold[v.key], warm.get(v.key)) for v in variants]
    medians = {row["name"]: row["p50_us"] for row in rows if row["side"] == "peer"}
    for row in rows:
        row["verified"] = verified[row["key"]]
        if row["side"] == "kernel":
            row["times_faster_than"] = {n: t / row["p50_us"] for n, t in medians.items()}
    tokens = states.shape[1]
    work = {
        "mflop_per_request_reference": dense_flop(contest.spec, tokens, point.num_beams) / 1e6,
        "mflop_per_request_kernel_at_most": least_flop(contest.spec, tokens, judge.walk) / 1e6,
        "beams_that_need_a_head": judge.walk.heads_per_level,
        "children_of_these_beams": judge.walk.logits_per_level,
        "weight_bytes": {dtype_name(d): contest.weight_bytes(d) for d in KERNEL_DTYPES},
    }
    return {
        **asdict(point),
        "k": contest.k,
        "others_cpu_share": others.share,
        "work": work,
        "variants": rows,
    }


def variant_row(variant: Variant, batch: int, cold: Timing, warm: Timing | None) -> dict[str, Any]:
    """What one participant needed."""
    row: dict[str, Any] = {
        "key": variant.key,
        "name": variant.name,
        "side": variant.side,
        "weights": dtype_name(variant.dtype),
        "isa": variant.isa,
        "p50_us": cold.median,
        "p99_us": cold.p99,
        "min_us": min(cold.samples),
        "samples": len(cold.samples),
        "us_per_request": cold.median / batch,
        "users_per_s": batch / cold.median * 1e6,
        **variant.about,
    }
    if warm is not None:
        row |= {
            "warm_p50_us": warm.median,
            "warm_p99_us": warm.p99,
            "warm_samples": len(warm.samples),
        }
    return row


def goals_of(results: list[dict[str, Any]], base: Point) -> list[dict[str, Any]]:
    """Each goal with what was measured, where its point and its peer were."""
    goals = []
    for point in results:
        same_place = (point["catalogue"], point["num_beams"]) == (base.catalogue, base.num_beams)
        if not same_place or point["isas"]:
            continue
        for row in point["variants"]:
            if row["key"] != "recommender-float32":
                continue
            for peer, target in GOALS.get(point["batch"], {}).items():
                got = row["times_faster_than"].get(peer)
                if got is not None:
                    goals.append(
                        {
                            "batch": point["batch"],
                            "peer": peer,
                            "target": target,
                            "got": got,
                            "met": got >= target,
                        }
                    )
    return goals


def run(
    base: Point,
    values: Values,
    *,
    axes: Sequence[str],
    peers: Sequence[str],
    effort: Effort,
    data: Path,
    sizes: dict[str, Any] = PUBLISHED_SIZES,
    tokens: int = TOKENS,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """All points, as the JSON object of a report. Raises VerificationError for a wrong result."""
    machine = machine_facts()
    points = make_points(values, axes, base)
    results, left_out, catalogues = [], [], {}
    with torch.no_grad():
        for catalogue in dict.fromkeys(point.catalogue for point in points):
            own = [point for point in points if point.catalogue == catalogue]
            items = items_of(catalogue, data)
            needed = items.num_items * BYTES_PER_ITEM
            if needed > 0.9 * system_memory("MemAvailable"):
                why = (
                    f"reference and kernel need up to {needed / 1e9:.1f} GB, "
                    f"{system_memory('MemAvailable') / 1e9:.1f} GB are free"
                )
                left_out.append({"catalogue": catalogue, "why": why})
                say(f"{catalogue}: left out, {why}")
                continue
            say(f"{items.name}: building ({items.num_items:,} items, {items.origin})")
            contest = Contest(items, max(p.batch for p in own), sizes=sizes, tokens=tokens, k=K)
            catalogues[catalogue] = {
                "name": items.name,
                "origin": items.origin,
                "items": items.num_items,
                "nodes_per_level": [level.nodes for level in contest.statistics.levels],
                "mean_children": [level.mean_children for level in contest.statistics.levels],
            }
            for point in own:
                say(
                    f"  batch {point.batch}, {point.num_beams} beams"
                    f"{', instruction sets' if point.isas else ''}: verifying, then timing"
                )
                results.append(measure(contest, point, peers, effort))
                say("    " + "  ".join(_short(row) for row in results[-1]["variants"]))
                share = results[-1]["others_cpu_share"]
                if share > QUIET:
                    say(f"    noisy: others used {share:.0%} of the processor meanwhile")
    setting = {
        "threads": torch.get_num_threads(),
        "sizes": sizes,
        "tokens": tokens,
        "k": K,
        "base": asdict(base),
        "peers": list(peers),
        "weights": f"random on the scales of a trained student, seed {SEED}",
        "histories": "full: every token valid",
        "effort": asdict(effort),
    }
    return {
        "kind": "decode",
        "machine": machine,
        "setting": setting,
        "catalogues": catalogues,
        "results": results,
        "left_out": left_out,
        "goals": goals_of(results, base),
    }


def _short(row: dict[str, Any]) -> str:
    return f"{row['key']} {row['p50_us'] / 1e3:.3f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few values and samples: a try-out")
    parser.add_argument(
        "--axes", default=",".join(AXES), help=f"some of {','.join(AXES)}; none = base point alone"
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="eager,compiled (or none)")
    parser.add_argument("--threads", type=int, help="of torch and kernel; default: all cores")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder with real catalogues; without them random ones of the same shape stand in",
    )
    parser.add_argument("--out", type=Path, help="JSON file; default results/decode-<cpu>.json")
    args = parser.parse_args(arguments)
    axes = _names(parser, "--axes", args.axes, AXES)
    peers = _names(parser, "--peers", args.peers, PEERS)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))

    base = Point((), BEAUTY, batch=32, num_beams=50)
    values, effort = (QUICK, QUICK_EFFORT) if args.quick else (FULL, FULL_EFFORT)
    try:
        report = run(base, values, axes=axes, peers=peers, effort=effort, data=args.data)
    except VerificationError as error:
        print(f"nothing is reported: {error}", file=sys.stderr)
        return 1
    report["setting"]["quick"] = args.quick
    path = args.out or results_path("decode", cpu_name())
    write_json(path, report)
    for name, table in decode_tables(report).items():
        print(f"\n{name}\n\n{table}")
    print("\n" + "\n".join(goal_lines(report)))
    print(f"\nwritten to {path}", file=sys.stderr)
    return 0


def _names(
    parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]
) -> tuple[str, ...]:
    names = () if text == "none" else tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
