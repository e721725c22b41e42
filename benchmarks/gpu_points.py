"""One point of bench_decode_gpu: everyone verified, then timed, at one batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_timing as timing
import torch
from common import ROOT
from decode_catalogues import BEAUTY
from decode_checks import Judge, VerificationError
from decode_variants import PUBLISHED_SIZES, TOKENS, Contest, dtype_name
from gpu_participants import COMPILED, PEERS, Calls, Participant, backend_calls, peers

from sidmlp_kernels import Recommender

CELL_PHONES = "cell_phones_sids"
# The points that matter most come first, in case the time does not reach for all.
BATCHES = (32, 512, 1, 8, 128, 4096)
EXTRA_PEERS = ("autotuned", "definition")  # slow to compile: only where EXTRA_BATCHES say
EXTRA_BATCHES = (32, 512)
HOST_BATCHES = (1, 32)
JUDGED = 8
WARMUP = 3

Left = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure, and how much effort to spend.

    compile_seconds  no peer is compiled any more once this much went into it, and none of
                     EXTRA_PEERS once half of it did: the others are wanted at every point
    seconds          no point is begun after so many
    """

    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    peers: tuple[str, ...] = PEERS
    catalogues: tuple[str, ...] = (BEAUTY, CELL_PHONES)
    batches: tuple[int, ...] = BATCHES
    cold: bool = True
    quick: bool = False
    device: str = "cuda"
    data: Path = ROOT.parent / "shared" / "data"
    sizes: dict[str, Any] = field(default_factory=lambda: dict(PUBLISHED_SIZES))
    tokens: int = TOKENS
    k: int = 10
    num_beams: int = 50
    rounds: int = 40
    cold_rounds: int = 60
    point_seconds: float = 5.0
    compile_seconds: float = 200.0
    seconds: float = 340.0


@dataclass
class Clock:
    """How long the benchmark has run, and how much of it went into compiling peers."""

    begin: float = field(default_factory=time.perf_counter)
    compiling: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin


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


def verified_entries(who: Participant, calls: Calls, judge: Judge) -> list[Entry]:
    """The participant's calls, captured where graphs are timed; VerificationError if wrong."""
    entries = []
    for operator, call in calls.items():
        captured = timing.captured(call) if who.graph else None
        run = captured.replay if captured is not None else call
        returned = run()  # a replay returns nothing: it writes its outputs again
        outputs: Any = returned if captured is None else captured.outputs
        name = f"{operator}, {who.name}, {dtype_name(who.dtype)}"
        results = tuple(tensor.cpu() for tensor in outputs)
        verified = judge.check(name, results, who.dtype)
        entries.append(Entry(operator, who, run, verified, (call, captured)))
    return entries


def participants(
    contest: Contest,
    models: dict[tuple[str, torch.dtype], Recommender],
    inputs: dict[torch.dtype, Any],
    mask: Any,
    options: Options,
    extra: bool,
) -> list[Participant]:
    """Everyone at one point, backends first."""
    names = [name for name in options.peers if extra or name not in EXTRA_PEERS]
    found = []
    for (backend, dtype), model in models.items():
        make = lambda m=model, x=inputs[dtype]: backend_calls(  # noqa: E731
            m, x, mask, options.k, options.num_beams
        )
        found.append(Participant(backend, "backend", dtype, True, make))
    for dtype, x in inputs.items():
        found += peers(
            contest.reference, dtype, x, mask, k=options.k, num_beams=options.num_beams, names=names
        )
    return found


def gather(
    everyone: Sequence[Participant], judge: Judge, options: Options, clock: Clock
) -> tuple[list[Entry], list[Left]]:
    """The verified entries of everyone who can run, and who cannot and why."""
    entries: list[Entry] = []
    left: list[Left] = []
    for who in everyone:
        gone = {"name": who.name, "dtype": dtype_name(who.dtype)}
        compiles = who.name in COMPILED
        allowed = options.compile_seconds * (0.5 if who.name in EXTRA_PEERS else 1.0)
        if compiles and clock.compiling > allowed:
            left.append({**gone, "why": f"{allowed:.0f} s of compiling are over"})
            continue
        begin = time.perf_counter()
        try:
            entries += verified_entries(who, who.make(), judge)
        except VerificationError:
            raise
        except Exception as error:  # out of memory, or whatever a compiler raises
            lines = str(error).strip().splitlines() or [""]
            left.append({**gone, "why": f"{type(error).__name__}: {lines[0]}"[:300]})
        if compiles:
            clock.compiling += time.perf_counter() - begin
    return entries, left


