"""The GPU benchmark without a GPU: its rehearsal on the CPU backend, its counts and its command."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import GPU_SCRIPTS, SIZES, pretend_gpu, scripts

from sidmlp_kernels import Recommender
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import make_problem

CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flop_per_s": {"bfloat16": 7e14, "float32": 4e14}}


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts(GPU_SCRIPTS, ("teacher_peer", "plot_style", "plot_gpu", "plot_results"))


@pytest.fixture
def rehearsal(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    pretend_gpu(modules, monkeypatch)
    monkeypatch.setattr(modules.bench_decode_gpu, "measured_ceilings", lambda *_: CEILINGS)
    return modules


def tiny_options(modules: SimpleNamespace, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "backends": ("cpu",),
        "dtypes": (torch.float32, torch.bfloat16),
        "peers": ("graph", "eager", "reference"),
        "host_backend": False,  # the stand-in for a GPU's has its name
        "axes": ("batch",),
        "batches": (3, 1),
        "base_batches": (2,),
        "device": "cpu",
        "data": Path("there is no such folder"),
        "sizes": SIZES,
        "tokens": 6,
    }
    return modules.gpu_options.Options(**{**arguments, **changes})


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


def test_two_launches_take_part_on_the_axis_batch(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU backend in place of cuda, as which it is asked for."""
    made = []

    def recommender(*parts: Any, backend: str, launches: int, **options: Any) -> Any:
        made.append((backend, launches))
        return Recommender(*parts, backend="cpu", **options)

    monkeypatch.setattr(rehearsal.gpu_points, "Recommender", recommender)
    changes = {"backends": ("cuda",), "dtypes": (torch.bfloat16,), "batches": (2,)}
    changes |= {"catalogues": ("amazon14_beauty",), "axes": ("batch", "items"), "items": (300,)}
    report = rehearse(rehearsal, **changes)
    assert made == [("cuda", 1), ("cuda", 2), ("cuda", 1)], "none for the other catalogue"
    names = {p["axis"]: {r["name"] for r in p["variants"]} for p in report["results"]}
    peers = {"graph", "eager", "reference"}
    assert names == {
        "batch": peers | {"cuda", "cuda, two launches"},
        "items": {"reference", "cuda"},
    }
    tables = rehearsal.gpu_tables.decode_gpu_tables(report)
    header = tables["decode-gpu-states"].splitlines()[2]
    assert header.startswith("| batch | PyTorch, compiled | cuda | cuda, two launches |")
    for name in ("decode-gpu-axes", "decode-gpu-items"):
        assert "two launches" not in tables[name]


