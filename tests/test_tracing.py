"""NVTX ranges: off by default, nested, popped whatever happens, never in compiled code."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from captured_graphs import make, make_model, other_catalogue
from small_recommender import TOKENS, make_catalogue, make_encoder, make_student

from sidmlp_kernels import Recommender, tracing
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import assert_results_equal


class FakeNvtx:
    """Records what torch.cuda.nvtx would be asked to do."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []  # the whole stack at each push

    def range_push(self, message: str) -> int:
        self.open.append(message)
        self.seen.append(tuple(self.open))
        return len(self.open) - 1

    def range_pop(self) -> int:
        self.open.pop()
        return len(self.open)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvtx]:
    """Tracing on, into a fake."""
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    tracing.enable()
    yield fake
    tracing.disable()
    assert not fake.open, "a range was left open"


class Halves:
    """Marked methods."""

    @tracing.traced("inner")
    def inner(self, number: int) -> int:
        """Halves even numbers."""
        if number % 2:
            raise ValueError("odd")
        return number // 2

    @tracing.traced("outer")
    def outer(self, number: int, *, twice: bool = False) -> int:
        found = self.inner(number)
        return self.inner(found) if twice else found

    @tracing.traced("switch")
    def switch(self) -> None:
        tracing.disable()


halves = Halves()


def test_off_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    tracing.disable()  # SIDMLP_NVTX may have been set for the tests
    assert halves.outer(8, twice=True) == 2
    assert not fake.seen


def test_ranges_nest(nvtx: FakeNvtx) -> None:
    assert tracing.enabled()
    assert halves.outer(8, twice=True) == 2
    assert nvtx.seen == [
        ("sidmlp.outer",),
        ("sidmlp.outer", "sidmlp.inner"),
        ("sidmlp.outer", "sidmlp.inner"),
    ]
    tracing.disable()
    halves.outer(8)
    assert len(nvtx.seen) == 3


def test_an_exception_closes_its_ranges(nvtx: FakeNvtx) -> None:
    with pytest.raises(ValueError, match="odd"):
        halves.outer(6, twice=True)
    assert nvtx.seen == [("sidmlp.outer",), *2 * [("sidmlp.outer", "sidmlp.inner")]]
    assert not nvtx.open


def test_whoever_disables_inside_a_range_still_closes_it(nvtx: FakeNvtx) -> None:
    halves.switch()
    assert nvtx.seen == [("sidmlp.switch",)]
    assert not nvtx.open


def test_off_leaves_the_methods_as_they_were_written(nvtx: FakeNvtx) -> None:
    """Hence off costs nothing; on, names and documentation stay."""
    methods = [(method.owner, method.name) for method in tracing._methods]
    assert {(Halves, "inner"), (Recommender, "decode"), (DecodePlan, "beam_decode")} <= {*methods}
    for owner, name in methods:
        assert hasattr(vars(owner)[name], "__wrapped__"), name
    assert Halves.inner.__doc__ == "Halves even numbers."
    assert "k best items" in (Recommender.decode.__doc__ or "")
    tracing.disable()
    for owner, name in methods:
        assert not hasattr(vars(owner)[name], "__wrapped__"), name


def test_a_class_made_while_tracing_is_on(nvtx: FakeNvtx) -> None:
    class Late:
        @tracing.traced("late")
        def __init__(self) -> None:
            self.made = True

    assert Late().made
    assert nvtx.seen == [("sidmlp.late",)]
    tracing.disable()
    assert Late().made
    assert len(nvtx.seen) == 1


def test_calls_of_a_recommender(nvtx: FakeNvtx) -> None:
    model = Recommender(make_student(), make_catalogue(), make_encoder(), "cpu", tokens=TOKENS)
    batch = model.batch([[100, 101], []])
    nvtx.seen.clear()

    model.decode(batch, k=2, num_beams=4)
    assert nvtx.seen == [("sidmlp.decode",), ("sidmlp.decode", "sidmlp.plan.recommend")]
    nvtx.seen.clear()
    plain = Recommender(
        make_student(),
        make_catalogue(),
        make_encoder(),
        "cpu",
        tokens=TOKENS,
        encoder_form="torch",
    )
    plain.decode(batch, k=2, num_beams=4)
    assert nvtx.seen == [
        ("sidmlp.decode",),
        ("sidmlp.decode", "sidmlp.encoder"),
        ("sidmlp.decode", "sidmlp.plan.decode_states"),
    ]
    nvtx.seen.clear()
    states = torch.zeros(1, 2, 16)
    model.decode_states(states, torch.ones(1, 2, dtype=torch.bool), k=2, num_beams=4)
    model.beam_decode(torch.zeros(1, 16), k=2, num_beams=4)
    model.swap(make_catalogue(1))
    model.set_available([100], False)
    assert nvtx.seen == [
        ("sidmlp.decode_states",),
        ("sidmlp.decode_states", "sidmlp.plan.decode_states"),
        ("sidmlp.beam_decode",),
        ("sidmlp.beam_decode", "sidmlp.plan.beam_decode"),
        ("sidmlp.swap",),
        ("sidmlp.set_available",),
    ]
    nvtx.seen.clear()
    with pytest.raises(ValueError, match="encoder_states"):
        model.decode_states(states[0], torch.ones(1, 2, dtype=torch.bool))
    assert nvtx.seen == [("sidmlp.decode_states",)]


