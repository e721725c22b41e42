"""One point of bench_requests: everyone verified, then timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gpu_energy
import gpu_nvml
import gpu_power
import torch
from common import HOST_CLOCK
from decode_variants import Contest, dtype_name
from gpu_options import Clock, Left
from gpu_participants import Participant
from gpu_points import Models, gather
from gpu_rows import Entry, Row, timed_rows
from request_checks import StatesJudge, check_same_bits
from request_host import host_times
from request_inputs import Encoder, limits_us, requests_of
from request_options import RequestOptions, on_gpu
from request_peers import (
    OPERATORS,
    TorchHalves,
    backend_halves,
    forms_with_these_bits,
    participants,
)

from sidmlp_kernels.testing import time_interleaved


@dataclass(frozen=True)
class Point:
    """One measurement."""

    histories: str
    batch: int

    def __str__(self) -> str:
        return f"{self.histories} histories, batch {self.batch}"


@dataclass(eq=False)
class Peers:
    """Peers of the batch that is measured now: both kinds of histories share what is compiled."""

    contest: Contest
    encoder: Encoder
    options: RequestOptions
    batch: int = 0
    compiled: bool = False  # a call of this batch has been, so that another costs no time
    _made: dict[str, TorchHalves] = field(default_factory=dict)

    def of(self, name: str, batch: int) -> TorchHalves:
        """The peer `name`; compiled code of another batch is dropped."""
        if batch != self.batch:
            self._made, self.batch, self.compiled = {}, batch, False
            torch.compiler.reset()
        if name not in self._made:
            self._made[name] = TorchHalves(
                self.contest,
                self.encoder,
                self.options,
                peer_dtype(self.options),
                compiles=name == "compiled",
            )
        return self._made[name]


def peer_dtype(options: RequestOptions) -> torch.dtype:
    """Peers take part in one dtype, the first."""
    return options.dtypes[0]


def make_points(options: RequestOptions) -> list[Point]:
    """Batches in the order asked for, each with every kind of histories."""
    return [Point(kind, batch) for batch in options.batches for kind in options.histories]


def peers_at(point: Point, options: RequestOptions) -> list[str]:
    """Who stands beside us; the compiled peer where it is wanted."""
    compiles = point.batch in options.peer_batches
    return [
        name
        for name in ("plain", "compiled")
        if name in options.peers and (compiles or name == "plain")
    ]


def measure(
    point: Point,
    contest: Contest,
    models: Models,
    peers: Peers,
    options: RequestOptions,
    clock: Clock,
) -> tuple[dict[str, Any], list[Left]]:
    """One point's JSON object and who was left out."""
    first = next(iter(models.values()))
    encoder = peers.encoder
    requests = requests_of(
        point.histories, contest, first, point.batch, options.tokens, options.data
    )
    ids, mask, lengths = requests.ids.contiguous(), requests.mask.contiguous(), requests.lengths
    judge = StatesJudge(encoder, ids, mask, options.dtypes)
    seat = (ids, mask, contest, judge, options)

    everyone: list[Participant] = []
    for (backend, dtype), model in models.items():
        halves = backend_halves(model, options)
        everyone += participants(backend, "backend", dtype, halves, *seat)
    for name in peers_at(point, options):
        made = peers.of(name, point.batch)
        whole = lambda i, m, p=made: p.decode(p.encode(i, m), m)  # noqa: E731
        halves = made.encode, made.decode, whole
        everyone += participants(name, "peer", peer_dtype(options), halves, *seat)
    allowed = dataclasses.replace(options, compile_seconds=math.inf) if peers.compiled else options
    entries, left = gather(everyone, None, allowed, clock, OPERATORS)
    peers.compiled = sum(entry.who.name == "compiled" for entry in entries) == len(OPERATORS)
    for entry in entries:
        if entry.who.side == "backend":
            _run_twice(entry)

    if on_gpu(options):
        rows, empty = timed_rows(entries, point.batch, options)
    else:
        rows, empty = wall_rows(entries, point.batch, options), None
    compare(rows)
    result: dict[str, Any] = {
        "histories": point.histories,
        "batch": point.batch,
        "origin": requests.origin,
        "mean_tokens": sum(lengths) / len(lengths),
        "variants": rows,
    }
    if empty is not None:
        result["empty_graph"] = empty
        limits = limits_us(contest, encoder.spec, lengths, options.num_beams)
        result["arithmetic_limit_us"] = limits
        for row in rows:
            row["of_arithmetic_limit"] = limits[row["operator"]] / row["p50_us"]
    if options.energy:
        left += add_energy(rows, entries, point.batch, peers=point.histories != "real")
    running = {(entry.who.name, entry.who.dtype) for entry in entries}
    able = {key: model for key, model in models.items() if key in running}
    if empty is not None:  # the CPU has one form
        result["forms"] = {
            f"{name}-{dtype_name(dtype)}": forms_with_these_bits(
                model._need_encoder("decode"), ids, mask
            )
            for (name, dtype), model in able.items()
        }
    calls = options.host_calls.get(point.batch, 0)
    if calls:
        result["host"] = {
            f"{name}-{dtype_name(dtype)}": host_times(model, requests.histories, options, calls)
            for (name, dtype), model in able.items()
        }
    return result, left


