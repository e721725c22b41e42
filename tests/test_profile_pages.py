"""The pages that Nsight Compute prints, parsed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from benchmark_scripts import scripts
from ncu_pages import (
    BARRIER,
    FIRST,
    LOAD,
    RAW,
    SECOND,
    STORE,
    lines_page,
    page,
    raw_page,
    sass_page,
)

Modules = SimpleNamespace


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    yield from scripts(("profile_pages",))


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1,234.5", "Kbyte", 1_234_500),
        ("3", "Mbyte/block", 3e6),
        ("2", "GB", 2e9),
        ("1,500", "ns", 1.5e-6),
        ("1,500", "nsecond", 1.5e-6),
        ("2", "ms", 2e-3),
        ("3", "us", 3e-6),
        ("1.98", "Ghz", 1.98e9),
        ("7", "register/thread", 7),
        ("7", "%", 7),
        ("n/a", "", None),
        ("", "byte", None),
        ("nan", "%", None),
        ("(256, 1, 1)", "", None),
    ],
)
def test_cells_become_base_units(
    modules: Modules, text: str, unit: str, value: float | None
) -> None:
    found = modules.profile_pages.number(text, unit)
    assert found == (None if value is None else pytest.approx(value))


def test_the_raw_page(modules: Modules) -> None:
    said = "==PROF== Connected to process 1\n\n" + raw_page()
    (kernel,) = modules.profile_pages.parse_raw(said)
    assert kernel.name.startswith("void sidmlp::cuda::beam_decode_kernel")
    assert (kernel.grid, kernel.block) == ("(512, 1, 1)", "(256, 1, 1)")
    assert kernel.metrics["dram__bytes_read.sum"] == 4.5e6
    assert "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active" not in kernel.metrics
    assert not {"ID", "Device"} & set(kernel.metrics)


def test_what_is_no_raw_page_is_refused(modules: Modules) -> None:
    for text in ("", "==ERROR== broken\n", page([["Address", "Source"]])):
        with pytest.raises(ValueError, match="raw page: expected a line of metric names"):
            modules.profile_pages.parse_raw(text)
    only_header = page([list(RAW), ["" for _ in RAW]])
    assert modules.profile_pages.parse_raw(only_header) == []


def test_the_page_of_sass(modules: Modules) -> None:
    found = modules.profile_pages.parse_source(sass_page())
    assert [one.opcode for one in found] == ["LDG", "HMMA", "STL", "LDL", "BAR"]
    assert [one.executed for one in found] == [5_000, 3_000, 40, 60, 900]
    assert [one.samples for one in found] == [60, 20, 4, 6, 10]
    assert found[1].stalls == {"barrier": 5, "long_sb": 10}
    assert {(one.file, one.line) for one in found} == {("", 0)}


def test_other_names_of_columns(modules: Modules) -> None:
    text = page([["#", "Address", "Source", "Samples"], ["1", "0x10", "NOP", "7"]])
    (only,) = modules.profile_pages.parse_source(text)
    assert (only.opcode, only.samples, only.executed) == ("NOP", 7, 0)


def test_the_page_of_lines_gives_each_instruction_one_line(modules: Modules) -> None:
    found = modules.profile_pages.parse_source(lines_page())
    assert [(one.address, one.line) for one in found] == [
        (FIRST, 41),
        (SECOND, 42),
        (STORE, 42),
        (LOAD, 42),
        (BARRIER, 7),
    ]
    assert found[0].text == "const Vec w = load(weight, row);"