def test_traced_calls_answer_the_same(nvtx: FakeNvtx, backend: str, device: torch.device) -> None:
    problem = make(1)
    plan = problem.plan(backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    got = plan.decode_states(states, mask)
    context = plan.context_readout(states, mask)
    assert [stack[-1] for stack in nvtx.seen] == [
        "sidmlp.plan.decode_states",
        "sidmlp.plan.context_readout",
    ]
    from_context = plan.beam_decode(context)
    tracing.disable()
    assert_results_equal(got, plan.decode_states(states, mask), where="decode_states")
    assert_results_equal(from_context, plan.beam_decode(context), where="beam_decode")


def test_compiled_code_has_no_ranges(nvtx: FakeNvtx, backend: str, device: torch.device) -> None:
    """And no graph breaks, whether tracing is switched before the call or after."""
    problem = make(2)
    model = make_model(problem, backend=backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)

    def call() -> list[torch.Tensor]:
        found = model.decode_states(states, mask, k=5, num_beams=10)
        return [found.items, found.scores, found.codes, found.counts]

    wanted = call()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    nvtx.seen.clear()
    assert_results_equal(compiled(), wanted, where="compiled while tracing is on")
    tracing.disable()
    assert_results_equal(compiled(), wanted, where="compiled, tracing switched off")
    tracing.enable()
    assert_results_equal(compiled(), wanted, where="compiled, tracing on again")
    assert not nvtx.seen


def test_captures_and_replays_are_ranges(nvtx: FakeNvtx, cuda: torch.device) -> None:
    problem = make(3)
    model = make_model(problem, "auto", cuda)
    decoder = model.capture(batch_sizes=(8,), tokens=problem.mask.shape[1], k=5, num_beams=10)
    assert nvtx.seen[0] == ("sidmlp.graphs.capture",)
    inside = ("sidmlp.graphs.capture", "sidmlp.plan.decode_states")
    assert nvtx.seen[1:] == 2 * [inside], "a warm-up and the capture"
    nvtx.seen.clear()
    decoder.decode_states(problem.states.to(cuda), problem.mask.to(cuda))
    model.swap(other_catalogue(problem, 1))
    assert nvtx.seen[:2] == [
        ("sidmlp.graphs.decode_states",),
        ("sidmlp.graphs.decode_states", "sidmlp.graphs.replay"),
    ]
    assert nvtx.seen[-1] == ("sidmlp.swap",)


def test_real_ranges_on_a_gpu(cuda: torch.device) -> None:
    problem = make(4)
    model = make_model(problem, "auto", cuda)
    states, mask = problem.states.to(cuda), problem.mask.to(cuda)
    wanted = model.decode_states(states, mask, k=5, num_beams=10)
    tracing.enable()
    try:
        got = model.decode_states(states, mask, k=5, num_beams=10)
    finally:
        tracing.disable()
    assert torch.equal(got.items, wanted.items)


# -- where there is no GPU


def test_enabling_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match=r"expected a CUDA build.*got torch.*unset SIDMLP_NVTX"):
        tracing.enable()
    assert not tracing.enabled()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "SIDMLP_NVTX=1 has no effect"),
        ("yes", "expected 0 or 1, got 'yes'"),
        ("0", None),
        ("", None),
    ],
)
def test_the_environment_without_a_gpu_only_warns(value: str, message: str | None) -> None:
    """In a process of its own: the variable is read at import."""
    code = """
import torch, sidmlp_kernels
from sidmlp_kernels import tracing
assert not tracing.enabled()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, tracing.VARIABLE: value, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    if message is None:
        assert tracing.VARIABLE not in done.stderr
    else:
        assert message in done.stderr


def test_the_environment_enables(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv(tracing.VARIABLE, "1")
    try:
        with caplog.at_level(logging.WARNING, logger="sidmlp_kernels"):
            tracing._from_environment()
        assert halves.outer(4) == 2
        assert [stack[-1] for stack in fake.seen] == ["sidmlp.outer", "sidmlp.inner"]
        assert not caplog.records
    finally:
        tracing.disable()
