"""The columns of a point of bench_decode_gpu: times, ratios, work against ceilings, energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_energy
import gpu_nvml
import gpu_timing as timing
from common import HOST_CLOCK
from decode_checks import Judge
from decode_variants import Contest, dtype_name
from gpu_axes import Point
from gpu_options import Left, Options
from gpu_participants import COMPILED, Participant
from work_counts import dense_flop, launch_bytes, least_flop, of_ceilings

WARMUP = 3
TIMED = {
    "graph": "graph replay",
    "call": "call",
    "wall": HOST_CLOCK,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A verified call of one participant, ready to be timed."""

    operator: str
    who: Participant
    run: Callable[[], object]
    verified: dict[str, Any]
    keep: Any  # the graph, and the call with the weights that the graph reads where they are

    @property
    def key(self) -> str:
        """Unique among a point's variants."""
        return f"{self.operator}-{self.who.name}-{dtype_name(self.who.dtype)}"


def timed_rows(entries: Sequence[Entry], batch: int, options: Options) -> tuple[list[Row], Row]:
    """One JSON object for each entry, and the times of an empty graph."""
    empty = timing.empty_graph()
    graphs = {e.key: e.run for e in entries if e.who.timed == "graph"} | {"empty": empty.replay}
    replays = {key: timing.replays_per_sample(run) for key, run in graphs.items()}

    def sampled(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
        return timing.sampled(
            samplers, rounds=rounds, warmup=WARMUP, max_seconds=options.point_seconds
        )

    found = sampled(
        {
            key: lambda run=run, n=replays[key]: timing.warm_sample(run, n)
            for key, run in graphs.items()
        },
        options.rounds,
    )
    single = sampled(
        {key: lambda run=run: timing.single_sample(run) for key, run in graphs.items()},
        options.single_rounds,
    )
    cold: dict[str, Any] = {}
    if options.cold:
        flush = timing.flush_buffer()
        cold = sampled(
            {key: lambda run=run: timing.cold_sample(run, flush) for key, run in graphs.items()},
            options.cold_rounds,
        )
    # Apart from the graphs: calls may take a thousand times longer, and would use up the time.
    for how, sample in (("call", timing.call_sample), ("wall", timing.wall_sample)):
        calls = {e.key: e.run for e in entries if e.who.timed == how}
        if calls:
            found |= timing.sampled(
                {key: lambda run=run, of=sample: of(run) for key, run in calls.items()},
                rounds=options.call_rounds,
                warmup=1,
                max_seconds=options.call_seconds,
            )

    def times(key: str) -> Row:
        row = {"p50_us": found[key].median, "p99_us": found[key].p99}
        row["samples"] = len(found[key].samples)
        if key in replays:
            row["replays_per_sample"] = replays[key]
        for name, of in (("single", single), ("cold", cold)):
            if key in of:
                row |= {f"{name}_p50_us": of[key].median, f"{name}_p99_us": of[key].p99}
                row[f"{name}_samples"] = len(of[key].samples)
        return row

    rows = [
        {
            "key": entry.key,
            "operator": entry.operator,
            "name": entry.who.name,
            "side": entry.who.side,
            "dtype": dtype_name(entry.who.dtype),
            "timed": TIMED[entry.who.timed],
            "verified": {k: v for k, v in entry.verified.items() if k != "invalid_rate"},
            "invalid_rate": entry.verified["invalid_rate"],
            **times(entry.key),
            "users_per_s": batch / found[entry.key].median * 1e6,
        }
        for entry in entries
    ]
    return rows, times("empty")


def compare(rows: list[Row]) -> None:
    """Adds to each backend's row how many times faster it is than the peers, warm and cold.

    "best compiled" is the fastest of the compiled peers, which best_compiled and
    cold_best_compiled name.
    """
    for row in rows:
        if row["side"] != "backend":
            continue
        same = {
            other["name"]: other
            for other in rows
            if other["side"] == "peer"
            and (other["operator"], other["dtype"]) == (row["operator"], row["dtype"])
        }
        compiled = [same[name] for name in COMPILED if name in same]
        for time_of, target, name_of in (
            ("p50_us", "times_faster_than", "best_compiled"),
            ("cold_p50_us", "cold_times_faster_than", "cold_best_compiled"),
        ):
            if time_of not in row:
                continue
            faster = {
                name: other[time_of] / row[time_of]
                for name, other in same.items()
                if time_of in other
            }
            if compiled:
                best = min(compiled, key=lambda other: other[time_of])
                faster["best compiled"] = best[time_of] / row[time_of]
                row[name_of] = best["name"]
            row[target] = faster


def count_work(
    rows: list[Row],
    contest: Contest,
    judge: Judge,
    point: Point,
    options: Options,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    """What the point's operators have to do, by operator and dtype; adds to each row its share of
    the ceilings. The teacher, another model, and the CPU, another machine, get none."""
    work: dict[str, Any] = {
        "beams_that_need_a_head": judge.walk.heads_per_level,
        "children_of_these_beams": judge.walk.logits_per_level,
    }
    for operator in point.operators:
        walk, spec = judge.walk, contest.spec
        work[operator] = {
            "flop": point.batch * least_flop(spec, options.tokens, walk, operator),
            "dense_flop": point.batch * dense_flop(spec, options.tokens, point.num_beams, operator),
        }
        for dtype in options.dtypes:
            work[operator][dtype_name(dtype)] = launch_bytes(
                contest.packed(dtype),
                contest.statistics,
                walk,
                batch=point.batch,
                tokens=options.tokens,
                num_beams=point.num_beams,
                k=options.k,
                operator=operator,
            )
    for row in rows:
        if row["name"] == "teacher" or row["timed"] == TIMED["wall"]:
            continue
        counted = work[row["operator"]]
        done = {"flop": counted["flop"], "bytes": counted[row["dtype"]]}
        row |= of_ceilings(done, row["p50_us"] / 1e6, ceilings, row["dtype"])
    return work


def add_energy(rows: list[Row], entries: Sequence[Entry], batch: int) -> list[Left]:
    """Adds joules and watts to the rows of replayed `decode_states`; why not, where it cannot."""
    for entry, row in zip(entries, rows, strict=True):
        if entry.who.timed != "graph" or entry.operator != "decode_states":
            continue
        try:
            energy = gpu_energy.energy_of(entry.run, row["p50_us"])
        except gpu_nvml.Unavailable as error:
            return [{"name": "energy", "why": str(error)}]
        row["joules_per_thousand_users"] = energy.joules / (energy.runs * batch) * 1000
        row["watts"] = energy.joules / energy.seconds
    return []
