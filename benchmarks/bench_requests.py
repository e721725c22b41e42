"""Whole requests, token ids to items, against compiled PyTorch: verified first, then timed.

    python benchmarks/bench_requests.py                  on a GPU
    python benchmarks/bench_requests.py --device cpu     our CPU backend, on all cores

TIGER's T5 encoder (4 layers, D 128, 6 heads of 64, FFN 1024) with random weights before a student
of the published sizes, 50 beams, k 10, Beauty's catalogue; bf16 on a GPU, fp32 and bf16 weights on
the CPU. Histories are full (82 tokens) and then real (ragged, 34 tokens on average), see
request_inputs. Then requests of 1,000 tokens, for an encoder and a student of width 256, and full
histories with SID-MLP++'s encoder (request_options.OTHER_SETTINGS). request_peers says who takes
part, gpu_timing how a GPU's times are taken, request_host what a call from lists to lists is.
Everyone reads the same ids, padded to one length, for which peers are compiled.

States and items are judged before anything is timed (request_checks). A wrong one of a backend's
ends the benchmark without a report, a wrong peer is left out. Nothing is timed beside another
process on the GPU. What was not measured is in `left_out` with its reason.

Points are written to <out>.partial as they are measured, which becomes <out> after the last:
results/requests-gpu-<gpu>.json, or requests-cpu-<cpu>.json, by default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gpu_timing as timing
import report_header
import torch
from bench_decode_gpu import about, free_memory, usable_backends
from common import OthersCpuShare, cpu_name, results_path
from decode_catalogues import load_catalogue
from decode_variants import Contest, dtype_name
from gpu_options import Clock, Left
from gpu_points import Models
from report_run import run_into
from request_host import host_line
from request_inputs import FLOP_PER_S, Encoder, random_encoder
from request_options import OTHER_SETTINGS, RequestOptions, on_gpu, options_of, parser
from request_points import Peers, make_points, measure

from sidmlp_kernels import Recommender, TokenSpec

Say = Callable[[str], None]


def others_on_gpu(options: RequestOptions) -> int:
    """Other processes on the GPU that is measured, where that can be told."""
    return (timing.other_processes() or 0) if on_gpu(options) else 0


def make_contest(options: RequestOptions) -> Contest:
    """The student and Beauty's catalogue; states come from the encoder, so there are none."""
    items = load_catalogue(options.base_catalogue, options.data)
    return Contest(items, 1, sizes=options.sizes, tokens=options.tokens, k=options.k)


def run(
    options: RequestOptions, report: dict[str, Any], write: Callable[[], None], say: Say
) -> None:
    """Measures every point into `report`, calling `write` after each."""
    clock = Clock()
    others = [make(options) for make in OTHER_SETTINGS.values()]
    for setting in [options, *(other for other in others if other.batches)]:
        run_setting(setting, report, write, say, clock)
        report["seconds"], report["compile_seconds"] = clock.elapsed, clock.compiling
        if on_gpu(options):
            free_memory()


def run_setting(
    options: RequestOptions,
    report: dict[str, Any],
    write: Callable[[], None],
    say: Say,
    clock: Clock,
) -> None:
    """Measures the points of one encoder and student."""
    contest, models, encoder = make_models(options)
    report["catalogues"][options.base_catalogue] = about(contest)
    report["plans"] = report.get("plans", {}) | {
        f"{backend}-{dtype_name(dtype)}, {', '.join(options.histories)}": str(
            model._plan(options.k, options.num_beams, None, None, None)
        ).splitlines()
        for (backend, dtype), model in models.items()
    }
    peers = Peers(contest, encoder, options)
    for point in make_points(options):
        others = others_on_gpu(options)
        why = ""
        if clock.elapsed > options.seconds:
            why = f"{options.seconds:.0f} s are over"
        elif others:
            why = f"{others} other processes on the GPU"
        where = {"histories": point.histories, "batch": point.batch}
        if why:
            report["left_out"].append({**where, "why": why})
            say(f"{point} left out: {why}")
            continue
        with OthersCpuShare() as busy:
            found, left = measure(point, contest, models, peers, options, clock)
        if not on_gpu(options):
            found["others_cpu_share"] = busy.share
        report["results"].append(found)
        report["left_out"] += [{**where, **gone} for gone in left]
        report["seconds"], report["compile_seconds"] = clock.elapsed, clock.compiling
        write()
        shown = ", ".join(f"{row['key']} {row['p50_us']:.1f}" for row in found["variants"])
        say(f"{clock.elapsed:.0f} s  {point} (us): {shown}")
        for key, host in found.get("host", {}).items():
            say(f"  lists to lists, {key}: {host_line(host)}")
        for gone in left:
            say(f"  left out: {gone['name']}: {gone['why']}")
        if on_gpu(options):
            free_memory()


def make_models(options: RequestOptions) -> tuple[Contest, Models, Encoder]:
    """The student with its catalogue, a Recommender for each backend and dtype, the encoder."""
    contest = make_contest(options)
    tokens = TokenSpec.for_codes(contest.spec.codes_per_level, max_items=options.max_items)
    encoder = random_encoder(tokens, options.encoder_sizes)
    models: Models = {
        (backend, dtype): Recommender(
            contest.student,
            contest.catalogue,
            encoder,
            options.device,
            dtype,
            backend,
            tokens=tokens,
        )
        for backend in options.backends
        for dtype in options.dtypes
    }
    return contest, models, encoder


def new_report(options: RequestOptions, left: list[Left], commit: str | None) -> dict[str, Any]:
    """The report before its first point; RuntimeError where somebody else uses the GPU."""
    setting = {
        "encoder": options.encoder_sizes,
        "batches": list(options.batches),
        "peer_batches": list(options.peer_batches),
        "peers": list(options.peers),
        "flop_per_s_of_the_limit": FLOP_PER_S,
        "peers_about": (
            "the first of the dtypes, all requests padded to one length; compiled at peer_batches"
        ),
        **{
            kind: {
                "batches": list(other.batches),
                "peer_batches": list(other.peer_batches),
                "sizes": other.sizes,
                "encoder": other.encoder_sizes,
                "tokens": other.tokens,
            }
            for kind, make in OTHER_SETTINGS.items()
            for other in (make(options),)
        },
    }
    kind = "requests-gpu" if on_gpu(options) else "requests-cpu"
    return report_header.new_report(kind, options, setting, left, commit)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser(__doc__.split("\n")[0]).parse_args(arguments)
    try:
        names = args.backends or [args.device]
        backends, left = usable_backends(args.device, names)
        options = options_of(args, backends)
    except ValueError as error:
        print(f"bench_requests: {error}", file=sys.stderr)
        return 2
    if not backends:
        reasons = "; ".join(f"{gone['name']}: {gone['why']}" for gone in left)
        print(f"bench_requests: no backend can run here: {reasons}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    if on_gpu(options):
        default = results_path("requests-gpu", torch.cuda.get_device_name())
    else:
        default = results_path("requests-cpu", cpu_name())
    return run_into(
        "bench_requests",
        args.out or default,
        lambda: new_report(options, left, args.commit),
        lambda report, save, say: run(options, report, save, say),
    )


if __name__ == "__main__":
    sys.exit(main())
