"""The benchmark of whole requests without a GPU: on the CPU, and its GPU form rehearsed there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import GPU_SCRIPTS, REQUEST_SCRIPTS, SIZES, pretend_gpu, scripts
from captured_graphs import fake_graphs

from sidmlp_kernels import MLPEncoderSpec, Recommender, T5Spec
from sidmlp_kernels.encoder_plan import EncoderPlan
from sidmlp_kernels.plan import DecodePlan

ENCODER = {"num_layers": 2, "dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 24}


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts((*GPU_SCRIPTS, *REQUEST_SCRIPTS))


@pytest.fixture
def rehearsal(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    pretend_gpu(modules, monkeypatch)
    monkeypatch.setattr(modules.bench_requests, "on_gpu", lambda options: True)
    monkeypatch.setattr(modules.request_points, "on_gpu", lambda options: True)
    monkeypatch.setattr(modules.request_peers, "on_gpu", lambda options: True)
    power = {"limit_w": 700.0, "power_capped": True, "held_by": ["power cap"]}
    monkeypatch.setattr(
        modules.gpu_power, "power_state", lambda *_: {**power, "lowest_sm_clock_mhz": 1200}
    )
    monkeypatch.setattr(modules.bench_requests, "free_memory", lambda: None)
    return modules


def tiny_options(modules: SimpleNamespace, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "backends": ("cpu",),
        "dtypes": (torch.bfloat16,),
        "peers": ("plain",),
        "batches": (3, 1),
        "peer_batches": (),
        "host_calls": {3: 4},
        "device": "cpu",
        "data": Path("there is no such folder"),
        "sizes": SIZES,
        "encoder_sizes": ENCODER,
        "rounds": 2,
        "long_batches": (),
        "mlp_batches": (),
    }
    return modules.request_options.RequestOptions(**{**arguments, **changes})


def run(modules: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    bench, options = modules.bench_requests, tiny_options(modules, **changes)
    report = bench.new_report(options, [], "abc")
    with torch.no_grad():
        bench.run(options, report, lambda: None, lambda line: None)
    return report


def test_a_rehearsal_reports_every_point(rehearsal: SimpleNamespace, tmp_path: Path) -> None:
    report = run(rehearsal)
    assert report["kind"] == "requests-gpu"
    assert report["left_out"] == []
    places = [(point["histories"], point["batch"]) for point in report["results"]]
    assert places == [("full", 3), ("real", 3), ("full", 1), ("real", 1)]
    for point in report["results"]:
        assert {row["key"] for row in point["variants"]} == {
            f"{operator}-{name}-bfloat16"
            for operator in ("encoder", "whole")
            for name in ("cpu", "plain")
        }
        full = point["histories"] == "full"
        assert (point["mean_tokens"] == 82) == full
        assert set(point["forms"]["cpu-bfloat16"]) == {
            "throughput", "cluster1", "cluster2", "cluster4", "cluster8", "long"
        }  # fmt: skip
        assert ("host" in point) == (point["batch"] == 3)
        for row in point["variants"]:
            limit = point["arithmetic_limit_us"][row["operator"]]
            assert row["of_arithmetic_limit"] == pytest.approx(limit / row["p50_us"])
            assert row["verified"]["requests"] == point["batch"]
            ours = row["side"] == "backend"
            assert ("times_faster_than" in row) == ours
            whole = row["operator"] == "whole"
            assert ("joules_per_thousand_users" in row) == (whole and (ours or full))
            assert ("power" in row) == (whole and ours)
    host = report["results"][0]["host"]["cpu-bfloat16"]
    assert host["samples"] == 4
    assert host["p50_us"] <= host["p99_us"]
    assert set(host["parts_p50_us"]) == {"batch", "decode", "items"}
    assert host["stream_users_per_s"] > 0
    assert "graphs" not in host

    rehearsal.common.write_json(tmp_path / "results" / "requests-gpu-here.json", report)
    readme = tmp_path / "README.md"
    markers = [f"<!-- table:{name} -->\n" for name in ("requests-gpu", "requests-cpu")]
    readme.write_text("\n".join(f"{marker}<!-- /table -->\n" for marker in markers))
    command = ["--results", str(tmp_path / "results"), "--update", str(readme)]
    assert rehearsal.make_tables.main(command) == 0
    text = readme.read_text()
    assert text.endswith(f"{markers[1]}<!-- /table -->\n")  # nothing was measured for it
    lines = [line for line in text.splitlines() if line.startswith("| full, 82 tokens |")]
    assert [line.split("|")[2] for line in lines] == [" 1 ", " 3 "]
    assert lines[0].startswith(
        "| full, 82 tokens | 1 | 7 µs | 7 µs | 7 µs (not compiled) | 7 µs | 1.0x |"
    )
    assert lines[0].endswith("| 300 | 300 |")
    assert (
        "the cap of 700 W held the clocks at batch 1 (full), 3 (full), 1 (real), 3 (real):" in text
    )
    assert "Pretended GPU, torch" in text
    tables = rehearsal.request_tables.requests_gpu_tables(report)
    assert "| full, 82 tokens | 3 | cpu, bf16 |" in tables["requests-gpu-host"]


def test_graphs_of_requests_are_timed_beside_calls(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with graphs that are calls."""
    made = fake_graphs(monkeypatch)
    next(made)
    on_gpu = SimpleNamespace(type="cuda")
    host, captured = rehearsal.request_host, rehearsal.request_host.captured

    def captured_on_cpu(model: Any, size: int, options: Any) -> Any:
        model._need_gpu = lambda *_: None
        return captured(model, size, options)

    monkeypatch.setattr(host, "captured", captured_on_cpu)
    monkeypatch.setattr(host, "device_of", lambda model: on_gpu)
    report = run(rehearsal, batches=(3,), histories=("full",))
    found = report["results"][0]["host"]["cpu-bfloat16"]
    assert found["graphs"]["samples"] == 4
    assert found["graphs"]["p50_us"] <= found["graphs"]["p99_us"]
    assert "parts_p50_us" not in found["graphs"]
    assert found["graphs"]["stream_users_per_s"] > 0
    assert "; graphs p50 " in host.host_line(found)
    table = rehearsal.request_tables.host_table(report)
    assert "| users/s, one by one | graph | stream | stream of graphs |" in table
    assert "overlapped" not in table

    def refused(*_: Any) -> None:
        raise ValueError("no operator")

    monkeypatch.setattr(host, "captured", refused)
    report = run(rehearsal, batches=(3,), histories=("full",))
    found = report["results"][0]["host"]["cpu-bfloat16"]
    assert found["graphs_left_out"] == "no operator"
    assert "stream of graphs" not in rehearsal.request_tables.host_table(report)
    next(made, None)