def timed_rows(entries: Sequence[Entry], batch: int, options: Options) -> tuple[list[dict], dict]:
    """One JSON object for each entry, and the times of an empty graph."""
    empty = timing.empty_graph()
    graphs = {e.key: e.run for e in entries if e.who.graph} | {"empty": empty.replay}
    replays = {key: timing.replays_per_sample(run) for key, run in graphs.items()}
    samplers: dict[str, Callable[[], float]] = {
        key: lambda run=run, n=replays[key]: timing.warm_sample(run, n)
        for key, run in graphs.items()
    }
    for entry in entries:
        if not entry.who.graph:
            samplers[entry.key] = lambda run=entry.run: timing.call_sample(run)
    warm = timing.sampled(
        samplers, rounds=options.rounds, warmup=WARMUP, max_seconds=options.point_seconds
    )
    cold: dict[str, Any] = {}
    if options.cold:
        flush = timing.flush_buffer()
        cold = timing.sampled(
            {key: lambda run=run: timing.cold_sample(run, flush) for key, run in graphs.items()},
            rounds=options.cold_rounds,
            warmup=WARMUP,
            max_seconds=options.point_seconds,
        )

    def times(key: str) -> dict[str, Any]:
        found = {"p50_us": warm[key].median, "p99_us": warm[key].p99}
        found["samples"] = len(warm[key].samples)
        if key in replays:
            found["replays_per_sample"] = replays[key]
        if key in cold:
            found |= {"cold_p50_us": cold[key].median, "cold_p99_us": cold[key].p99}
        return found

    rows = [
        {
            "key": entry.key,
            "operator": entry.operator,
            "name": entry.who.name,
            "side": entry.who.side,
            "dtype": dtype_name(entry.who.dtype),
            "timed": "graph replay" if entry.who.graph else "call",
            "verified": entry.verified,
            **times(entry.key),
            "users_per_s": batch / warm[entry.key].median * 1e6,
        }
        for entry in entries
    ]
    return rows, times("empty")


def compare(rows: list[dict[str, Any]]) -> None:
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


def host_costs(
    models: dict[tuple[str, torch.dtype], Recommender],
    inputs: dict[torch.dtype, Any],
    mask: Any,
    options: Options,
) -> dict[str, float]:
    """Median microseconds of Python for each call on warm shapes; torch.mul as a yardstick."""
    calls: dict[str, Callable[[], object]] = {}
    for (backend, dtype), model in models.items():
        x, suffix = inputs[dtype], f"{backend}-{dtype_name(dtype)}"
        operators = backend_calls(model, x, mask, options.k, options.num_beams)
        for operator, call in operators.items():
            calls[f"plan.{operator}-{suffix}"] = call
        calls[f"Recommender.decode_states-{suffix}"] = lambda m=model, x=x: m.decode_states(
            x, mask, k=options.k, num_beams=options.num_beams
        )
    one = torch.ones(1, device=options.device)
    calls["torch.mul"] = lambda: torch.mul(one, one)
    found = timing.sampled(
        {name: lambda call=call: timing.host_sample(call) for name, call in calls.items()},
        rounds=options.rounds,
        warmup=WARMUP,
        max_seconds=options.point_seconds,
    )
    return {name: times.median for name, times in found.items()}


def measure(
    contest: Contest,
    models: dict[tuple[str, torch.dtype], Recommender],
    batch: int,
    options: Options,
    clock: Clock,
    extra: bool,
) -> tuple[dict[str, Any], list[Left]]:
    """One point: everyone verified, then timed; its JSON object and who was left out."""
    states, mask = contest.requests(batch)
    judge = Judge(
        contest.reference,
        states,
        mask,
        k=options.k,
        num_beams=options.num_beams,
        dtypes=options.dtypes,
        requests=JUDGED,
    )
    inputs = {dtype: states.to(options.device, dtype) for dtype in options.dtypes}
    on_device = mask.to(options.device)
    torch.compiler.reset()  # every point gets its own code, not one for changing shapes
    everyone = participants(contest, models, inputs, on_device, options, extra)
    entries, left = gather(everyone, judge, options, clock)
    rows, empty = timed_rows(entries, batch, options)
    compare(rows)
    point = {"batch": batch, "variants": rows, "empty_graph": empty}
    if batch in HOST_BATCHES:
        running = {(e.who.name, e.who.dtype) for e in entries}
        able = {key: model for key, model in models.items() if key in running}
        point["host_us"] = host_costs(able, inputs, on_device, options)
    return point, left