def _run_twice(entry: Entry) -> None:
    """VerificationError unless a second run leaves the bits of the first."""
    name = f"{entry.operator}, {entry.who.name}"
    if entry.who.timed != "graph":
        check_same_bits(name, entry.run(), entry.run())
        return
    outputs = entry.keep[1].outputs
    entry.run()
    if isinstance(outputs, torch.Tensor):
        before: Any = outputs.clone()
    else:
        before = [tensor.clone() for tensor in outputs]
    entry.run()
    check_same_bits(name, before, outputs)


def wall_rows(entries: Sequence[Entry], batch: int, options: RequestOptions) -> list[Row]:
    """One JSON object for each entry, by the host's clock, call by call in turn."""
    calls = {entry.key: entry.run for entry in entries}
    if not calls:
        return []
    found = time_interleaved(
        calls, rounds=5 * options.rounds, warmup=2, max_seconds=options.point_seconds
    )
    return [
        {
            "key": entry.key,
            "operator": entry.operator,
            "name": entry.who.name,
            "side": entry.who.side,
            "dtype": dtype_name(entry.who.dtype),
            "timed": HOST_CLOCK,
            "verified": {k: v for k, v in entry.verified.items() if k != "invalid_rate"},
            "invalid_rate": entry.verified["invalid_rate"],
            "p50_us": found[entry.key].median,
            "p99_us": found[entry.key].p99,
            "samples": len(found[entry.key].samples),
            "users_per_s": batch / found[entry.key].median * 1e6,
        }
        for entry in entries
    ]


def compare(rows: list[Row]) -> None:
    """Adds to each backend's row how many times faster it is than each peer, whatever its dtype."""
    for row in rows:
        if row["side"] == "backend":
            row["times_faster_than"] = {
                other["name"]: other["p50_us"] / row["p50_us"]
                for other in rows
                if (other["side"], other["operator"]) == ("peer", row["operator"])
            }


def add_energy(rows: list[Row], entries: Sequence[Entry], batch: int, *, peers: bool) -> list[Left]:
    """Adds joules, watts and, for backends, the state of the power cap to the rows of whole
    requests; why not, where it cannot."""
    for entry, row in zip(entries, rows, strict=True):
        if entry.operator != "whole" or (row["side"] == "peer" and not peers):
            continue
        try:
            energy = gpu_energy.energy_of(entry.run, row["p50_us"])
            row["joules_per_thousand_users"] = energy.joules / (energy.runs * batch) * 1000
            row["watts"] = energy.joules / energy.seconds
            if row["side"] == "backend":
                row["power"] = gpu_power.power_state(entry.run, row["p50_us"])
        except gpu_nvml.Unavailable as error:
            return [{"name": "energy", "why": str(error)}]
    return []
