"""Every GPU backend against the strongest plain PyTorch, in one run, verified before it is timed.

    python benchmarks/bench_decode_gpu.py [--quick] [--backends cuda,triton] [--out FILE]

Published sizes, full histories of 82 tokens, 50 beams, k 10, weights and states in bf16 (--dtypes),
the catalogues of Beauty and Cell Phones, batches of 1 to 4096. `beam_decode` starts from context
vectors, `decode_states` has the readout in front. gpu_participants says who takes part, gpu_timing
how times are taken. Times of a decode are CUDA-graph replays, L2 warm and L2 cold; the eager peers
are timed as calls. `host_us` is what a call costs Python.

What a graph's replay wrote, or a call returned, is judged by the float64 reference
(decode_checks) before its time is taken. A wrong answer ends the benchmark without a report.
Nothing is timed beside another process on the GPU. What was not measured is in `left_out` with its
reason.

Points are written to <out>.partial as they are measured, which becomes <out> after the last:
results/decode-gpu-<gpu>.json by default, and runs/decode-gpu-quick.json with --quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_timing as timing
import torch
from common import ROOT, machine_facts, results_path, write_json
from decode_catalogues import BEAUTY, REAL, load_catalogue
from decode_checks import VerificationError
from decode_variants import Contest, dtype_name
from gpu_participants import COMPILED, PEERS
from gpu_points import EXTRA_BATCHES, EXTRA_PEERS, Clock, Left, Options, measure

from sidmlp_kernels import Recommender, why_not
from sidmlp_kernels.backends import BACKENDS, DTYPES

Say = Callable[[str], None]


def usable_backends(device_type: str, names: Sequence[str] | None) -> tuple[list[str], list[Left]]:
    """Backends of this device type that run here, and those that do not with their reasons.

    Raises ValueError for a name that is none of them.
    """
    known = [b.name for b in BACKENDS if b.device_type == device_type]
    for name in names or ():
        if name not in known:
            raise ValueError(f"backends: expected some of {sorted(known)}, got {name!r}")
    wanted = names or known
    reasons = {name: why_not(name) for name in wanted}
    left = [{"name": name, "why": reason} for name, reason in reasons.items() if reason]
    return [name for name in wanted if not reasons[name]], left


def load_contest(name: str, options: Options) -> tuple[Contest, dict[str, Any]]:
    """The contest on one catalogue, and what to report of it.

    States are rounded to bf16, so that every dtype of weights starts from the same numbers.
    """
    items = load_catalogue(name, options.data)
    contest = Contest(
        items, max(options.batches), sizes=options.sizes, tokens=options.tokens, k=options.k
    )
    contest.states = contest.states.bfloat16().float()
    about = {"name": items.name, "origin": items.origin, "items": items.num_items}
    return contest, about


def run(options: Options, report: dict[str, Any], write: Callable[[], None], say: Say) -> None:
    """Measures every point into `report`, calling `write` after each."""
    clock = Clock()
    for position, name in enumerate(options.catalogues):
        contest, report["catalogues"][name] = load_contest(name, options)
        models: dict[tuple[str, torch.dtype], Recommender] = {}
        for backend in options.backends:
            for dtype in options.dtypes:
                models[backend, dtype] = Recommender(
                    contest.student,
                    contest.catalogue,
                    device=options.device,
                    dtype=dtype,
                    backend=backend,
                )
        for batch in options.batches:
            where = {"catalogue": name, "batch": batch}
            if clock.elapsed > options.seconds:
                report["left_out"].append({**where, "why": f"{options.seconds:.0f} s are over"})
                continue
            others = timing.other_processes()
            if others:
                why = f"{others} other processes on the GPU"
                report["left_out"].append({**where, "why": why})
                say(f"{name} batch {batch} left out: {why}")
                continue
            extra = position == 0 and batch in EXTRA_BATCHES and not options.quick
            point, left = measure(contest, models, batch, options, clock, extra)
            report["results"].append({"catalogue": name, **point})
            report["left_out"] += [{**where, **gone} for gone in left]
            write()
            shown = ", ".join(f"{row['key']} {row['p50_us']:.1f}" for row in point["variants"])
            say(f"{clock.elapsed:.0f} s  {name} batch {batch} (us): {shown}")
            for gone in left:
                say(f"  left out: {gone['name']} {gone['dtype']}: {gone['why']}")
    report["seconds"], report["compile_seconds"] = clock.elapsed, clock.compiling


def new_report(options: Options, left: list[Left], commit: str | None) -> dict[str, Any]:
    """The report before its first point; RuntimeError where somebody else uses the GPU."""
    others = timing.other_processes()
    if others:
        raise RuntimeError(f"expected to be alone on the GPU, got {others} other processes on it")
    machine = machine_facts()
    if commit:
        machine["commit"] = commit
    setting = {
        "sizes": options.sizes,
        "tokens": options.tokens,
        "k": options.k,
        "num_beams": options.num_beams,
        "backends": options.backends,
        "dtypes": [dtype_name(dtype) for dtype in options.dtypes],
        "states": "in the dtype of the weights, rounded to bf16 before",
        "quick": options.quick,
        "other_processes": "not checked: no nvidia-ml-py" if others is None else others,
        "peers_about": {
            "best compiled": f"the fastest of {', '.join(COMPILED)} at a point",
            "reference": "eager sidmlp.beam, up to batch 512: its loop over requests is Python's",
            ", ".join(EXTRA_PEERS): f"{options.catalogues[0]}, batch {EXTRA_BATCHES} only",
        },
        "timing": (timing.__doc__ or "").split("\n\n", 1)[1],
        "most_replays_per_sample": timing.MOST_REPLAYS,
        "host_calls_per_sample": timing.HOST_CALLS,
    }
    return {
        "kind": "decode-gpu",
        "complete": False,
        "machine": machine,
        "gpu": torch.cuda.get_device_name(),
        "setting": setting,
        "catalogues": {},
        "results": [],
        "left_out": left,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="Beauty, batch 32 and 512, L2 warm")
    made.add_argument("--backends", type=words, help="e.g. cuda,triton; default: all that run here")
    made.add_argument("--dtypes", type=words, help="of the weights; default bfloat16")
    made.add_argument("--peers", type=words, help=f"of {','.join(PEERS)}, or none; default all")
    made.add_argument("--catalogues", type=words, help=f"of {','.join(REAL)}")
    made.add_argument("--batches", type=lambda text: [int(word) for word in words(text)])
    made.add_argument("--no-cold", action="store_true", help="leave out the times with a cold L2")
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
            options, quick=True, cold=False, catalogues=(BEAUTY,), batches=(32, 512)
        )
    changes: dict[str, Any] = {}
    choices: tuple[tuple[str, Any], ...] = (
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
    if args.batches is not None:
        if not args.batches or min(args.batches) < 1:
            raise ValueError(f"batches: expected sizes >= 1, got {args.batches}")
        changes["batches"] = tuple(args.batches)
    for name in ("data", "seconds", "compile_seconds"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.no_cold:
        changes["cold"] = False
    return dataclasses.replace(options, **changes)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        backends, left = usable_backends("cuda", args.backends)
        options = options_of(args, backends)
    except ValueError as error:
        print(f"bench_decode_gpu: {error}", file=sys.stderr)
        return 2
    if not backends:
        reasons = "; ".join(f"{gone['name']}: {gone['why']}" for gone in left)
        print(f"bench_decode_gpu: no GPU backend can run here: {reasons}", file=sys.stderr)
        return 2
    if options.quick:
        default = ROOT / "runs" / "decode-gpu-quick.json"  # no result to make tables of
    else:
        default = results_path("decode-gpu", torch.cuda.get_device_name())
    out = args.out or default
    partial = out.with_name(f"{out.name}.partial")
    try:
        report = new_report(options, left, args.commit)
        with torch.no_grad():
            run(
                options,
                report,
                lambda: write_json(partial, report),
                lambda line: print(line, flush=True),
            )
    except VerificationError as error:
        partial.unlink(missing_ok=True)
        print(f"bench_decode_gpu: nothing is reported: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(
            f"bench_decode_gpu: stopped: {error}; what was measured, if anything: {partial}",
            file=sys.stderr,
        )
        return 1
    report["complete"] = True
    write_json(partial, report)
    partial.replace(out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
