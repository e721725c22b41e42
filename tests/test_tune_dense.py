"""tune_dense without a GPU: its arithmetic, and a rehearsal on the CPU."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import SIZES, pretend_gpu, scripts

from sidmlp_kernels.plan import DENSE_FAN_OUT, DecodePlan

MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "decode_variants",
    "gpu_nvml",
    "gpu_timing",
    "gpu_energy",
    "tune_dense",
)


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts(MODULES)


def point(share: float, dense: float, sparse: float) -> dict[str, float]:
    return {"share": share, "dense_p50_us": dense, "sparse_p50_us": sparse}


def test_only_one_level_branches(modules: SimpleNamespace) -> None:
    assert modules.tune_dense.nodes_of((16, 16, 16), 2, 3) == (16, 48, 48)
    assert modules.tune_dense.nodes_of((16, 16, 16), 3, 5) == (16, 16, 80)


def test_crossing(modules: SimpleNamespace) -> None:
    crossing = modules.tune_dense.crossing
    falling = [point(0.01, 40, 10), point(0.04, 10, 40), point(0.16, 10, 90)]
    assert crossing(falling) == pytest.approx(0.02)  # half way of the logarithms
    assert crossing(falling[::-1]) == crossing(falling)
    assert crossing(falling[1:]) == 0
    assert crossing(falling[:1]) is None


def test_threshold(modules: SimpleNamespace) -> None:
    """Two batches that disagree: what they lose together decides."""
    script = modules.tune_dense
    points = [point(0.01, 20, 10), point(0.04, 10, 40), point(0.01, 20, 10), point(0.04, 12, 10)]
    assert script.loss(points, 0.02) == pytest.approx(1.2**0.25)
    assert script.loss(points, 0.1) == pytest.approx(4**0.25)
    threshold, least = script.best_threshold(points)
    assert threshold == pytest.approx(0.02)
    assert least == pytest.approx(1.2**0.25)


@pytest.mark.parametrize(
    "wrong", [{"levels": (1,)}, {"levels": (5,)}, {"fan_outs": (257,)}, {"batches": ()}]
)
def test_wrong_options_are_named(modules: SimpleNamespace, wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"{name}: expected numbers in .*, got"):
        modules.tune_dense.Options(**wrong)


def test_without_the_backend(
    modules: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.tune_dense, "why_not", lambda backend: "no GPU is there")
    assert modules.tune_dense.main([]) == 2
    assert "the cuda backend cannot run here: no GPU is there" in capsys.readouterr().err


@pytest.fixture
def small(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    pretend_gpu(modules, monkeypatch)
    sizes = {**SIZES, "codes_per_level": (16, 16, 16)}
    return modules.tune_dense.Options(
        "cpu", (2, 3), (2, 8), (1, 40), sizes, num_beams=6, k=4, device="cpu"
    )


def test_rehearsal(modules: SimpleNamespace, small: Any, tmp_path: Path) -> None:
    """Each catalogue decodes with its level in both forms, each form verified."""
    script = modules.tune_dense
    report, said, path = script.new_report(small, None), [], tmp_path / "report.json"
    with torch.no_grad():
        script.run(small, report, lambda: modules.common.write_json(path, report), said.append)
    assert report["setting"]["threshold"] == DENSE_FAN_OUT["cpu"]
    found = [(p["level"], p["fan_out"], p["batch"]) for p in report["results"]]
    assert found == [(level, f, batch) for level in (2, 3) for f in (2, 8) for batch in (1, 40)]
    assert [cross["share"] for cross in report["crossings"]] == [0.0] * 4  # all times are equal
    assert report["loss"] == report["loss_as_it_is"] == 1
    assert json.loads(path.read_text())["results"] == report["results"]
    assert "as it is 50.0%: 1.000" in said


def test_graphs_keep_what_they_read(
    modules: SimpleNamespace, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph knows addresses only: weights and inputs of both forms live until they are timed."""

    def forgetful(call: Any) -> Any:
        read = [weakref.ref(value) for value in call.__defaults__]

        def replay() -> None:
            assert len(read) == 2
            assert all(one() is not None for one in read), "the graph reads what was freed"

        return SimpleNamespace(replay=replay, outputs=call())

    monkeypatch.setattr(modules.gpu_timing, "captured", forgetful)
    with torch.no_grad():
        assert len(modules.tune_dense.Bench(small).measure(2, 2)) == len(small.batches)


def test_a_wrong_form_is_not_timed(
    modules: SimpleNamespace, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DecodePlan.beam_decode

    def sparse_is_wrong(plan: DecodePlan, context: torch.Tensor) -> Any:
        items, scores, codes, counts = decode(plan, context)
        return items, scores + (not plan.levels[1].dense), codes, counts

    monkeypatch.setattr(DecodePlan, "beam_decode", sparse_is_wrong)
    bench = modules.tune_dense.Bench(small)
    with (
        torch.no_grad(),
        pytest.raises(modules.decode_checks.VerificationError, match="8 children, sparse"),
    ):
        bench.measure(2, 8)
