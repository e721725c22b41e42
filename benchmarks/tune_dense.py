"""Where a level is better dense than sparse: the share of all codes with which a node continues.

    python benchmarks/tune_dense.py [--levels 2,4] [--fan-outs 2,4,8,16,32] [--batches 1,32,512]

A level is dense, logits of every code in tiles, where a node continues with more of the codes than
DENSE_FAN_OUT in sidmlp_kernels/plan.py says, else sparse, logits of children alone. Here catalogues
are random with one branching level below the first: its nodes have `fan-out` children in the mean,
all others below the first one child, which needs no logits. Each catalogue is decoded with that
level forced dense and forced sparse (`beam_decode`, published sizes, 50 beams, bf16).

Both are verified first, each against the float64 reference (decode_checks), and every batch has the
bits of the first requests. Times are CUDA-graph replays with the L2 warm (gpu_timing), in turns.

Printed for each level and batch: the share at which both take as long. `threshold`: the one with
which a plan takes least, as the geometric mean over all points of its time over that of the better
form; `as it is`: the same of today's. Results: runs/tune-dense-<backend>-<gpu>.json.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_timing as timing
import torch
from common import ROOT, machine_facts, slug, write_json
from decode_catalogues import codes_with_nodes
from decode_checks import Judge, Reference, Results, VerificationError
from decode_variants import PUBLISHED_SIZES

from sidmlp.trie import Trie
from sidmlp_kernels import why_not
from sidmlp_kernels.plan import DENSE_FAN_OUT
from sidmlp_kernels.testing import Problem, make_problem

REQUESTS = 32  # different ones; larger batches repeat them
JUDGED = 2  # of these are held against their sets in any case
TOKENS = 8
WARMUP = 2
SEED = 0

Say = Callable[[str], None]
Point = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure. levels: 2..L; fan_outs: mean children of a node."""

    backend: str = "cuda"
    levels: tuple[int, ...] = (2, 4)
    fan_outs: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 16, 24, 32)
    batches: tuple[int, ...] = (1, 32, 512)
    sizes: dict[str, Any] = field(default_factory=lambda: dict(PUBLISHED_SIZES))
    num_beams: int = 50
    k: int = 10
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    rounds: int = 9
    point_seconds: float = 0.5

    def __post_init__(self) -> None:
        codes = self.sizes["codes_per_level"]
        for name, values, low, high in (
            ("levels", self.levels, 2, len(codes)),
            ("fan_outs", self.fan_outs, 1, min(codes)),
            ("batches", self.batches, 1, 1 << 20),
        ):
            if not values or not all(low <= value <= high for value in values):
                raise ValueError(f"{name}: expected numbers in {low}..{high}, got {list(values)}")


def nodes_of(codes_per_level: Sequence[int], level: int, fan_out: int) -> tuple[int, ...]:
    """Nodes of each level where only the first level and `level` (from 1) branch."""
    first = codes_per_level[0]
    return tuple(
        first if number < level else first * fan_out
        for number in range(1, len(codes_per_level) + 1)
    )


