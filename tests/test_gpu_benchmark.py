"""bench_decode_gpu without a GPU: its peer, its rehearsal on the CPU backend, and its tables."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidmlp.beam import decode_states
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Timing, make_problem

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "decode_variants",
    "torch_peer",
    "gpu_timing",
    "gpu_participants",
    "gpu_points",
    "table_cells",
    "gpu_tables",
    "make_tables",
    "bench_decode_gpu",
)
SIZES = {
    "codes_per_level": (256, 256, 256, 256),
    "dim": 16,
    "attention_dim": 24,
    "num_heads": 2,
    "ffn_dim": 16,
    "hidden_dim": 32,
    "blocks_per_head": 1,
}


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The scripts as modules, importable as they are when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name)


# -- the peer


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_items": 3, "num_beams": 10, "k": 5},  # fewer items than k
        {"codes_per_level": (4, 4), "num_items": 60, "num_beams": 12, "k": 12},  # shared leaves
        {"unavailable": 0.4, "blocks_per_head": 2, "attention_dim": 32, "embedding_dim": 24},
    ],
)
def test_the_peer_decodes_as_the_reference(
    modules: SimpleNamespace, changes: dict[str, Any], folded: bool
) -> None:
    problem = make_problem(seed=3, batch=6, **changes)
    student = Student(StudentConfig(**problem.spec.to_dict())).eval().requires_grad_(False)
    student.load_state_dict(dict(problem.weights))
    trie = Trie.from_codes(
        problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
    )
    beams = problem.settings.num_beams
    peer = modules.torch_peer.TorchPeer(
        student,
        trie,
        k=problem.k,
        num_beams=beams,
        dtype=torch.float64,
        device="cpu",
        folded=folded,
    )
    states = problem.states.double()
    found = peer.decode_states(states, problem.mask)
    exact = student.double()
    wanted = decode_states(exact, states, problem.mask, trie, problem.k, beams)
    expected = (wanted.items, wanted.scores, wanted.codes, wanted.counts)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        if want.is_floating_point():
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        else:
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


# -- a rehearsal: the CPU backend in place of a GPU's, calls in place of graphs


@pytest.fixture
def rehearsal(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    timing = modules.gpu_timing

    def captured(call: Any) -> Any:
        outputs = [torch.empty_like(tensor) for tensor in call()]

        def replay() -> None:
            for kept, tensor in zip(outputs, call(), strict=True):
                kept.copy_(tensor)

        return SimpleNamespace(replay=replay, outputs=outputs)

    def sampled(samplers: dict[str, Any], **_: Any) -> dict[str, Timing]:
        return {name: Timing.of([sample(), 9.0]) for name, sample in samplers.items()}

    def sample(call: Any, *_: Any) -> float:
        call()
        return 5.0

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "empty_graph", lambda: captured(lambda: [torch.zeros(1)]))
    monkeypatch.setattr(timing, "sampled", sampled)
    monkeypatch.setattr(timing, "replays_per_sample", lambda replay: 3)
    for name in ("warm_sample", "cold_sample", "call_sample", "host_sample"):
        monkeypatch.setattr(timing, name, sample)
    monkeypatch.setattr(timing, "flush_buffer", lambda: torch.empty(1))
    monkeypatch.setattr(timing, "other_processes", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    return modules


def tiny_options(modules: SimpleNamespace, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "backends": ("cpu",),
        "dtypes": (torch.float32, torch.bfloat16),
        "peers": ("graph", "eager", "reference"),
        "batches": (3, 1),
        "device": "cpu",
        "data": Path("there is no such folder"),
        "sizes": SIZES,
        "tokens": 6,
    }
    return modules.gpu_points.Options(**{**arguments, **changes})


def rehearse(modules: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    bench, options = modules.bench_decode_gpu, tiny_options(modules, **changes)
    report = bench.new_report(options, [], "abc")
    with torch.no_grad():
        bench.run(options, report, lambda: None, lambda line: None)
    return report


def test_a_rehearsal_reports_every_point(rehearsal: SimpleNamespace, tmp_path: Path) -> None:
    report = rehearse(rehearsal)
    rehearsal.common.write_json(tmp_path / "decode-gpu-here.json", report)
    points = [(point["catalogue"], point["batch"]) for point in report["results"]]
    beauty, phones = report["catalogues"]
    assert points == [(beauty, 3), (beauty, 1), (phones, 3), (phones, 1)]
    assert report["left_out"] == []
    assert report["machine"]["commit"] == "abc"
    for point in report["results"]:
        keys = {row["key"] for row in point["variants"]}
        assert keys == {
            f"{operator}-{name}-{dtype}"
            for operator in ("beam_decode", "decode_states")
            for name in ("cpu", "graph", "eager", "reference")
            for dtype in ("float32", "bfloat16")
        }
        for row in point["variants"]:
            assert row["verified"]["requests"] == point["batch"]
            assert ("cold_p50_us" in row) == (row["name"] in ("cpu", "graph"))
            if row["side"] == "backend":
                assert set(row["times_faster_than"]) == {"graph", "eager", "reference"}
        assert ("host_us" in point) == (point["batch"] == 1)


def test_what_cannot_run_is_left_out_with_its_reason(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("no such compiler\nand more lines")

    monkeypatch.setattr(rehearsal.gpu_participants, "peer_calls", broken)
    report = rehearse(rehearsal, peers=("graph",), batches=(1,), catalogues=("amazon14_beauty",))
    assert [gone["why"] for gone in report["left_out"]] == [
        "NotImplementedError: no such compiler"
    ] * 2
    report = rehearse(rehearsal, peers=("compiled",), batches=(1,), compile_seconds=-1.0)
    assert {gone["why"] for gone in report["left_out"]} == {"-1 s of compiling are over"}
    report = rehearse(rehearsal, seconds=-1.0)
    assert report["results"] == []
    assert len(report["left_out"]) == 4


def test_a_wrong_backend_is_not_timed(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DecodePlan.beam_decode

    def wrong(self: DecodePlan, *arguments: Any) -> Any:
        items, scores, codes, counts = right(self, *arguments)
        return items, scores + 0.5, codes, counts

    monkeypatch.setattr(DecodePlan, "beam_decode", wrong)
    monkeypatch.setattr(rehearsal.gpu_timing, "sampled", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(rehearsal.decode_checks.VerificationError, match="beam_decode, cpu"):
        rehearse(rehearsal)


def test_company_on_the_gpu_is_refused(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal.gpu_timing, "other_processes", lambda: 2)
    with pytest.raises(RuntimeError, match="alone on the GPU, got 2"):
        rehearse(rehearsal)


def test_options_are_checked(modules: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench = modules.bench_decode_gpu

    def options(*words: str) -> Any:
        return bench.options_of(bench.parser().parse_args(words), ["cuda"])

    assert options().dtypes == (torch.bfloat16,)
    assert set(options().batches) == {1, 8, 32, 128, 512, 4096}
    quick = options("--quick", "--peers", "none", "--dtypes", "float32,bfloat16")
    assert (quick.cold, quick.peers, len(quick.catalogues)) == (False, (), 1)
    assert quick.dtypes == (torch.float32, torch.bfloat16)
    assert options("--batches", "7,9", "--no-cold").batches == (7, 9)
    for words in (["--peers", "eagle"], ["--batches", "0"], ["--dtypes", "int8"]):
        with pytest.raises(ValueError, match=words[0][2:]):
            options(*words)
    assert bench.main(["--backends", "cpu"]) == 2  # a CPU's backend has no place here
    assert "got 'cpu'" in capsys.readouterr().err


# -- tables


def gpu_report(modules: SimpleNamespace) -> dict[str, Any]:
    """As bench_decode_gpu leaves it, with made-up times."""

    def row(operator: str, name: str, side: str, p50: float, batch: int) -> dict[str, Any]:
        return {
            "key": f"{operator}-{name}-bfloat16",
            "operator": operator,
            "name": name,
            "side": side,
            "dtype": "bfloat16",
            "p50_us": p50,
            "p99_us": 2 * p50,
            "users_per_s": batch / p50 * 1e6,
            "cold_p50_us": 3 * p50,
        }

    results = []
    for batch in (32, 1):
        rows = [
            row(operator, name, side, p50, batch)
            for operator in ("beam_decode", "decode_states")
            for name, side, p50 in (
                ("cuda", "backend", 20.0),
                ("triton", "backend", 40.0),
                ("compiled", "peer", 300.0),
                ("autotuned", "peer", 250.0),
                ("graph", "peer", 500.0),
            )
        ]
        modules.gpu_points.compare(rows)
        empty = {"p50_us": 1.5, "cold_p50_us": 3.0}
        point = {"catalogue": "beauty", "batch": batch, "variants": rows, "empty_graph": empty}
        results.append({**point, "host_us": {"torch.mul": 3.0}})
    return {
        "kind": "decode-gpu",
        "complete": True,
        "machine": {"torch": "2.11", "commit": "abc"},
        "gpu": "Pretended GPU",
        "setting": {"dtypes": ["bfloat16"], "num_beams": 50},
        "catalogues": {"beauty": {"name": "beauty", "items": 12101}},
        "results": results,
        "left_out": [],
    }


README = """<!-- table:decode-gpu -->
<!-- /table -->
between
<!-- table:decode-gpu-states -->
<!-- /table -->
"""


def test_gpu_tables_compare_with_the_fastest_compiled_peer(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README)
    modules.common.write_json(results / "decode-gpu-here.json", gpu_report(modules))
    assert modules.make_tables.main(["--results", str(results), "--update", str(readme)]) == 0
    text = readme.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| 32 |")]
    assert lines == ["| 32 | 250 µs | 20 µs | 40 µs | 12.5x | 6.2x | 1,600,000 | 800,000 |"] * 2
    assert text.index("| 1 |") < text.index("| 32 |")
    assert "Pretended GPU" in text
    assert "12,101 items" in text
    made = modules.gpu_tables.decode_gpu_tables(gpu_report(modules))
    assert "| 32 | 750 µs | 60 µs | 120 µs | 12.5x | 6.2x |" in made["decode-gpu-cold"]
    assert "autotuned" in made["decode-gpu-peers"]
    assert "`torch.mul`" in made["decode-gpu-host"]


def test_gpu_tables_may_be_missing(modules: SimpleNamespace, tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(README.replace("-->\n<!-- /", "-->\nold\n<!-- /"))
    assert modules.make_tables.main(["--results", str(results), "--update", str(readme)]) == 0
    assert readme.read_text() == README


def test_a_point_without_compiled_peers_still_has_a_row(modules: SimpleNamespace) -> None:
    report = gpu_report(modules)
    for point in report["results"]:
        point["variants"] = [row for row in point["variants"] if row["side"] == "backend"]
        for row in point["variants"]:
            row["times_faster_than"] = {}
            del row["best_compiled"]
    made = modules.gpu_tables.decode_gpu_tables(report)
    assert "| 32 | - | 20 µs | 40 µs | - | - |" in made["decode-gpu"]
