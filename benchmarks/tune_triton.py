"""Other tiles for one row of the Triton backend's table: compiled, verified, timed, the best kept.

    python benchmarks/tune_triton.py --vary warps=4,8 stages=2,3 [--row N] [--write]
    python benchmarks/tune_triton.py --candidates FILE     [{"warps": 4}, {"groups": [[0, 1]]}]

All candidates are compiled at once, in processes that fill Triton's cache. Then one after the other
is verified and timed: a student that takes the row (the first row: published sizes, 50 beams),
weights in bf16 or float32, Beauty's catalogue. Verified means: up to 512 requests are judged by the
float64 reference (decode_checks), and each has the same bits alone and in every batch.

Times are CUDA-graph replays with the L2 warm (gpu_timing), a candidate's in turns with the row's as
it is. `relative_time` is the geometric mean of their ratios over operators and batches; the row
against itself, measured first, shows the noise. What does not compile, does not fit or is wrong is
in `left_out` with its reason.

Results are written to <out>.partial as they come, which becomes <out> at the end: by default
runs/tune-triton-<gpu>.json, as no table is made of it. --write puts the best into tiles.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_timing as timing
import torch
from common import ROOT, machine_facts, slug, write_json
from decode_variants import PUBLISHED_SIZES, dtype_name
from own_processes import in_processes
from triton_bench import OPERATORS, Bench, Options, compile_one, reason_of
from triton_candidates import (
    FIELDS,
    Changes,
    applied,
    changed,
    checked,
    choose_best,
    describe,
    parse_vary,
    read_candidates,
    rewritten,
    usual_sizes,
)

from sidmlp_kernels import why_not
from sidmlp_kernels.ops.triton import tiles

Say = Callable[[str], None]
DISTINCT = 512  # requests; larger batches repeat them
WORKERS = 16  # each holds a CUDA context and weights on the GPU
COMPILE_SECONDS = 300.0


def compiling(
    options: Options, candidates: Sequence[Changes], report: dict[str, Any], say: Say
) -> list[Changes]:
    """The candidates that compile and fit; RuntimeError where the row as it is does not."""
    jobs = [
        (options, changes, operator) for changes in candidates for operator in options.operators
    ]
    cores = len(os.sched_getaffinity(0))
    failed = []
    done = in_processes(
        compile_one, jobs, workers=min(WORKERS, cores, len(jobs)), seconds=COMPILE_SECONDS
    )
    for count, (number, why) in enumerate(done, 1):
        _, changes, operator = jobs[number]
        said = f"left out: {why}" if why else "compiled"
        say(f"{count} of {len(jobs)}  {operator}, {describe(changes)}: {said}")
        if not why:
            continue
        if not changes:
            raise RuntimeError(f"expected row {options.row} as it is to run here, got {why}")
        failed.append(changes)
        report["left_out"].append({"changes": changes, "operator": operator, "why": why})
    return [changes for changes in candidates if changes not in failed]


def run(
    options: Options,
    candidates: Sequence[Changes],
    report: dict[str, Any],
    write: Callable[[], None],
    say: Say,
) -> None:
    """Measures the row as it is and every candidate into `report`, calling `write` after each."""
    usable = compiling(options, [{}, *candidates], report, say)
    others = timing.other_processes()
    if others:
        raise RuntimeError(f"expected to be alone on the GPU, got {others} other processes on it")
    bench = Bench(options, requests=min(DISTINCT, max(options.batches)))
    report["setting"]["catalogue"] = {"name": bench.items.name, "origin": bench.items.origin}
    judge = bench.judge()
    current, _ = bench.verified("the row as it is", judge)
    for changes in usable:
        name = describe(changes)
        try:
            with applied(options.row, changes):
                graphs, verified = bench.verified(name, judge)
            points = bench.times(graphs, current)
        except Exception as error:
            report["left_out"].append({"changes": changes, "why": reason_of(error)})
            write()
            say(f"{name}: left out: {reason_of(error)}")
            if options.device == "cuda":
                torch.cuda.synchronize()  # raises where the error took the CUDA context along
            continue
        relative = statistics.geometric_mean(point["relative_time"] for point in points)
        report["results"].append(
            {"changes": changes, "relative_time": relative, "points": points, "verified": verified}
        )
        write()
        shown = ", ".join(
            f"{operator} "
            + " ".join(
                f"{p['batch']}:{p['p50_us']:.1f}" for p in points if p["operator"] == operator
            )
            for operator in options.operators
        )
        say(f"{name}: {relative:.3f} of the time; us by batch: {shown}")


def new_report(options: Options, commit: str | None) -> dict[str, Any]:
    """The report before its first result."""
    machine = machine_facts()
    if commit:
        machine["commit"] = commit
    row = tiles.TABLE[options.row]
    setting = {
        "row": options.row,
        "half": row.half,
        "max_hidden": row.max_hidden,
        "max_beams": row.max_beams,
        "tiles": dataclasses.asdict(row.tiles),
        "groups": [list(pair) for pair in tiles.GROUPS],
        "sizes": options.sizes,
        "tokens": options.tokens,
        "k": options.k,
        "num_beams": options.num_beams,
        "dtype": dtype_name(options.dtype),
        "operators": options.operators,
        "batches": options.batches,
    }
    return {
        "kind": "tune-triton",
        "complete": False,
        "machine": machine,
        "gpu": torch.cuda.get_device_name(),
        "setting": setting,
        "results": [],
        "left_out": [],
        "best": None,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--vary", nargs="+", metavar="FIELD=N,N", help=f"a grid over {', '.join(FIELDS)}"
    )
    what.add_argument("--candidates", type=Path, help="JSON file, a list of {field: value}")
    made.add_argument("--row", type=int, default=0, help="of the table, from 0 (default)")
    made.add_argument("--batches", type=lambda text: [int(word) for word in words(text)])
    made.add_argument("--operators", type=words, help=f"of {','.join(OPERATORS)}; default both")
    made.add_argument("--data", type=Path, help="folder of the real catalogues")
    made.add_argument("--out", type=Path, help="JSON file")
    made.add_argument("--write", action="store_true", help="put the best into tiles.py")
    made.add_argument("--commit", help="what is measured, where the tree is no git checkout")
    return made


def options_of(args: argparse.Namespace) -> tuple[Options, list[Changes]]:
    """Checked options and candidates; ValueError names what is wrong."""
    if not 0 <= args.row < len(tiles.TABLE):
        raise ValueError(f"row: expected 0 to {len(tiles.TABLE) - 1}, got {args.row}")
    row = tiles.TABLE[args.row]
    given = parse_vary(args.vary) if args.vary else read_candidates(args.candidates)
    candidates = checked(given, row)
    hidden, beams = usual_sizes(args.row)
    options = Options(args.row, sizes={**PUBLISHED_SIZES, "hidden_dim": hidden}, num_beams=beams)
    changes: dict[str, Any] = {}
    if args.batches is not None:
        if not args.batches or min(args.batches) < 1:
            raise ValueError(f"batches: expected sizes >= 1, got {args.batches}")
        changes["batches"] = tuple(dict.fromkeys(args.batches))
    if args.operators is not None:
        if not args.operators or not set(args.operators) <= set(OPERATORS):
            raise ValueError(f"operators: expected some of {OPERATORS}, got {args.operators}")
        changes["operators"] = tuple(dict.fromkeys(args.operators))
    if args.data is not None:
        changes["data"] = args.data
    options = dataclasses.replace(options, **changes)
    if args.write and any("groups" in one for one in candidates):
        raise ValueError(
            "write: expected candidates of this row alone, got groups, which hold for every row; "
            "set GROUPS in tiles.py by hand"
        )
    if args.write and set(options.operators) != set(OPERATORS):
        raise ValueError(
            f"write: expected both operators to be measured, got {options.operators}; whoever "
            "takes the row runs both, so measure the best with both"
        )
    return options, candidates


def write_table(path: Path, number: int, best: Mapping[str, Any] | None, say: Say) -> None:
    """Puts the best into the table of tiles.py, if there is one."""
    if best is None:
        say("nothing to write: no candidate is faster by more than the noise")
        return
    new = changed(tiles.TABLE[number], best["changes"])
    path.write_text(rewritten(path.read_text(), number, new))
    say(f"{path}: row {number} rewritten; tests/test_triton_compile.py says whether other GPUs can")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    say: Say = lambda line: print(line, flush=True)  # noqa: E731
    try:
        options, candidates = options_of(args)
        reason = why_not(options.backend)
        if reason:
            raise ValueError(f"the Triton backend cannot run here: {reason}")
    except ValueError as error:
        print(f"tune_triton: {error}", file=sys.stderr)
        return 2
    name = f"tune-triton-{slug(torch.cuda.get_device_name())}.json"
    out = args.out or ROOT / "runs" / name
    partial = out.with_name(f"{out.name}.partial")
    report = new_report(options, args.commit)
    try:
        with torch.no_grad():
            run(options, candidates, report, lambda: write_json(partial, report), say)
    except RuntimeError as error:  # VerificationError is one
        print(
            f"tune_triton: stopped: {error}; what was measured, if anything: {partial}",
            file=sys.stderr,
        )
        return 1
    best = choose_best(report["results"])
    report["best"], report["complete"] = best, True
    write_json(partial, report)
    partial.replace(out)
    if best is None:
        say("best: the row as it is")
    else:
        say(f"best: {describe(best['changes'])}, {best['relative_time']:.3f} of the time")
    say(str(out))
    if not args.write:
        return 0
    try:
        write_table(Path(tiles.__file__), options.row, best, say)
    except ValueError as error:
        print(f"tune_triton: tiles.py is as it was: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
