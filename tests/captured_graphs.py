"""What tests of captured graphs share: problems, models, graphs that are calls, and serving while
catalogues change."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp_kernels import graphs, graphs_by_size
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.recommendations import PackedResults
from sidmlp_kernels.serving_state import settings_of
from sidmlp_kernels.testing import Problem, assert_results_equal, make_problem

SIZES = (3, 8)
TOKENS = 12
CYCLES = 200_000_000  # about 0.1 s


class FakeEvent:
    """Of work that has ended unless a test says otherwise."""

    ended = True
    waited = 0

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.waited += 1


class FakeGraph:
    """Calls the operators on the static inputs where a graph would be replayed."""

    made: list[FakeGraph]

    def __init__(self, plan: DecodePlan, make_inputs: Callable[[DecodePlan], Any]) -> None:
        self.plan, self.done = plan, FakeEvent()
        self.inputs = make_inputs(plan)
        self.results = self.inputs.decode(plan)
        self.size = self.results.size
        self.runs, self.busy = 0, threading.Lock()
        self.made.append(self)

    def run(self, load: Callable[[Any], None], out: Tensor | None = None) -> PackedResults:
        assert self.busy.acquire(blocking=False), "two threads on the same static buffers"
        self.runs += 1
        load(self.inputs)
        self.results.memory.copy_(self.inputs.decode(self.plan).memory)
        if out is None:
            out = self.results.memory.clone()
        else:
            out.copy_(self.results.memory)
        self.busy.release()
        return dataclasses.replace(self.results, memory=out)


def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    """For a fixture: FakeGraphs where graphs would be captured, in the order that they are made."""
    monkeypatch.setattr(graphs_by_size, "CapturedGraph", FakeGraph)
    FakeGraph.made = []
    yield FakeGraph.made
    FakeGraph.made = []


def make(seed: int = 0, **options: Any) -> Problem:
    return make_problem(seed=seed, **({"batch": 8, "tokens": TOKENS, "excluded": 6} | options))


def make_model(problem: Problem, backend: str = "cpu", device: Any = "cpu") -> sk.Recommender:
    return sk.Recommender(problem.student, problem.catalogue, None, device, "float32", backend)


def other_catalogue(problem: Problem, number: int) -> sk.Catalogue:
    """With other items in other places, and ids that no other catalogue has."""
    sizes = problem.spec.codes_per_level
    codes = np.random.default_rng(number).integers(0, sizes, (300, len(sizes)))
    return sk.Catalogue.from_codes(codes, 10**6 * number + np.arange(300), sizes)


def fields(recs: sk.Recommendations) -> tuple[Tensor, ...]:
    return recs.items, recs.scores, recs.codes, recs.counts


def assert_same(got: sk.Recommendations, wanted: sk.Recommendations, where: object = "") -> None:
    assert_results_equal(fields(got), fields(wanted), where=where, wanted_is="decode_states'")
    assert got.catalogue_version == wanted.catalogue_version, where


def copied(recs: sk.Recommendations) -> sk.Recommendations:
    return sk.Recommendations(*(t.clone() for t in fields(recs)), recs.catalogue_version)


def run_threads(*targets: Any) -> None:
    """Runs them at the same time; raises what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(target: Any) -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def capture(model: sk.Recommender, **options: Any) -> graphs.GraphDecoder:
    """As model.capture, which refuses models on the CPU."""
    settings = settings_of(model.defaults, options.pop("k", 10), 10, None, None, None)
    arguments = {"batch_sizes": SIZES, "tokens": TOKENS, "states_dtype": None, "max_excluded": 0}
    return graphs.GraphDecoder(model, settings, **(arguments | options))


def first_rows(recs: sk.Recommendations, batch: int) -> sk.Recommendations:
    return sk.Recommendations(*(t[:batch] for t in fields(recs)), recs.catalogue_version)


def serve_while_swapping(model: sk.Recommender, problem: Problem, streams: list[Any]) -> None:
    """Threads decode, one for each stream, while this one swaps and changes stock; every answer
    must be that of the version that it carries."""
    catalogues = [other_catalogue(problem, number) for number in range(1, 4)]
    place = model.device
    requests = [problem.rows(torch.roll(torch.arange(8), n)[: 8 - n]) for n in range(len(streams))]
    inputs = [(p.states.to(place), p.mask.to(place)) for p in requests]
    wanted: list[dict[int, sk.Recommendations]] = []
    for mine in inputs:
        wanted.append({})
        for catalogue in catalogues:
            model.swap(catalogue)
            wanted[-1][catalogue.version] = model.decode_states(*mine, num_beams=10)
    decoder = capture(model)
    answers: list[list[sk.Recommendations]] = [[] for _ in streams]
    stop = threading.Event()

    def serve(n: int) -> None:
        with torch.cuda.stream(streams[n]):  # None: the thread's own
            while not stop.is_set():
                answers[n].append(decoder.decode_states(*inputs[n]))
            if streams[n] is not None:
                streams[n].synchronize()

    def swap() -> None:
        try:
            for turn in range(24):
                model.swap(catalogues[turn % 3])
                seen = [len(mine) for mine in answers]
                for _ in range(2000):  # until every thread has met this catalogue
                    if all(len(a) > n + 1 for a, n in zip(answers, seen, strict=True)):
                        break
                    stop.wait(0.001)
                if turn % 4 == 0:
                    decoder.refresh()
        finally:
            stop.set()

    run_threads(swap, *(lambda n=n: serve(n) for n in range(len(streams))))
    for mine, right in zip(answers, wanted, strict=True):
        assert {recs.catalogue_version for recs in mine} == set(right)
        for number, recs in enumerate(mine):
            assert_same(recs, right[recs.catalogue_version], f"answer {number}")
