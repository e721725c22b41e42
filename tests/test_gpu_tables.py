"""Tables made from reports of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import GPU_SCRIPTS, scripts


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts(GPU_SCRIPTS)


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
                ("cuda, two launches", "backend", 25.0),
                ("triton", "backend", 40.0),
                ("compiled", "peer", 300.0),
                ("autotuned", "peer", 250.0),
                ("graph", "peer", 500.0),
            )
        ]
        modules.gpu_rows.compare(rows)
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
    times, users = "20 µs | 25 µs | 40 µs", "1,600,000 | 1,280,000 | 800,000"
    assert lines == [f"| 32 | 250 µs | {times} | 12.5x | 10.0x | 6.2x | {users} |"] * 2
    assert "| PyTorch, compiled | cuda | cuda, two launches | triton |" in text
    assert text.index("| 1 |") < text.index("| 32 |")
    assert "Pretended GPU" in text
    assert "12,101 items" in text
    made = modules.gpu_tables.decode_gpu_tables(gpu_report(modules))
    cold = "| 32 | 750 µs | 60 µs | 75 µs | 120 µs | 12.5x | 10.0x | 6.2x |"
    assert cold in made["decode-gpu-cold"]
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
    assert "| 32 | - | 20 µs | 25 µs | 40 µs | - | - | - |" in made["decode-gpu"]
