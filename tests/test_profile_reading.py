"""From the pages that Nsight Compute prints to a reading, and the reading in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import scripts
from ncu_pages import COUNTED, RAW, lines_page, raw_page, sass_page

MODULES = ("profile_pages", "profile_reading", "profile_words")
Modules = SimpleNamespace


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    yield from scripts(MODULES)


@pytest.fixture(scope="module")
def reading(modules: Modules) -> dict[str, Any]:
    pages, read = modules.profile_pages, modules.profile_reading
    return read.make_reading(
        pages.parse_raw(raw_page())[0],
        pages.parse_source(sass_page()),
        pages.parse_source(lines_page()),
        batch=512,
        counted=COUNTED,
    )


def test_duration_and_multiprocessors(reading: dict[str, Any]) -> None:
    assert reading["duration_us"] == pytest.approx(400)
    assert reading["clock_mhz"] == pytest.approx(1875)
    assert reading["sm"] == {
        "active_share": pytest.approx(80),
        "busy_share": 33.3,
        "ipc_active": 1.2,
        "ipc_elapsed": 0.96,
    }
    assert reading["instructions"] == {"executed": 102_400_000, "per_request": 200_000}


def test_pipes(reading: dict[str, Any]) -> None:
    pipes = {"tensor": 3.5, "fma": 17.5, "alu": 11, "lsu": 22, "xu": None}
    assert reading["pipes"] == pipes
    assert reading["pipe_metrics"]["tensor_op_gmma"] == 0.75
    assert reading["missing"] == ["pipes.xu"]


def test_occupancy(reading: dict[str, Any]) -> None:
    assert reading["occupancy"] == {
        "achieved_share": 24.5,
        "theoretical_share": 25,
        "registers": 128,
        "shared_bytes": 61_024,
        "waves": 1.94,
        "blocks_by_registers": 2,
        "blocks_by_shared": 3,
    }


def test_traffic_stands_beside_what_was_counted(reading: dict[str, Any]) -> None:
    memory = reading["memory"]
    assert (memory["counted_read_bytes"], memory["counted_write_bytes"]) == (1_500_000, 1_024)
    assert (memory["l2_read_bytes"], memory["l2_write_bytes"]) == (1.5e9, 640_000)
    assert (memory["dram_read_bytes"], memory["dram_write_bytes"]) == (4.5e6, 2_048)
    assert reading["counted"] == COUNTED


def test_sectors_where_the_report_has_no_bytes(modules: Modules) -> None:
    pages, read = modules.profile_pages, modules.profile_reading
    rest = {name: cell for name, cell in RAW.items() if not name.startswith("l1tex__m_")}
    found = read.make_reading(pages.parse_raw(raw_page(rest))[0], [], [], batch=1, counted=COUNTED)
    assert found["memory"]["l2_read_bytes"] == 32 * 47_000_000
    assert found["memory"]["l2_write_bytes"] is None
    wanted = {"memory.l2_write_bytes", "opcodes", "lines", "spills.local_loads"}
    assert wanted <= set(found["missing"])


def test_spills_are_counted_in_sass(reading: dict[str, Any], modules: Modules) -> None:
    assert reading["spills"] == {"local_loads": 60, "local_stores": 40}
    pages, read = modules.profile_pages, modules.profile_reading
    no_sass = pages.parse_raw(
        raw_page(RAW | {"smsp__inst_executed_op_local_ld.sum": ("inst", "70")})
    )[0]
    found = read.make_reading(no_sass, [], [], batch=1, counted=COUNTED)
    assert found["spills"] == {"local_loads": 70, "local_stores": None}


def test_stalls_are_sorted(reading: dict[str, Any], modules: Modules) -> None:
    assert [(row["reason"], row["cycles"], row["share"]) for row in reading["stalls"]] == [
        ("long_scoreboard", 5, pytest.approx(62.5)),
        ("barrier", 2, pytest.approx(25)),
        ("selected", 1, pytest.approx(12.5)),
    ]
    sampled = {name: cell for name, cell in RAW.items() if "average_warps" not in name}
    kernel = modules.profile_pages.parse_raw(raw_page(sampled))[0]
    assert modules.profile_reading.stalls(kernel) == [
        {"reason": "barrier", "cycles": None, "share": pytest.approx(75)},
        {"reason": "wait", "cycles": None, "share": pytest.approx(25)},
    ]


def test_opcodes(reading: dict[str, Any]) -> None:
    assert [row["opcode"] for row in reading["opcodes"]] == ["LDG", "HMMA", "BAR", "LDL", "STL"]
    assert reading["opcodes"][0]["executed_share"] == pytest.approx(100 * 5_000 / 9_000)
    assert reading["opcodes"][0]["samples_share"] == pytest.approx(60)


def test_hot_lines(reading: dict[str, Any]) -> None:
    lines = reading["lines"]
    assert [(row["file"], row["line"], row["stall"]) for row in lines] == [
        ("csrc/cuda/heads.cuh", 41, "long_sb"),
        ("csrc/cuda/heads.cuh", 42, "long_sb"),
        ("cooperative_groups.h", 7, "barrier"),
    ]
    assert [row["samples_share"] for row in lines] == [pytest.approx(x) for x in (60, 30, 10)]
    assert sum(row["executed_share"] for row in lines) == pytest.approx(100)


def test_in_words(reading: dict[str, Any], modules: Modules) -> None:
    said = "\n".join(modules.profile_words.describe(reading))
    for part in (
        "400 us at 1,875 MHz",
        "tensor 3.5%, fma 17.5%, alu 11.0%, lsu 22.0%, xu -",
        "102,400,000 of warps, 200,000 a request",
        "24.5% achieved, 25.0% possible; 128 registers, 61 kB shared, 1.94 waves",
        "60 local loads, 40 local stores",
        "1.5 MB counted, L2 1.5 GB (1,000x), DRAM 4.5 MB (3x)",
        "long_scoreboard           62.5%  5",
        "csrc/cuda/heads.cuh:41  const Vec w = load(weight, row);",
        "not in the report: pipes.xu",
    ):
        assert part in said, part


def test_a_report_without_anything_still_reads(modules: Modules) -> None:
    pages, read = modules.profile_pages, modules.profile_reading
    bare = {name: cell for name, cell in RAW.items() if "__" not in name}
    kernel = pages.parse_raw(raw_page(bare))[0]
    found = read.make_reading(kernel, [], [], batch=1, counted=COUNTED)
    json.dumps(found, allow_nan=False)
    said = "\n".join(modules.profile_words.describe(found))
    assert "none: the kernel was compiled without line information" in said
    assert "duration_us" in found["missing"]