def test_what_cannot_run_is_left_out_with_its_reason(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such compiler\nand more lines")

    monkeypatch.setattr(rehearsal.gpu_participants, "peer_calls", broken)
    report = rehearse(rehearsal, peers=("graph",), batches=(1,), catalogues=("amazon14_beauty",))
    assert [gone["why"] for gone in report["left_out"]] == ["RuntimeError: no such compiler"] * 2
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


def test_every_axis_has_its_points(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(rehearsal.gpu_participants.MODES, "static", None)
    report = axes_report(rehearsal)
    assert report["left_out"] == []
    places = [(p["axis"], p["catalogue"], p["num_beams"]) for p in report["results"]]
    beauty = "amazon14_beauty"
    assert places == [
        *[("batch", beauty, 50)] * 2,
        ("items", "uniform-300", 50),
        ("beams", beauty, 20),
        ("codes", "uniform-200-12x12x12", 50),
    ]
    assert report["catalogues"]["uniform-200-12x12x12"]["codes_per_level"] == [12, 12, 12]
    for point in report["results"]:
        names = {row["name"] for row in point["variants"]}
        if point["axis"] == "batch":
            assert names == {"cpu", "static", "graph", "eager", "reference"}
        else:  # fewer, and from encoder states only
            assert names == {"cpu", "static", "reference"}
            assert {row["operator"] for row in point["variants"]} == {"decode_states"}
        for row in point["variants"]:
            assert row["invalid_rate"] == 0
            assert 0 < row["of_copy_rate"] <= row["of_ceiling"]
            assert ("single_p99_us" in row) == (row["timed"] == "graph replay")
            energy = point["batch"] == 1 and row["timed"] == "graph replay"
            energy &= row["operator"] == "decode_states"
            assert ("joules_per_thousand_users" in row) == energy
    rows = {row["name"]: row for row in report["results"][1]["variants"]}
    assert rows["static"]["joules_per_thousand_users"] == 3.0 / 10 * 1000  # a user each
    assert rows["static"]["watts"] == 6.0

    tables = rehearsal.gpu_tables.decode_gpu_tables(report)
    assert {"decode-gpu-states", "decode-gpu-everyone-1"} <= set(tables)
    lines = tables["decode-gpu-beams"].splitlines()[4:]
    assert [line.split("|")[1:3] for line in lines] == [[" 20 ", " 2 "], [" 50 ", " 2 "]]
    assert (
        tables["decode-gpu-items"].splitlines()[-1].startswith("| 300 | 2 | 7 µs | 7 µs | 1.0x |")
    )
    assert tables["decode-gpu-codes"].splitlines()[-1].startswith("| 12 | 2 |")
    assert "| items | 300 | 7 µs (cpu) | - | 1.0x |" in tables["decode-gpu-axes"]
    assert "STATIC-style masks, compiled | 7 µs |" in tables["decode-gpu-everyone-1"]
    assert "copies 4.00 TB/s and multiplies bfloat16" in tables["decode-gpu-everyone-1"]
    assert set(tables) <= set(rehearsal.gpu_tables.GPU_TABLES)

    if importlib.util.find_spec("matplotlib"):
        path = tmp_path / "decode-gpu-here.json"
        rehearsal.common.write_json(path, report)
        plots = importlib.import_module("plot_results").plot(path, tmp_path)
        assert [plot.name for plot in plots] == [
            f"decode-gpu-here-{axis}.png" for axis in ("batch", "beams")
        ]


def axes_report(modules: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    """Every axis with one value, on the way of a rehearsal."""
    arguments: dict[str, Any] = {
        "axes": modules.gpu_options.AXES,
        "catalogues": ("amazon14_beauty",),
        "dtypes": (torch.bfloat16,),
        "peers": ("static", "graph", "eager", "reference"),
        "batches": (2, 1),
        "items": (300,),
        "beams": (20, 50),  # 50 is the base's own
        "codes": (12,),
        "code_items": 200,
    }
    return rehearse(modules, **{**arguments, **changes})


def test_our_cpu_backend_takes_part_by_the_hosts_clock(rehearsal: SimpleNamespace) -> None:
    report = rehearse(
        rehearsal, backends=(), host_backend=True, peers=(), catalogues=("amazon14_beauty",)
    )
    rows = [row for point in report["results"] for row in point["variants"]]
    assert {(row["key"], row["timed"]) for row in rows} == {
        (f"decode_states-cpu-{dtype}", "call, host clock") for dtype in ("float32", "bfloat16")
    }
    assert not any("of_ceiling" in row for row in rows)  # the GPU's say nothing about it


def test_an_item_outside_the_catalogue_is_never_timed(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DecodePlan.decode_states

    def wrong(self: DecodePlan, *arguments: Any) -> Any:
        items, *others = right(self, *arguments)
        items[-1, 0] = 10**9  # beyond the requests that are always judged
        return items, *others

    monkeypatch.setattr(DecodePlan, "decode_states", wrong)
    monkeypatch.setattr(rehearsal.gpu_timing, "sampled", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(rehearsal.decode_checks.VerificationError, match=r"got 1\.000% others"):
        rehearse(rehearsal, batches=(10,), catalogues=("amazon14_beauty",))


def test_a_catalogue_without_room_is_left_out(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal.gpu_axes, "system_memory", lambda field: 100_000)
    report = axes_report(rehearsal, axes=("items",), items=(300,), base_batches=(2, 1))
    assert report["results"] == []
    assert [gone["axis"] for gone in report["left_out"]] == ["items"] * 2
    assert "GB are free" in report["left_out"][0]["why"]
    assert "no room" in report["left_out"][1]["why"]


def test_the_most_important_points_come_first(modules: SimpleNamespace) -> None:
    options = modules.gpu_options.Options(backends=("cuda",))
    points = modules.gpu_axes.make_points(options)
    assert [(p.axis, p.batch) for p in points[:2]] == [("batch", 32), ("batch", 512)]
    assert len({(p.catalogue, p.batch, p.num_beams) for p in points}) == len(points)
    assert {p.num_items for p in points if p.axis == "items"} == set(options.items)
    base = [p for p in points if p.axis == "batch" and p.catalogue == "amazon14_beauty"]
    assert {p.batch for p in base if "teacher" in p.peers} == {1, 32, 512}
    assert {p.batch for p in base if "autotuned" in p.peers} == {32, 512}
    assert points[-1].catalogue == "cell_phones_sids"


def test_work_is_counted_from_the_catalogue(modules: SimpleNamespace) -> None:
    counts, checks = modules.work_counts, modules.decode_checks
    problem = make_problem(
        (4, 8), seed=1, dim=16, attention_dim=16, num_heads=2, ffn_dim=16, hidden_dim=16,
        num_items=30,
    )  # fmt: skip
    spec, catalogue = problem.spec, problem.catalogue.snapshot().statistics()
    nodes = [level.nodes for level in catalogue.levels]
    walk = checks.Walk({}, (1.0, 3.0), (4.0, 10.5))
    sizes = {"batch": 2, "tokens": 5, "num_beams": 3, "k": 4}
    found = counts.launch_bytes(
        problem.packed(torch.bfloat16), catalogue, walk, operator="beam_decode", **sizes
    )
    # Context product, then vectors, output rows and biases of 4 codes and of all 8 (2 x 10.5 > 8).
    vectors = 2 * 16 * 4
    assert found["weights"] == 16 * 32 * 2 + 32 * 4 + 2 * vectors + (4 + 8) * (16 * 2 + 4)
    assert found["tables"] == 4 * 16 * 2  # 2 x 3 rows are more than there are
    assert found["trie"] == 8 * 1 + 2 * 4 + 8 * min(nodes[0], 6) + 2 * min(nodes[1], 21) + 17 * 8
    assert found["states"] == 2 * 16 * 4
    assert found["results"] == 2 * (4 * (12 + 8) + 4)
    assert found["total"] == sum(found[part] for part in found if part != "total")
    states = counts.launch_bytes(
        problem.packed(torch.bfloat16), catalogue, walk, operator="decode_states", **sizes
    )
    assert states["states"] == 2 * 5 * (16 * 2 + 1)
    assert states["weights"] > found["weights"]
    heads = counts.least_flop(spec, 5, walk, "beam_decode")
    assert heads == 2 * (2 * 16 * 16 + 4 * 16 + 10.5 * 16)
    assert heads < counts.dense_flop(spec, 5, 3, "beam_decode")
    rates = {"copy_bytes_per_s": 1e6, "matmul_flop_per_s": {"bfloat16": 1e6}}
    shares = counts.of_ceilings({"bytes": {"total": 500}, "flop": 100}, 1e-3, rates, "bfloat16")
    assert shares == {"of_copy_rate": 0.5, "of_matmul_rate": 0.1, "of_ceiling": 0.5}


def test_energy_lies_between_two_steps_of_the_counter(modules: SimpleNamespace) -> None:
    now = iter(range(1000))  # a second for each look
    runs: list[int] = []

    def millijoules() -> int:
        return len(runs) // 6 * 1000  # moves with every third burst of two

    def counted(**changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "burst": 2,
            "seconds": 5.0,
            "wait": lambda: None,
            "clock": lambda: float(next(now)),
        }
        return modules.gpu_energy.counted(
            lambda: runs.append(0), **{"read_millijoules": millijoules, **arguments, **changes}
        )

    energy = counted()
    assert (energy.joules, energy.runs, energy.seconds) == (2.0, 12, 6.0)
    with pytest.raises(modules.gpu_nvml.Unavailable, match="stood still"):
        counted(read_millijoules=lambda: 7)


def test_energy_is_left_out_with_its_reason(
    rehearsal: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise rehearsal.gpu_nvml.Unavailable("NVML: Not Supported")

    monkeypatch.setattr(rehearsal.gpu_energy, "energy_of", missing)
    report = axes_report(rehearsal, axes=("batch",), peers=("graph",), batches=(1,))
    assert [(gone["name"], gone["why"]) for gone in report["left_out"]] == [
        ("energy", "NVML: Not Supported")
    ]
    assert not any("watts" in row for row in report["results"][0]["variants"])


def test_nvml_says_why_it_cannot_tell(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with (
        pytest.raises(modules.gpu_nvml.Unavailable, match="not installed"),
        modules.gpu_nvml.this_gpu(),
    ):
        pytest.fail("it was entered")
    assert modules.gpu_timing.other_processes() is None

    class NVMLError(Exception):
        pass

    def no_driver() -> None:
        raise NVMLError("Driver Not Loaded")

    fake = SimpleNamespace(NVMLError=NVMLError, nvmlInit=no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with (
        pytest.raises(modules.gpu_nvml.Unavailable, match="Driver Not Loaded"),
        modules.gpu_nvml.this_gpu(),
    ):
        pytest.fail("it was entered")


def test_ceilings_are_rates(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = modules.gpu_ceilings
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1000)
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", 10)
    monkeypatch.setattr(ceilings.timing, "warm_sample", lambda call, repeats: call() is None or 2.0)
    found = ceilings.measured_ceilings((torch.bfloat16,), "cpu")
    assert found["copy_bytes_per_s"] == pytest.approx(1e9)
    assert found["matmul_flop_per_s"] == {"bfloat16": pytest.approx(1e9)}


# -- the command, and pieces


def test_the_command_leaves_a_report(
    rehearsal: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = rehearsal.bench_decode_gpu
    options = tiny_options(rehearsal, catalogues=("amazon14_beauty",), peers=("graph",))
    monkeypatch.setattr(bench, "usable_backends", lambda *_: (["cpu"], []))
    monkeypatch.setattr(bench, "options_of", lambda *_: options)
    out = tmp_path / "here.json"
    assert bench.main(["--out", str(out), "--commit", "abc"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]
    report = rehearsal.common.read_json(out)
    assert report["complete"]
    assert report["ceilings"] == CEILINGS
    assert report["setting"]["base"]["num_beams"] == 50
    assert f"{out}" in capsys.readouterr().out


def test_pieces_are_merged(
    rehearsal: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"peers": ("graph",), "catalogues": ("amazon14_beauty",)}
    first = axes_report(rehearsal, axes=("batch",), seconds=-1.0, **few)
    second = axes_report(rehearsal, axes=("batch", "beams"), **few)
    third = axes_report(rehearsal, axes=("beams",), **few)
    third["setting"]["backends"] = ["another"]
    paths = []
    for number, report in enumerate((first, second, third)):
        paths.append(tmp_path / f"piece-{number}.json")
        rehearsal.common.write_json(paths[-1], report)
    out = tmp_path / "all.json"
    command = [*map(str, paths), "--out", str(out)]
    assert rehearsal.merge_results.main(command) == 0
    assert "3 points, 0 left out" in capsys.readouterr().out
    report = rehearsal.common.read_json(out)
    assert [point["axis"] for point in report["results"]] == ["batch", "batch", "beams"]
    assert report["results"][2] == rehearsal.common.read_json(paths[2])["results"][0]
    assert report["setting"]["axes"] == ["batch", "beams"]
    assert report["setting"]["backends"] == [*first["setting"]["backends"], "another"]
    assert [piece["points"] for piece in report["pieces"]] == [0, 2, 1]
    assert "decode-gpu-axes" in rehearsal.gpu_tables.decode_gpu_tables(report)

    for change in ({"gpu": "Another"}, {"setting": {**third["setting"], "k": 9}}):
        rehearsal.common.write_json(paths[2], {**third, **change})
        assert rehearsal.merge_results.main(command) == 1
        assert f"expected the {next(iter(change))} of" in capsys.readouterr().err


def test_options_are_checked(modules: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench = modules.bench_decode_gpu

    def options(*words: str) -> Any:
        return bench.options_of(bench.parser("").parse_args(words), ["cuda"])

    assert options().dtypes == (torch.bfloat16,)
    assert set(options().batches) == {1, 8, 32, 128, 512, 4096}
    quick = options("--quick", "--peers", "none", "--dtypes", "float32,bfloat16")
    assert (quick.cold, quick.peers, len(quick.catalogues)) == (False, (), 1)
    assert quick.dtypes == (torch.float32, torch.bfloat16)
    assert options("--batches", "7,9", "--no-cold").batches == (7, 9)
    assert options("--axes", "beams,items", "--items", "48k,1M").items == (48_000, 1_000_000)
    assert options("--no-energy", "--no-cpu").host_backend is False
    for words in (
        ["--peers", "eagle"],
        ["--batches", "0"],
        ["--dtypes", "int8"],
        ["--axes", "depth"],
        ["--beams", "5"],
    ):
        with pytest.raises(ValueError, match=words[0][2:]):
            options(*words)
    assert bench.main(["--backends", "cpu"]) == 2  # a CPU's backend has no place here
    assert "got 'cpu'" in capsys.readouterr().err
