"""One student and its requests for tune_triton: decoded, verified and timed with any tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_timing as timing
import torch
from common import ROOT
from decode_catalogues import BEAUTY, load_catalogue
from decode_checks import Judge, Results, VerificationError
from decode_variants import PUBLISHED_SIZES, TOKENS, Contest
from triton_candidates import Changes, applied

from sidmlp_kernels.ops.triton import tiles
from sidmlp_kernels.packing import pack
from sidmlp_kernels.plan import DecodePlan, make_plan

Graphs = dict[tuple[str, int], timing.Captured]  # by operator and batch

OPERATORS = ("beam_decode", "decode_states")
JUDGED = 8  # requests that are held against their sets in any case
ALONE = 8  # requests that are decoded alone
WARMUP = 3


@dataclass(frozen=True)
class Options:
    """What to measure; hidden width and beams follow from the row."""

    row: int = 0
    batches: tuple[int, ...] = (1, 32, 128, 512, 4096)
    operators: tuple[str, ...] = OPERATORS
    data: Path = ROOT.parent / "shared" / "data"
    sizes: dict[str, Any] = field(default_factory=lambda: dict(PUBLISHED_SIZES))
    tokens: int = TOKENS
    k: int = 10
    num_beams: int = 50
    rounds: int = 20
    point_seconds: float = 2.0
    device: str = "cuda"
    backend: str = "triton"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and states."""
        return torch.bfloat16 if tiles.TABLE[self.row].half else torch.float32


class Bench:
    """One student and its requests, decoded with whatever tiles the table says."""

    def __init__(self, options: Options, requests: int) -> None:
        self.options = options
        self.items = load_catalogue(BEAUTY, options.data)
        self.contest = Contest(
            self.items, requests, sizes=options.sizes, tokens=options.tokens, k=options.k
        )
        # Rounded, so that every dtype starts from the same numbers. Contexts are the reference's:
        # no candidate's beam search depends on its readout.
        self.states, self.mask = self.contest.states.bfloat16().float(), self.contest.mask
        self.contexts = self.contest.reference.student.context(self.states, self.mask)
        self.packed = pack(self.contest.student, options.dtype).to(options.device)

    def plan(self) -> DecodePlan:
        """A new plan."""
        ones = [1.0] * self.contest.spec.num_levels
        return make_plan(
            self.packed,
            self.contest.catalogue.snapshot(),
            self.options.backend,
            k=self.options.k,
            num_beams=self.options.num_beams,
            temperatures=ones,
            level_weights=ones,
        )

    def call(
        self, plan: DecodePlan, operator: str, requests: Sequence[int]
    ) -> Callable[[], Results]:
        """A call of the operator on these requests."""
        rows, device = torch.as_tensor(requests), self.options.device
        if operator == "beam_decode":
            context = self.contexts[rows].to(device)
            return lambda: plan.beam_decode(context)
        states, mask = self.states[rows].to(device, self.options.dtype), self.mask[rows].to(device)
        return lambda: plan.decode_states(states, mask)

    def requests(self, batch: int) -> list[int]:
        """The requests of a batch."""
        return [number % len(self.states) for number in range(batch)]

    def judge(self) -> Judge:
        """Of results for all requests."""
        options = self.options
        return Judge(
            self.contest.reference,
            self.states,
            self.mask,
            k=options.k,
            num_beams=options.num_beams,
            dtypes=(options.dtype,),
            requests=JUDGED,
        )

    def verified(self, name: str, judge: Judge) -> tuple[Graphs, dict[str, Any]]:
        """Graphs of every operator and batch with what to report; VerificationError if wrong."""
        plan, everyone = self.plan(), self.requests(len(self.states))
        graphs, about = {}, {}
        for operator in self.options.operators:
            title = f"{operator}, {name}"
            right = _on_cpu(self.call(plan, operator, everyone)())
            about[operator] = judge.check(title, right, self.options.dtype)
            for request in everyone[:ALONE]:
                _same_bits(title, self.call(plan, operator, [request])(), right, [request])
            for batch in self.options.batches:
                requests = self.requests(batch)
                graph = timing.captured(self.call(plan, operator, requests))
                graph.replay()
                _same_bits(title, graph.outputs, right, requests)
                graphs[operator, batch] = graph
        return graphs, about

    def times(self, graphs: Graphs, current: Graphs) -> list[dict[str, Any]]:
        """One JSON object for each graph, timed in turns with the current row's."""
        points = []
        for (operator, batch), graph in graphs.items():
            pair = {"candidate": graph.replay, "current": current[operator, batch].replay}
            replays = timing.replays_per_sample(pair["current"])
            found = timing.sampled(
                {
                    who: lambda run=run, n=replays: timing.warm_sample(run, n)
                    for who, run in pair.items()
                },
                rounds=self.options.rounds,
                warmup=WARMUP,
                max_seconds=self.options.point_seconds,
            )
            mine, theirs = found["candidate"], found["current"]
            points.append(
                {
                    "operator": operator,
                    "batch": batch,
                    "p50_us": mine.median,
                    "p99_us": mine.p99,
                    "current_p50_us": theirs.median,
                    "relative_time": mine.median / theirs.median,
                }
            )
        return points


def _on_cpu(results: Results) -> Results:
    items, scores, codes, counts = results
    return items.cpu(), scores.cpu(), codes.cpu(), counts.cpu()


def _same_bits(title: str, got: Results, right: Results, requests: Sequence[int]) -> None:
    rows = torch.as_tensor(requests)
    for tensor, all_rows in zip(_on_cpu(got), right, strict=True):
        if not torch.equal(tensor, all_rows[rows]):
            raise VerificationError(
                f"{title}: expected a request's bits not to depend on its batch, got others in a "
                f"batch of {len(requests)} than in one of {len(right[0])}; not timing it"
            )


def reason_of(error: BaseException) -> str:
    """One line that names the error. Triton's begin with a place, end with the cause, and the outer
    ones of several say nothing else."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    ends = dict.fromkeys((lines[0].strip(), lines[-1].strip()))
    return f"{type(error).__name__}: {' .. '.join(ends)}"[:300]


def compile_one(options: Options, changes: Changes, operator: str) -> str:
    """Fills Triton's cache by one call; returns why it cannot, or nothing."""
    torch.set_num_threads(1)  # many of these run side by side
    try:
        with torch.no_grad(), applied(options.row, changes):
            bench = Bench(options, requests=1)
            _on_cpu(bench.call(bench.plan(), operator, [0])())
    except Exception as error:  # whatever a compiler raises, or a GPU without so much memory
        return reason_of(error)
    return ""
