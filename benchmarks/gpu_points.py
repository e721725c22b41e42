"""One point of bench_decode_gpu: everyone verified, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gpu_timing as timing
import torch
from common import TWO_LAUNCHES
from decode_checks import Judge, VerificationError
from decode_variants import Contest, dtype_name
from gpu_axes import EXTRA_PEERS, Point
from gpu_options import Clock, Left, Options
from gpu_participants import (
    COMPILING,
    Calls,
    Participant,
    backend_calls,
    host_backend,
    peers,
)
from gpu_participants import teacher as teacher_of
from gpu_rows import WARMUP, Entry, add_energy, compare, count_work, timed_rows

from sidmlp_kernels import Recommender

HOST_BATCHES = (1, 32)
JUDGED = 8

Models = dict[tuple[str, torch.dtype], Recommender]  # by participant


def make_models(
    contest: Contest, options: Options, axes: Collection[str]
) -> tuple[Models, list[Left]]:
    """A Recommender for each backend and dtype, and which cannot be and why; with "batch" among the
    axes one in two launches, too."""
    models: Models = {}
    left: list[Left] = []
    wanted = [(backend, backend, 1) for backend in options.backends]
    if "cuda" in options.backends and "batch" in axes:
        wanted.append((TWO_LAUNCHES, "cuda", 2))
    for name, backend, launches in wanted:
        for dtype in options.dtypes:
            try:
                models[name, dtype] = Recommender(
                    contest.student,
                    contest.catalogue,
                    device=options.device,
                    dtype=dtype,
                    backend=backend,
                    launches=launches,
                )
            except (ValueError, RuntimeError) as error:
                left.append({"name": name, "dtype": dtype_name(dtype), "why": _reason(error)})
    return models, left


def invalid_rate(items: torch.Tensor, judge: Judge) -> float:
    """Share of the real items [B, k] that are not in the catalogue; 0 where there are none."""
    real = items[items >= 0]
    return float((judge.trie.positions(real) < 0).double().mean()) if len(real) else 0.0


def verified_entries(who: Participant, calls: Calls, judge: Judge | None) -> list[Entry]:
    """The participant's calls, captured where graphs are timed; VerificationError if wrong. The
    judge is needed for participants without a check of their own."""
    entries = []
    for operator, call in calls.items():
        captured = timing.captured(call) if who.timed == "graph" else None
        run = captured.replay if captured is not None else call
        returned = run()  # a replay returns nothing: it writes its outputs again
        outputs: Any = returned if captured is None else captured.outputs
        name = f"{operator}, {who.name}, {dtype_name(who.dtype)}"
        if who.check is not None:
            verified = who.check(outputs)
        else:
            assert judge is not None
            results = tuple(tensor.cpu() for tensor in outputs)
            verified = judge.check(name, results, who.dtype)
            verified["invalid_rate"] = invalid_rate(results[0], judge)
        if verified["invalid_rate"] > 0:
            raise VerificationError(
                f"{name}: expected items of the catalogue alone, got "
                f"{verified['invalid_rate']:.3%} others"
            )
        entries.append(Entry(operator, who, run, verified, (call, captured)))
    return entries


def participants(
    contest: Contest,
    models: Models,
    inputs: dict[torch.dtype, Any],
    mask: Any,
    options: Options,
    point: Point,
) -> list[Participant]:
    """Everyone at one point, backends first."""
    found = []
    for (name, dtype), model in models.items():
        if name == TWO_LAUNCHES and point.axis != "batch":
            continue
        make = lambda m=model, x=inputs[dtype]: backend_calls(  # noqa: E731
            m, x, mask, options.k, point.num_beams, point.operators
        )
        found.append(Participant(name, "backend", dtype, "graph", make))
    for dtype, x in inputs.items():
        if options.host_backend:
            host = host_backend(contest, dtype, point.batch, point.num_beams)
            found += [] if host is None else [host]
        found += peers(
            contest.reference,
            dtype,
            x,
            mask,
            k=options.k,
            num_beams=point.num_beams,
            names=point.peers,
        )
        if "teacher" in point.peers:
            sizes = (point.batch, options.k, point.num_beams)
            found.append(teacher_of(contest, dtype, *sizes, options.device, JUDGED))
    return found


def gather(
    everyone: Sequence[Participant],
    judge: Judge | None,
    options: Options,
    clock: Clock,
    operators: Sequence[str],
) -> tuple[list[Entry], list[Left]]:
    """The verified entries of everyone who can run, and who cannot and why."""
    entries: list[Entry] = []
    left: list[Left] = []
    for who in everyone:
        gone = {"name": who.name, "dtype": dtype_name(who.dtype)}
        compiles = who.name in COMPILING
        allowed = options.compile_seconds * (0.5 if who.name in EXTRA_PEERS else 1.0)
        if compiles and clock.compiling > allowed:
            left.append({**gone, "why": f"{allowed:.0f} s of compiling are over"})
            continue
        begin = time.perf_counter()
        try:
            calls = {name: call for name, call in who.make().items() if name in operators}
            entries += verified_entries(who, calls, judge)
        except VerificationError:
            raise
        except Exception as error:  # out of memory, or whatever a compiler raises
            left.append({**gone, "why": _reason(error)})
        if compiles:
            clock.compiling += time.perf_counter() - begin
    return entries, left


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def host_costs(
    models: Models, inputs: dict[torch.dtype, Any], mask: Any, options: Options, point: Point
) -> dict[str, float]:
    """Median microseconds of Python for each call on warm shapes; torch.mul as a yardstick."""
    calls: dict[str, Callable[[], object]] = {}
    for (name, dtype), model in models.items():
        x, suffix = inputs[dtype], f"{name}-{dtype_name(dtype)}"
        operators = backend_calls(model, x, mask, options.k, point.num_beams)
        for operator, call in operators.items():
            calls[f"plan.{operator}-{suffix}"] = call
        calls[f"Recommender.decode_states-{suffix}"] = lambda m=model, x=x: m.decode_states(
            x, mask, k=options.k, num_beams=point.num_beams
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
    models: Models,
    point: Point,
    options: Options,
    clock: Clock,
    ceilings: dict[str, Any],
) -> tuple[dict[str, Any], list[Left]]:
    """One point: everyone verified, then timed; its JSON object and who was left out."""
    states, mask = contest.requests(point.batch)
    judge = Judge(
        contest.reference,
        states,
        mask,
        k=options.k,
        num_beams=point.num_beams,
        dtypes=options.dtypes,
        requests=JUDGED,
    )
    inputs = {dtype: states.to(options.device, dtype) for dtype in options.dtypes}
    on_device = mask.to(options.device)
    torch.compiler.reset()  # every point gets its own code, not one for changing shapes
    everyone = participants(contest, models, inputs, on_device, options, point)
    entries, left = gather(everyone, judge, options, clock, point.operators)
    rows, empty = timed_rows(entries, point.batch, options)
    compare(rows)
    work = count_work(rows, contest, judge, point, options, ceilings)
    if point.energy:
        left += add_energy(rows, entries, point.batch)
    result = {
        "axis": point.axis,
        **point.where,
        "work": work,
        "variants": rows,
        "empty_graph": empty,
    }
    if point.axis == "batch" and point.batch in HOST_BATCHES:
        running = {(e.who.name, e.who.dtype) for e in entries}
        able = {key: model for key, model in models.items() if key in running}
        result["host_us"] = host_costs(able, inputs, on_device, options, point)
    return result, left