def test_a_wrong_answer_of_a_stream_is_not_timed(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Recommender.decode_stream

    def wrong(self: Recommender, *arguments: Any, **options: Any) -> Any:
        for recs in right(self, *arguments, **options):
            recs.items[-1, -1] += 1
            yield recs

    monkeypatch.setattr(Recommender, "decode_stream", wrong)
    with pytest.raises(rehearsal.decode_checks.VerificationError, match="lists to lists"):
        run(rehearsal, batches=(3,), histories=("full",))


def test_long_inputs_are_a_setting_of_their_own(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = rehearsal.request_options.long_options(tiny_options(rehearsal, long_batches=(2,)))
    assert (long.tokens, long.max_items, long.sizes["dim"]) == (1000, 249, 256)
    assert (long.encoder_sizes["dim"], long.batches, long.host_calls) == (256, (2,), {})
    monkeypatch.setattr(rehearsal.request_options, "LONG_TOKENS", 110)
    monkeypatch.setattr(rehearsal.request_options, "LONG_DIM", 32)
    report = run(rehearsal, batches=(1,), histories=("full",), long_batches=(2,))
    assert report["left_out"] == []
    full, point = report["results"]
    assert (point["histories"], point["batch"], point["mean_tokens"]) == ("long", 2, 110)
    assert {row["key"] for row in point["variants"]} == {row["key"] for row in full["variants"]}
    assert report["setting"]["long"]["tokens"] == 110
    assert set(report["plans"]) == {"cpu-bfloat16, full", "cpu-bfloat16, long"}
    tables = rehearsal.request_tables.requests_gpu_tables(report)
    assert "| long, 110 tokens | 2 |" in tables["requests-gpu-long"]
    assert "D 32," in tables["requests-gpu-long"]
    assert "long" not in tables["requests-gpu"]
    assert "D 16," in tables["requests-gpu"]


def test_sid_mlp_plus_plus_has_points_of_its_own(rehearsal: SimpleNamespace) -> None:
    report = run(rehearsal, batches=(1,), histories=("full",), mlp_batches=(2, 1))
    assert report["left_out"] == []
    full, *points = report["results"]
    assert [(p["histories"], p["batch"]) for p in points] == [("mlp", 2), ("mlp", 1)]
    for point in points:
        rows = {row["key"]: row for row in point["variants"]}
        assert set(rows) == {row["key"] for row in full["variants"]}
        assert rows["encoder-cpu-bfloat16"]["verified"]["requests"] == point["batch"]
    encoder = report["setting"]["mlp"]["encoder"]
    assert encoder == {"num_layers": 4, "dim": 16, "hidden_dim": 512}
    tables = rehearsal.request_tables.requests_gpu_tables(report)
    assert "SID-MLP++ encoder of 4 layers, D 16," in tables["requests-gpu-mlp"]
    assert "| mlp, 82 tokens | 2 |" in tables["requests-gpu-mlp"]
    assert "mlp" not in tables["requests-gpu"]


def test_the_cpu_is_timed_by_its_own_clock(modules: SimpleNamespace) -> None:
    report = run(
        modules,
        dtypes=(torch.float32, torch.bfloat16),
        batches=(2,),
        host_calls={},
        energy=False,
    )
    assert report["kind"] == "requests-cpu"
    assert report["left_out"] == []
    for point in report["results"]:
        rows = {row["key"]: row for row in point["variants"]}
        assert len(rows) == 6
        assert all(row["timed"] == modules.common.HOST_CLOCK for row in rows.values())
        assert "of_arithmetic_limit" not in rows["whole-cpu-float32"]
        for key in ("whole-cpu-float32", "whole-cpu-bfloat16"):
            expected = rows["whole-plain-float32"]["p50_us"] / rows[key]["p50_us"]
            assert rows[key]["times_faster_than"] == {"plain": expected}
    tables = modules.request_tables.requests_cpu_tables(report)
    assert "| histories | batch | encoder, PyTorch fp32 |" in tables["requests-cpu"]
    assert "| full, 82 tokens | 2 |" in tables["requests-cpu"]


@pytest.mark.slow
def test_peers_are_compiled_once_for_both_kinds(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, right = [], modules.request_points.gather

    def gather(everyone: Any, judge: Any, options: Any, *others: Any) -> Any:
        allowed.append(options.compile_seconds)
        return right(everyone, judge, options, *others)

    monkeypatch.setattr(modules.request_points, "gather", gather)
    report = run(
        modules,
        dtypes=(torch.float32,),
        peers=("compiled",),
        batches=(2,),
        peer_batches=(2,),
        host_calls={},
        energy=False,
        compile_seconds=300.0,
        seconds=300.0,
    )
    assert allowed == [300.0, math.inf]  # the second time nothing is left to compile
    assert report["left_out"] == []
    assert [len(point["variants"]) for point in report["results"]] == [4, 4]
    assert report["compile_seconds"] > 0


def test_wrong_states_are_not_timed(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EncoderPlan.__call__

    def wrong(self: EncoderPlan, ids: Any, mask: Any) -> Any:
        states = right(self, ids, mask)
        states[-1, 3] += 0.5
        return states

    monkeypatch.setattr(EncoderPlan, "__call__", wrong)
    monkeypatch.setattr(rehearsal.gpu_timing, "sampled", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(rehearsal.decode_checks.VerificationError, match="encoder, cpu"):
        run(rehearsal)


@pytest.mark.parametrize(
    ("change", "match"), [(1e-3, "decode of the states"), (float("nan"), "decode of the states")]
)
def test_items_have_the_bits_of_a_decode_of_the_states(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, change: float, match: str
) -> None:
    right = DecodePlan.recommend

    def wrong(self: DecodePlan, *arguments: Any) -> Any:
        items, scores, *others = right(self, *arguments)
        return items, scores + change, *others

    monkeypatch.setattr(DecodePlan, "recommend", wrong)
    monkeypatch.setattr(rehearsal.gpu_timing, "sampled", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(rehearsal.decode_checks.VerificationError, match=match):
        run(rehearsal)


def test_two_runs_must_leave_the_same_bits(modules: SimpleNamespace) -> None:
    check = modules.request_checks.check_same_bits
    nan = torch.tensor([float("nan"), 1.0])
    check("here", nan, nan.clone())
    check("here", (nan, torch.ones(2)), [nan.clone(), torch.ones(2)])
    with pytest.raises(modules.decode_checks.VerificationError, match="here"):
        check("here", torch.zeros(1), -torch.zeros(1))


def test_a_wrong_peer_is_left_out(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = rehearsal.request_peers.FixedLengthEncoder
    right = module.forward
    monkeypatch.setattr(module, "forward", lambda self, *a: right(self, *a) + 0.5)
    report = run(rehearsal, batches=(1,), histories=("full",))
    assert "it is wrong: encoder, plain" in report["left_out"][0]["why"]
    rows = report["results"][0]["variants"]
    assert "encoder-plain-bfloat16" not in {row["key"] for row in rows}
    assert {"encoder-cpu-bfloat16", "whole-cpu-bfloat16"} <= {row["key"] for row in rows}


def test_company_and_time_are_limits(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(rehearsal, seconds=-1.0)
    assert report["results"] == []
    assert [gone["why"] for gone in report["left_out"]] == ["-1 s are over"] * 4
    monkeypatch.setattr(rehearsal.gpu_timing, "other_processes", lambda: 2)
    with pytest.raises(RuntimeError, match="alone on the GPU, got 2"):
        run(rehearsal)


def test_the_arithmetic_limit_is_the_published_one(modules: SimpleNamespace) -> None:
    inputs = modules.request_inputs
    spec = T5Spec(**inputs.T5_SIZES, vocab_size=1027)
    assert inputs.encoder_flop(spec, 82) == pytest.approx(342e6, rel=0.01)
    mlp = MLPEncoderSpec(**inputs.MLP_SIZES, num_roles=4, vocab_size=1027, max_length=82)
    assert inputs.encoder_flop(mlp, 82) == 2 * 4 * (2 * 82 + 4) * 128 * 512
    sizes = modules.decode_variants.PUBLISHED_SIZES
    contest = modules.decode_variants.Contest(
        modules.decode_catalogues.uniform_catalogue(300), 1, sizes=sizes, tokens=82, k=10
    )
    limits = inputs.limits_us(contest, spec, [82, 82], 50)
    assert limits["whole"] / 2 == pytest.approx(0.48, rel=0.02)
    assert limits["encoder"] < limits["whole"]


def test_histories_are_real_where_there_are_some(modules: SimpleNamespace) -> None:
    data = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not (data / "amazon14_beauty" / "sequences.npz").exists():
        pytest.skip("Beauty's sequences are not here")
    options = tiny_options(modules, data=data)
    contest = modules.bench_requests.make_contest(options)
    histories, origin = modules.request_inputs.histories_of("real", contest, 4096, data)
    assert "users of amazon14_beauty" in origin
    lengths = [len(history) for history in histories]
    assert (min(lengths), max(lengths)) == (5, 20)
    assert 33 < 2 + 4 * sum(lengths) / len(lengths) < 35
    assert lengths[0] == 8
    assert set(histories[7]) <= set(contest.item_ids.tolist())


def test_power_is_looked_up_while_replays_run(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(100))
    reasons = iter([0x1, 0x4 | 0x40, 0x1])
    clocks = iter([1980, 1200, 1500])

    class Found:
        def __enter__(self) -> Any:
            return SimpleNamespace(
                NVML_CLOCK_SM=1,
                nvmlDeviceGetClockInfo=lambda gpu, kind: next(clocks),
                nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: next(reasons),
                nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
            ), None

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(modules.gpu_nvml, "this_gpu", Found)
    runs: list[int] = []
    found = modules.gpu_power.power_state(
        lambda: runs.append(0), 5000.0, seconds=4.0, wait=lambda: None, clock=lambda: next(now)
    )
    assert found == {
        "limit_w": 700.0,
        "power_capped": True,
        "held_by": ["hardware thermal", "power cap"],
        "lowest_sm_clock_mhz": 1200,
    }
    assert len(runs) == 3 * 4  # bursts of 20 ms


def test_the_command_leaves_a_report(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = rehearsal.bench_requests
    options = tiny_options(rehearsal, batches=(1,), histories=("real",), host_calls={})
    monkeypatch.setattr(bench, "options_of", lambda *_: options)
    monkeypatch.setattr(bench, "usable_backends", lambda *_: (["cpu"], []))
    out = tmp_path / "here.json"
    threads = torch.get_num_threads()
    assert bench.main(["--out", str(out), "--commit", "abc", "--threads", str(threads)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]
    report = rehearsal.common.read_json(out)
    assert report["complete"]
    assert report["machine"]["commit"] == "abc"


def test_options_are_checked(modules: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench = modules.bench_requests

    def options(*words: str) -> Any:
        return bench.options_of(bench.parser("").parse_args(words), ["cuda"])

    made = options("--long-batches", "", "--long-peer-batches", "1")
    assert (made.long_batches, made.long_peer_batches) == ((), (1,))
    made = options("--batches", "1,512", "--peer-batches", "", "--peers", "none", "--no-energy")
    assert (made.batches, made.peer_batches, made.peers) == ((1, 512), (), ())
    assert made.energy is False
    assert options().dtypes == (torch.bfloat16,)
    assert options("--device", "cpu").batches == (1, 32)
    for words in (["--peers", "eagle"], ["--batches", "0"], ["--threads", "0"]):
        with pytest.raises(ValueError, match=words[0][2:]):
            options(*words)
    assert bench.main(["--backends", "cpu"]) == 2  # a CPU's backend has no place on a GPU
    assert "got 'cpu'" in capsys.readouterr().err


def test_a_point_names_its_peers(modules: SimpleNamespace) -> None:
    points, options = modules.request_points, tiny_options(modules, peers=("compiled", "plain"))
    options = dataclasses.replace(options, peer_batches=(1,))
    assert points.peers_at(points.Point("full", 1), options) == ["plain", "compiled"]
    assert points.peers_at(points.Point("full", 3), options) == ["plain"]
