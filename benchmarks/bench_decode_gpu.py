"""Every GPU backend against the strongest plain PyTorch, in one run, verified before it is timed.

    python benchmarks/bench_decode.py --device cuda [--quick] [--axes batch,items,beams,codes]

Published sizes, full histories of 82 tokens, 50 beams, k 10, weights and states in bf16 (--dtypes),
Beauty's catalogue. gpu_axes says which points there are, gpu_participants who takes part,
gpu_timing how times are taken, work_counts what bytes and FLOP are; gpu_ceilings and gpu_energy do
the rest. `beam_decode` starts from context vectors, `decode_states` has the readout in front. Times
of a decode are CUDA-graph replays, L2 warm and L2 cold; the eager peers are timed as calls.
`host_us` is what a call costs Python.

What a graph's replay wrote, or a call returned, is judged by the float64 reference
(decode_checks) before its time is taken. A wrong answer, or an item that the catalogue lacks, ends
the benchmark without a report. Nothing is timed beside another process on the GPU. What was not
measured is in `left_out` with its reason.

Points are written to <out>.partial as they are measured, which becomes <out> after the last:
results/decode-gpu-<gpu>.json by default, and runs/decode-gpu-quick.json with --quick. Where time on
the GPU comes in pieces, run some axes at a time, each with an --out of its own, and join the files
with merge_results.py.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gpu_timing as timing
import report_header
import torch
from common import ROOT, results_path
from decode_variants import Contest
from gpu_arguments import options_of, parser
from gpu_axes import EXTRA_BATCHES, EXTRA_PEERS, TEACHER_BATCHES, Point, contest_of, make_points
from gpu_ceilings import measured_ceilings
from gpu_options import Clock, Left, Options
from gpu_participants import COMPILED
from gpu_points import Models, make_models, measure
from report_run import run_into

from sidmlp_kernels import why_not
from sidmlp_kernels.backends import BACKENDS

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


def about(contest: Contest) -> dict[str, Any]:
    """What to report of a catalogue."""
    items, levels = contest.items, contest.statistics.levels
    return {
        "name": items.name,
        "origin": items.origin,
        "items": items.num_items,
        "codes_per_level": list(contest.spec.codes_per_level),
        "nodes_per_level": [level.nodes for level in levels],
        "mean_children": [level.mean_children for level in levels],
    }


def why_skip(options: Options, clock: Clock) -> str:
    """Why no point can be begun now, or ""."""
    if clock.elapsed > options.seconds:
        return f"{options.seconds:.0f} s are over"
    others = timing.other_processes()
    return f"{others} other processes on the GPU" if others else ""


def run(options: Options, report: dict[str, Any], write: Callable[[], None], say: Say) -> None:
    """Measures every point into `report`, calling `write` after each."""
    clock = Clock()
    report["ceilings"] = measured_ceilings(options.dtypes, options.device)
    points = make_points(options)
    catalogue = ""
    contest: Contest | None = None
    models: Models = {}

    def leave_out(point: Point, why: str) -> None:
        report["left_out"].append({"axis": point.axis, **point.where, "why": why})
        say(f"{point} left out: {why}")

    for point in points:
        skip = why_skip(options, clock)
        if skip:
            leave_out(point, skip)
            continue
        if point.catalogue != catalogue:
            contest, models, catalogue = None, {}, point.catalogue  # frees the one before
            free_memory()
            try:
                same = [other for other in points if other.catalogue == catalogue]
                contest = contest_of(same, options)
            except MemoryError as error:
                leave_out(point, str(error))
                continue
            report["catalogues"][catalogue] = about(contest)
            models, left = make_models(contest, options, {other.axis for other in same})
            report["left_out"] += [{"catalogue": catalogue, **gone} for gone in left]
        elif contest is None:
            leave_out(point, f"there is no room for {catalogue}")
            continue
        found, left = measure(contest, models, point, options, clock, report["ceilings"])
        report["results"].append(found)
        report["left_out"] += [{**point.where, **gone} for gone in left]
        report["seconds"], report["compile_seconds"] = clock.elapsed, clock.compiling
        write()
        shown = ", ".join(f"{row['key']} {row['p50_us']:.1f}" for row in found["variants"])
        say(f"{clock.elapsed:.0f} s  {point} (us): {shown}")
        for gone in left:
            say(f"  left out: {gone['name']}: {gone['why']}")
        free_memory()
    report["seconds"], report["compile_seconds"] = clock.elapsed, clock.compiling


def free_memory() -> None:
    """Returns a point's graphs and weights to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def new_report(options: Options, left: list[Left], commit: str | None) -> dict[str, Any]:
    """The report before its first point; RuntimeError where somebody else uses the GPU."""
    setting = {
        "states": "in the dtype of the weights, rounded to bf16 before",
        "quick": options.quick,
        "peers_about": {
            "best compiled": f"the fastest of {', '.join(COMPILED)} at a point",
            "reference": "eager sidmlp.beam, up to batch 512: its loop over requests is Python's",
            ", ".join(EXTRA_PEERS): f"{options.base_catalogue}, batch {EXTRA_BATCHES} only",
            "static": "CSR masks (benchmarks/static_peer.py), compiled",
            "teacher": f"Hugging Face generate, random weights, batch {TEACHER_BATCHES} only",
        },
        "base": {
            "catalogue": options.base_catalogue,
            "batches": list(options.base_batches),
            "num_beams": options.num_beams,
            "codes_per_level": list(options.sizes["codes_per_level"]),
        },
        "axes": list(options.axes),
        "most_replays_per_sample": timing.MOST_REPLAYS,
        "host_calls_per_sample": timing.HOST_CALLS,
    }
    return report_header.new_report("decode-gpu", options, setting, left, commit)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser(__doc__.split("\n")[0]).parse_args(arguments)
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
    return run_into(
        "bench_decode_gpu",
        args.out or default,
        lambda: new_report(options, left, args.commit),
        lambda report, save, say: run(options, report, save, say),
    )


if __name__ == "__main__":
    sys.exit(main())