class Bench:
    """One student and its contexts; a catalogue for each level and fan-out."""

    def __init__(self, options: Options) -> None:
        self.options = options
        sizes = {"batch": REQUESTS, "tokens": TOKENS, "full_histories": True, **options.sizes}
        self.base = make_problem(
            seed=SEED, num_beams=options.num_beams, k=options.k, num_items=1, **sizes
        )

    def problem(self, level: int, fan_out: int) -> Problem:
        """The base problem with a catalogue that branches there."""
        codes_per_level = self.base.spec.codes_per_level
        nodes = nodes_of(codes_per_level, level, fan_out)
        codes = torch.from_numpy(codes_with_nodes(nodes, codes_per_level, SEED)).long()
        return self.base.replace(
            codes=codes,
            item_ids=torch.arange(len(codes)),
            available=torch.ones(len(codes), dtype=torch.bool),
        )

    def measure(self, level: int, fan_out: int) -> list[Point]:
        """One JSON object for each batch; VerificationError if a form is wrong."""
        options, problem = self.options, self.problem(level, fan_out)
        trie = Trie.from_codes(
            problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
        )
        reference = Reference.build(problem.spec, problem.weights, trie)
        judge = Judge(
            reference,
            problem.states,
            problem.mask,
            k=options.k,
            num_beams=options.num_beams,
            dtypes=(options.dtype,),
            requests=JUDGED,
        )
        contexts = reference.student.context(problem.states, problem.mask).to(options.device)
        graphs: dict[tuple[str, int], timing.Captured] = {}
        kept: list[Any] = []  # what graphs read: they know addresses only
        kernel = ""
        for form in ("dense", "sparse"):
            dense = [
                number == 1 or (number == level and form == "dense")
                for number in range(1, problem.spec.num_levels + 1)
            ]
            plan = problem.plan(options.backend, options.dtype, device=options.device, dense=dense)
            title = f"level {level}, {fan_out} children, {form}"
            right = _on_cpu(plan.beam_decode(contexts))
            judge.check(title, right, options.dtype)
            for batch in options.batches:
                rows = torch.arange(batch) % REQUESTS
                own = contexts[rows.to(contexts.device)]
                kept += [plan, own]
                graph = timing.captured(lambda plan=plan, own=own: plan.beam_decode(own))
                graph.replay()
                _same_bits(title, graph.outputs, right, rows)
                graphs[form, batch] = graph
            kernel = plan.kernel
        return [
            {
                "level": level,
                "fan_out": fan_out,
                "share": fan_out / problem.spec.codes_per_level[level - 1],
                "batch": batch,
                "kernel": kernel,
                **self._times(graphs["dense", batch], graphs["sparse", batch]),
            }
            for batch in options.batches
        ]

    def _times(self, dense: timing.Captured, sparse: timing.Captured) -> dict[str, float]:
        replays = timing.replays_per_sample(sparse.replay)
        found = timing.sampled(
            {
                "dense": lambda: timing.warm_sample(dense.replay, replays),
                "sparse": lambda: timing.warm_sample(sparse.replay, replays),
            },
            rounds=self.options.rounds,
            warmup=WARMUP,
            max_seconds=self.options.point_seconds,
        )
        return {f"{form}_p50_us": timed.median for form, timed in found.items()}


def _on_cpu(results: Results) -> Results:
    items, scores, codes, counts = results
    return items.cpu(), scores.cpu(), codes.cpu(), counts.cpu()


def _same_bits(title: str, got: Results, right: Results, rows: torch.Tensor) -> None:
    for tensor, all_rows in zip(_on_cpu(got), right, strict=True):
        if not torch.equal(tensor, all_rows[rows]):
            raise VerificationError(
                f"{title}: expected a request's bits not to depend on its batch, got others in a "
                f"batch of {len(rows)}; not timing it"
            )


def crossing(points: Sequence[Point]) -> float | None:
    """The share from which on dense takes no longer: between two measured shares, by a straight
    line through the logarithms. 0 where dense is always the faster, None where it never is."""
    ordered = sorted(points, key=lambda point: point["share"])
    ratios = [math.log(point["dense_p50_us"] / point["sparse_p50_us"]) for point in ordered]
    slower = [number for number, ratio in enumerate(ratios) if ratio > 0]
    if not slower:
        return 0.0
    last = slower[-1]
    if last == len(ordered) - 1:
        return None
    low, high = (math.log(ordered[number]["share"]) for number in (last, last + 1))
    part = ratios[last] / (ratios[last] - ratios[last + 1])
    return math.exp(low + part * (high - low))


def loss(points: Sequence[Point], threshold: float) -> float:
    """Geometric mean of the time with this threshold over that of the better form."""
    return statistics.geometric_mean(
        point["dense_p50_us" if point["share"] > threshold else "sparse_p50_us"]
        / min(point["dense_p50_us"], point["sparse_p50_us"])
        for point in points
    )


def best_threshold(points: Sequence[Point]) -> tuple[float, float]:
    """The threshold with the least loss, half way (of the logarithms) between measured shares, and
    its loss."""
    shares = sorted({point["share"] for point in points})
    between = [math.sqrt(low * high) for low, high in itertools.pairwise(shares)]
    candidates = [shares[0] / 2, *between, shares[-1]]
    return min(((t, loss(points, t)) for t in candidates), key=lambda found: found[1])


