"""The benchmarks at tiny sizes: they verify first, report valid JSON, and its tables and plots."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import BENCHMARKS, SIZES

from sidmlp_kernels.plan import DecodePlan

MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "decode_variants",
    "library_trie",
    "work_counts",
    "make_tables",
    "plot_results",
    "bench_decode_cpu",
    "bench_decode",
)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, importable as they are when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        # matplotlib is an extra: only the plots need it.
        names = [
            n for n in MODULES if n != "plot_results" or importlib.util.find_spec("matplotlib")
        ]
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name)


def run_tiny(bench: ModuleType, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "axes": ("batch", "catalogue", "beams", "isa"),
        "peers": ("eager",),
        "effort": bench.Effort(3, 5.0, 3, 5.0, 2),
        "data": Path("there is no such folder"),
        "sizes": SIZES,
        "tokens": 6,
        "say": lambda text: None,
    }
    base = bench.Point((), bench.BEAUTY, batch=3, num_beams=10)
    values = bench.Values(batches=(1, 3), catalogues=(bench.BEAUTY, "500"), beams=(10, 20))
    return bench.run(base, values, **{**arguments, **changes})


@pytest.fixture(scope="module")
def report(benchmarks: dict[str, ModuleType]) -> dict[str, Any]:
    return run_tiny(benchmarks["bench_decode_cpu"])


def test_every_point_is_verified_and_timed(benchmarks, report):
    bench = benchmarks["bench_decode_cpu"]
    points = {(p["catalogue"], p["batch"], p["num_beams"], p["isas"]) for p in report["results"]}
    beauty, isas = bench.BEAUTY, bench.supported_isas()
    assert points == {
        (beauty, 3, 10, ()),
        (beauty, 1, 10, ()),
        (beauty, 3, 20, ()),
        (beauty, 3, 10, isas),
        ("500", 3, 10, ()),
    }
    for point in report["results"]:
        assert 0 <= point["others_cpu_share"] <= 1
        keys = [row["key"] for row in point["variants"]]
        assert len(set(keys)) == len(keys)
        if point["isas"]:
            assert set(keys) == {f"plan-{w}-{i}" for w in ("float32", "bfloat16") for i in isas}
        else:
            assert {"eager", "recommender-float32", "plan-bfloat16"} <= set(keys)
        for row in point["variants"]:
            assert 0 < row["min_us"] <= row["p50_us"] <= row["p99_us"]
            assert row["verified"]["requests"] == point["batch"]
            assert row["verified"]["max_score_error"] <= row["verified"]["eps"]
            if row["name"] == "recommender":
                assert row["times_faster_than"]["eager"] > 0
    assert report["catalogues"][beauty]["origin"].startswith("synthetic")
    assert report["catalogues"][beauty]["nodes_per_level"] == [256, 4298, 8758, 12101]
    assert report["left_out"] == []


def test_report_is_written_as_json_and_read_back(benchmarks, report, tmp_path):
    common = benchmarks["common"]
    path = tmp_path / "new folder" / "decode-here.json"
    common.write_json(path, report)
    assert common.read_json(path) == json.loads(json.dumps(report))
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="'machine'"):
        common.write_json(path, {"kind": "decode"})
    path.write_text("{}")
    with pytest.raises(ValueError, match="run the benchmark again"):
        common.read_json(path)


def raised_scores(results):
    items, scores, codes, counts = results
    return items, scores + 0.5, codes, counts


def swapped_items(results):
    items, scores, codes, counts = results
    return items.flip(1), scores, codes.flip(1), counts


def one_lost(results):
    """The last request loses its best item."""
    shifted = []
    for tensor, padding in zip(results[:3], (-1, -torch.inf, -1), strict=True):
        rows = torch.cat([tensor[:, 1:], torch.full_like(tensor[:, :1], padding)], dim=1)
        shifted.append(torch.cat([tensor[:-1], rows[-1:]]))
    counts = results[3].clone()
    counts[-1] -= 1
    return *shifted, counts


@pytest.mark.parametrize("wrong", [raised_scores, swapped_items, one_lost])
def test_a_wrong_kernel_is_not_timed(benchmarks, monkeypatch, wrong):
    bench = benchmarks["bench_decode_cpu"]
    right = DecodePlan.decode_states
    monkeypatch.setattr(DecodePlan, "decode_states", lambda self, *args: wrong(right(self, *args)))
    monkeypatch.setattr(bench, "time_interleaved", lambda *a, **k: pytest.fail("it was timed"))
    with pytest.raises(bench.VerificationError, match="recommender-float32"):
        run_tiny(bench, axes=())


def test_the_command_reports_nothing_for_a_wrong_kernel(benchmarks, monkeypatch, tmp_path, capsys):
    bench = benchmarks["bench_decode_cpu"]
    right = DecodePlan.decode_states
    monkeypatch.setattr(
        DecodePlan, "decode_states", lambda self, *args: raised_scores(right(self, *args))
    )
    path = tmp_path / "decode.json"
    threads = torch.get_num_threads()
    try:
        status = bench.main(
            ["--quick", "--axes", "none", "--peers", "none", "--threads", "1", "--out", str(path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    assert not path.exists()
    assert "nothing is reported: recommender-float32" in capsys.readouterr().err


def test_one_entry_runs_the_benchmark_of_a_device(benchmarks, monkeypatch, capsys):
    entry = benchmarks["bench_decode"]
    monkeypatch.setattr(
        benchmarks["bench_decode_cpu"], "main", lambda arguments: print("cpu", *arguments)
    )
    entry.main(["--quick"])
    entry.main(["--device", "cpu", "--axes", "none"])
    assert capsys.readouterr().out == "cpu --quick\ncpu --axes none\n"
    with pytest.raises(SystemExit):
        entry.main(["--device", "tpu"])


def test_goals_compare_the_users_call_with_each_peer(benchmarks):
    bench = benchmarks["bench_decode_cpu"]
    base = bench.Point((), bench.BEAUTY, batch=32, num_beams=50)

    def point(batch: int, eager: float, compiled: float) -> dict[str, Any]:
        faster = {"eager": eager, "compiled": compiled}
        row = {"key": "recommender-float32", "times_faster_than": faster}
        return {
            "catalogue": base.catalogue,
            "num_beams": 50,
            "isas": (),
            "batch": batch,
            "variants": [row],
        }

    goals = bench.goals_of([point(32, 9.9, 4.0), point(1, 5.0, 4.9), point(8, 1, 1)], base)
    assert [(g["batch"], g["peer"], g["met"]) for g in goals] == [
        (32, "eager", False),
        (32, "compiled", True),
        (1, "eager", True),
        (1, "compiled", False),
    ]


def test_a_catalogue_too_large_for_memory_is_left_out_with_its_reason(benchmarks, monkeypatch):
    bench = benchmarks["bench_decode_cpu"]
    monkeypatch.setattr(bench, "system_memory", lambda field: 10_000_000)
    values = bench.Values(batches=(3,), catalogues=(bench.BEAUTY, "1M"), beams=(10,))
    report = bench.run(
        bench.Point((), bench.BEAUTY, batch=3, num_beams=10),
        values,
        axes=("catalogue",),
        peers=(),
        effort=bench.Effort(1, 1.0, 1, 1.0, 1),
        data=Path("there is no such folder"),
        sizes=SIZES,
        tokens=4,
        say=lambda text: None,
    )
    assert [gone["catalogue"] for gone in report["left_out"]] == ["1M"]
    assert "GB are free" in report["left_out"][0]["why"]
    assert [point["catalogue"] for point in report["results"]] == [bench.BEAUTY]


def test_random_codes_have_the_wanted_nodes(benchmarks):
    catalogues = benchmarks["decode_catalogues"]
    codes = catalogues.codes_with_nodes((3, 7, 7, 20), (4, 4, 2, 8), seed=1)
    assert codes.dtype == np.int16
    assert [len(np.unique(codes[:, : n + 1], axis=0)) for n in range(4)] == [3, 7, 7, 20]
    np.testing.assert_array_equal(
        codes, catalogues.codes_with_nodes((3, 7, 7, 20), (4, 4, 2, 8), 1)
    )
    with pytest.raises(ValueError, match=r"expected 3\.\.12 nodes"):
        catalogues.codes_with_nodes((3, 13), (4, 4), seed=0)


def test_uniform_catalogues_say_their_codes(benchmarks):
    catalogues = benchmarks["decode_catalogues"]
    usual, other = (catalogues.uniform_catalogue(500, *c) for c in ((), ((9, 300),)))
    assert (usual.name, usual.codes.shape) == ("uniform-500", (500, 4))
    assert (other.name, other.codes.shape) == ("uniform-500-9x300", (500, 2))
    assert (other.codes.max(axis=0) < (9, 300)).all()
    assert other.codes[:, 1].max() > 255


def test_the_work_of_others_is_noticed(benchmarks):
    common = benchmarks["common"]
    # A child counts as another for as long as it runs.
    busy = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", busy])
    try:
        with common.OthersCpuShare() as others:
            time.sleep(1.0)
    finally:
        child.kill()
        child.wait()
    assert others.share > 0.2 / os.cpu_count()


@pytest.fixture
def results(benchmarks, report, tmp_path) -> Path:
    folder = tmp_path / "results"
    benchmarks["common"].write_json(folder / "decode-here.json", report)
    return folder


DOCUMENT = """# Title
<!-- table:decode-batch -->
old
<!-- /table -->
between
<!-- table:decode-isa@here -->
<!-- /table -->
end
"""


def test_tables_are_written_once_and_checked(benchmarks, results, tmp_path, capsys):
    tables = benchmarks["make_tables"]
    readme = tmp_path / "README.md"
    readme.write_text(DOCUMENT)
    options = ["--results", str(results)]
    assert tables.main([*options, "--check", str(readme)]) == 1
    assert "make_tables.py --update" in capsys.readouterr().err
    assert tables.main([*options, "--update", str(readme)]) == 0
    first = readme.read_text()
    assert "old" not in first
    assert "| 3 |" in first
    assert "avx2" in first or "plain" in first
    assert first.startswith("# Title\n")
    assert first.endswith("<!-- /table -->\nend\n")
    assert tables.main([*options, "--update", str(readme)]) == 0
    assert readme.read_text() == first
    assert tables.main([*options, "--check", str(readme)]) == 0
    readme.write_text(first.replace("| 3 |", "| 4 |"))
    assert tables.main([*options, "--check", str(readme)]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:nonsense -->\n<!-- /table -->\n", "table nonsense"),
        ("<!-- table:decode-batch@elsewhere -->\n<!-- /table -->\n", "got here"),
        ("<!-- table:decode-batch -->\n", "1 openings and 0 whole pairs"),
        (
            "<!-- table:decode-batch -->\n<!-- table:decode-isa -->\n<!-- /table -->\n",
            "2 openings and 1 whole pairs",
        ),
    ],
)
def test_wrong_markers_are_named(benchmarks, results, tmp_path, capsys, text, message):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    arguments = ["--results", str(results), "--update", str(readme)]
    assert benchmarks["make_tables"].main(arguments) == 1
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_several_machines_need_a_name(benchmarks, results, report, tmp_path, capsys):
    tables = benchmarks["make_tables"]
    benchmarks["common"].write_json(results / "decode-there.json", report)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:decode-isa -->\n<!-- /table -->\n")
    assert tables.main(["--results", str(results), "--update", str(readme)]) == 1
    assert "got here, there" in capsys.readouterr().err


def test_all_tables_of_the_committed_results_can_be_made(benchmarks, capsys):
    assert benchmarks["make_tables"].main([]) == 0
    assert "catalogue@" in capsys.readouterr().out


def test_plots_are_made(benchmarks, results, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip extra `benchmark`)")
    written = benchmarks["plot_results"].plot(results / "decode-here.json", tmp_path / "plots")
    assert [p.name for p in written] == [
        "decode-here-batch.png",
        "decode-here-catalogue.png",
        "decode-here-peers.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


@pytest.mark.parametrize(
    "script",
    [
        "bench_decode.py",
        "bench_decode_cpu.py",
        "bench_decode_gpu.py",
        "merge_results.py",
        "bench_catalogue.py",
        "make_tables.py",
        "plot_results.py",
    ],
)
def test_scripts_explain_themselves(script):
    if script == "plot_results.py":
        pytest.importorskip("matplotlib", reason="plots need matplotlib (pip extra `benchmark`)")
    root = BENCHMARKS.parent
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
