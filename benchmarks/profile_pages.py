"""The CSV pages that Nsight Compute prints of a report, parsed.

    ncu --import REPORT --page raw --csv                              -> parse_raw
    ncu --import REPORT --page source --csv --print-source sass       -> parse_source
    ncu --import REPORT --page source --csv --print-source cuda,sass  -> parse_source, with lines

Metrics are those of compute capability 9.0 in Nsight Compute 2025. Nothing here needs ncu or a GPU.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}

_SAMPLES = (
    "Warp Stall Sampling (All Samples)",
    "Warp Stall Sampling (All Cycles)",
    "# Samples",
    "Samples",
)
_EXECUTED = "Instructions Executed"


@dataclass(frozen=True)
class Kernel:
    """One row of the raw page: a launch and its metrics in bytes, seconds, Hz or counts."""

    name: str
    grid: str
    block: str
    metrics: Mapping[str, float]

    def first(self, *names: str) -> float | None:
        """The first of these metrics that the report has."""
        return next((self.metrics[name] for name in names if name in self.metrics), None)


@dataclass(frozen=True)
class Instruction:
    """One row of SASS: where it comes from, and what was sampled and executed there.

    file, line, text  of the source, "" and 0 where the page has none
    samples           of the program counter; executed: by warps
    stalls            samples by reason, as the page names them
    """

    address: str
    sass: str
    samples: float
    executed: float
    stalls: Mapping[str, float] = field(default_factory=dict)
    file: str = ""
    line: int = 0
    text: str = ""

    @property
    def opcode(self) -> str:
        """The instruction without its predicate, modifiers and operands: LDG, HMMA, .."""
        words = [word for word in self.sass.split() if not word.startswith("@")]
        return words[0].split(".")[0].rstrip(";") if words else ""


def number(text: str, unit: str = "") -> float | None:
    """A cell in base units, None where it is no finite number: "1,234.5" Kbyte -> 1234500."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    unit = unit.split("/")[0].strip().lower()
    if found := re.fullmatch(r"([num]?)s(?:econds?)?", unit):
        return value * _SECONDS[found[1]]
    if found := re.fullmatch(r"([kmgt]?)(?:b|bytes?|hz)", unit):
        return value * _PREFIXES[found[1]]
    return value


def _rows(page: str) -> Iterator[list[str]]:
    """The page's cells; messages of ncu and empty lines are not its."""
    lines = (line for line in page.splitlines() if line.strip() and not line.startswith("=="))
    return csv.reader(lines)


def parse_raw(page: str) -> list[Kernel]:
    """The raw page: a line of names, one of units, then a line for each kernel.

    ValueError where it is something else.
    """
    rows = list(_rows(page))
    start = next((i for i, row in enumerate(rows) if "Kernel Name" in row), None)
    if start is None or len(rows) < start + 2:
        raise ValueError(
            "raw page: expected a line of metric names with Kernel Name and a line of units, got "
            f"{page.strip().splitlines()[:1]}; import the report with --page raw --csv"
        )
    names, units = rows[start], rows[start + 1]
    kernels = []
    for row in rows[start + 2 :]:
        cells = dict(zip(names, row, strict=False))
        metrics = {}
        for name, unit, cell in zip(names, units, row, strict=False):
            value = number(cell, unit) if "__" in name else None  # as in sm__cycles_active.avg
            if value is not None:
                metrics[name] = value
        kernels.append(
            Kernel(
                cells["Kernel Name"],
                cells.get("Grid Size", ""),
                cells.get("Block Size", ""),
                metrics,
            )
        )
    return kernels


def parse_source(page: str) -> list[Instruction]:
    """The source page, of SASS alone or of CUDA and SASS, each instruction once.

    SASS alone: "Address","Source",.., a line for each instruction. CUDA and SASS: tables of files,
    each after a line "File Path", with "Line No","Source","Address","Source",..: a source line is
    followed by its instructions, and its own numbers are their sums.
    """
    found: dict[str, Instruction] = {}
    file, columns = "", None
    line, text = 0, ""
    for row in _rows(page):
        if row[0] in ("File Path", "File Name") and len(row) > 1:
            file, columns = row[1], None
            continue
        if "Source" in row and "Address" in row:
            columns, line, text = _SourceColumns(row), 0, ""
            continue
        if columns is None or len(row) < columns.width:
            continue
        if columns.line is not None and row[columns.line].strip().isdigit():
            line, text = int(row[columns.line]), row[columns.text].strip()
        address = row[columns.address].strip()
        if address in ("", "-") or address in found:
            continue
        found[address] = Instruction(
            address,
            row[columns.sass].strip(),
            number(row[columns.samples]) or 0.0 if columns.samples is not None else 0.0,
            number(row[columns.executed]) or 0.0 if columns.executed is not None else 0.0,
            {name: number(row[i]) or 0.0 for name, i in columns.stalls.items()},
            file if line else "",
            line,
            text,
        )
    return list(found.values())


class _SourceColumns:
    """Where things stand in a table of the source page."""

    def __init__(self, names: Sequence[str]) -> None:
        sources = [i for i, name in enumerate(names) if name == "Source"]
        self.width = len(names)
        self.address = names.index("Address")
        self.line = names.index("Line No") if "Line No" in names else None
        self.text, self.sass = sources[0], sources[-1]
        samples = next((name for name in _SAMPLES if name in names), None)
        self.samples = names.index(samples) if samples else None
        self.executed = names.index(_EXECUTED) if _EXECUTED in names else None
        self.stalls = {
            name.removeprefix("stall_"): i
            for i, name in enumerate(names)
            if name.startswith("stall_") and "not issued" not in name.lower()
        }