def run(options: Options, report: dict[str, Any], write: Callable[[], None], say: Say) -> None:
    """Measures every point into `report`, calling `write` after each catalogue."""
    others = timing.other_processes()
    if others:
        raise RuntimeError(f"expected to be alone on the GPU, got {others} other processes on it")
    bench = Bench(options)
    points = report["results"]
    for level in options.levels:
        for fan_out in options.fan_outs:
            found = bench.measure(level, fan_out)
            points += found
            write()
            shown = "  ".join(
                f"{p['batch']}: {p['dense_p50_us']:.1f} / {p['sparse_p50_us']:.1f}" for p in found
            )
            say(f"level {level}, {found[0]['share']:.1%} of the codes, us dense / sparse  {shown}")
    report["crossings"] = [
        {
            "level": level,
            "batch": batch,
            "share": crossing([p for p in points if (p["level"], p["batch"]) == (level, batch)]),
        }
        for level in options.levels
        for batch in options.batches
    ]
    threshold, least = best_threshold(points)
    now = report["setting"]["threshold"]
    report["threshold"], report["loss"], report["loss_as_it_is"] = (
        threshold,
        least,
        loss(points, now),
    )
    for cross in report["crossings"]:
        share = cross["share"]
        where = "never" if share is None else f"above {share:.1%}" if share > 0 else "everywhere"
        say(f"level {cross['level']}, batch {cross['batch']}: dense is faster {where}")
    say(f"threshold {threshold:.1%}: {least:.3f} of the better form's time")
    say(f"as it is {now:.1%}: {report['loss_as_it_is']:.3f}")


def new_report(options: Options, commit: str | None) -> dict[str, Any]:
    """The report before its first point."""
    machine = machine_facts()
    if commit:
        machine["commit"] = commit
    return {
        "kind": "tune-dense",
        "complete": False,
        "machine": machine,
        "gpu": torch.cuda.get_device_name(),
        "setting": {
            "backend": options.backend,
            "threshold": DENSE_FAN_OUT[options.backend],
            "sizes": options.sizes,
            "num_beams": options.num_beams,
            "k": options.k,
            "dtype": str(options.dtype).removeprefix("torch."),
        },
        "results": [],
        "left_out": [],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    numbers = lambda text: tuple(int(word) for word in text.split(","))  # noqa: E731
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    made.add_argument("--levels", type=numbers, help="that branch, one at a time; default 2,4")
    made.add_argument("--fan-outs", type=numbers, help="mean children of a node of that level")
    made.add_argument("--batches", type=numbers, help="default 1,32,512")
    made.add_argument("--codes", type=int, help="of every level; default 256")
    made.add_argument("--out", type=Path, help="JSON file")
    made.add_argument("--commit", help="what is measured, where the tree is no git checkout")
    return made


def options_of(args: argparse.Namespace) -> Options:
    """Checked options; ValueError names what is wrong."""
    given = {name: getattr(args, name) for name in ("levels", "fan_outs", "batches")}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.codes is not None:
        levels = len(PUBLISHED_SIZES["codes_per_level"])
        chosen["sizes"] = {**PUBLISHED_SIZES, "codes_per_level": (args.codes,) * levels}
    return Options(backend=args.backend, **chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    say: Say = lambda line: print(line, flush=True)  # noqa: E731
    try:
        options = options_of(args)
        reason = why_not(options.backend)
        if reason:
            raise ValueError(f"the {options.backend} backend cannot run here: {reason}")
    except ValueError as error:
        print(f"tune_dense: {error}", file=sys.stderr)
        return 2
    name = f"tune-dense-{options.backend}-{slug(torch.cuda.get_device_name())}.json"
    out = args.out or ROOT / "runs" / name
    report = new_report(options, args.commit)
    try:
        with torch.no_grad():
            run(options, report, lambda: write_json(out, report), say)
    except RuntimeError as error:  # VerificationError is one
        print(
            f"tune_dense: stopped: {error}; what was measured, if anything: {out}", file=sys.stderr
        )
        return 1
    report["complete"] = True
    write_json(out, report)
    say(str(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
