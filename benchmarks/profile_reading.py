"""What a report of Nsight Compute says about one kernel: its CSV pages, parsed into a reading.

    ncu --import REPORT --page raw --csv                              -> parse_raw
    ncu --import REPORT --page source --csv --print-source sass       -> parse_source
    ncu --import REPORT --page source --csv --print-source cuda,sass  -> parse_source, with lines

Metrics are those of compute capability 9.0 in Nsight Compute 2025. Where versions differ in a name,
the first that the report has is taken; what it lacks is None and stands in "missing". Nothing
here needs ncu or a GPU.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
SECTOR_BYTES = 32

# Share of a pipe's peak while its multiprocessor works, by the first of these that the report has.
_PIPES = {
    "tensor": (
        "sm__pipe_tensor_cycles_active",
        "sm__pipe_tensor_op_hmma_cycles_active",
        "sm__inst_executed_pipe_tensor",
        "sm__inst_executed_pipe_tensor_op_hmma",
    ),
    "fma": ("sm__pipe_fma_cycles_active", "sm__inst_executed_pipe_fma"),
    "alu": ("sm__pipe_alu_cycles_active", "sm__inst_executed_pipe_alu"),
    "lsu": ("sm__inst_executed_pipe_lsu",),
    "xu": ("sm__pipe_xu_cycles_active", "sm__inst_executed_pipe_xu"),
}
_OF_PEAK = (".avg.pct_of_peak_sustained_active", ".sum.pct_of_peak_sustained_active")
_ANY_PIPE = re.compile(r"sm__(?:inst_executed_pipe|pipe)_(\w+)\.avg\.pct_of_peak_sustained_active")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_STALL_SAMPLES = re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+?)(?<!_not_issued)")

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


# -- pages


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


# -- the reading


def make_reading(
    kernel: Kernel,
    sass: Sequence[Instruction],
    lines: Sequence[Instruction],
    *,
    batch: int,
    counted: Mapping[str, Mapping[str, float]],
    top: int = 20,
) -> dict[str, Any]:
    """What a report says, as a JSON object; shares are percent of a peak or of a total.

    sass, lines  the two forms of the source page
    counted      bytes that the call must read and write at least, by what they are
    """
    first = kernel.first
    executed = first("smsp__inst_executed.sum", "sm__inst_executed.sum")
    seconds = first("gpu__time_duration.sum", "gpu__time_duration.avg")
    cycles = first("gpc__cycles_elapsed.max", "sm__cycles_elapsed.max", "sm__cycles_elapsed.avg")
    active = first("sm__cycles_active.avg")
    reading: dict[str, Any] = {
        "kernel": kernel.name,
        "grid": kernel.grid,
        "block": kernel.block,
        "duration_us": None if seconds is None else seconds * 1e6,
        "clock_mhz": cycles / seconds / 1e6 if cycles and seconds else None,
        "sm": {
            "active_share": 100 * active / cycles if active is not None and cycles else None,
            "busy_share": first(
                "sm__instruction_throughput.avg.pct_of_peak_sustained_active",
                "sm__throughput.avg.pct_of_peak_sustained_elapsed",
            ),
            "ipc_active": first("sm__inst_executed.avg.per_cycle_active"),
            "ipc_elapsed": first("sm__inst_executed.avg.per_cycle_elapsed"),
        },
        "pipes": {
            name: first(*(metric + suffix for metric in metrics for suffix in _OF_PEAK))
            for name, metrics in _PIPES.items()
        },
        "pipe_metrics": {
            found[1]: value
            for name, value in kernel.metrics.items()
            if (found := _ANY_PIPE.fullmatch(name))
        },
        "instructions": {
            "executed": executed,
            "per_request": None if executed is None else executed / batch,
        },
        "occupancy": _occupancy(kernel),
        "memory": _memory(kernel, counted),
        "spills": _spills(kernel, sass),
        "stalls": stalls(kernel),
        "opcodes": opcodes(sass, top),
        "lines": hot_lines(lines, top),
        "counted": {side: dict(parts) for side, parts in counted.items()},
    }
    reading["missing"] = sorted(_missing(reading))
    return reading


def _occupancy(kernel: Kernel) -> dict[str, float | None]:
    shared = [
        kernel.first(f"launch__shared_mem_per_block_{kind}")
        for kind in ("static", "dynamic", "driver")
    ]
    given = [size for size in shared if size is not None]
    return {
        "achieved_share": kernel.first("sm__warps_active.avg.pct_of_peak_sustained_active"),
        "theoretical_share": kernel.first("sm__maximum_warps_per_active_cycle_pct"),
        "registers": kernel.first("launch__registers_per_thread"),
        "shared_bytes": sum(given) if given else kernel.first("launch__shared_mem_per_block"),
        "waves": kernel.first("launch__waves_per_multiprocessor"),
        "blocks_by_registers": kernel.first("launch__occupancy_limit_registers"),
        "blocks_by_shared": kernel.first("launch__occupancy_limit_shared_mem"),
    }


def _sectors(kernel: Kernel, direction: str) -> float | None:
    """Bytes by the L2's own count of sectors; the second name counts its fabric, too."""
    sectors = kernel.first(
        f"lts__t_sectors_srcunit_tex_op_{direction}.sum", f"lts__t_sectors_op_{direction}.sum"
    )
    return None if sectors is None else SECTOR_BYTES * sectors


def _memory(kernel: Kernel, counted: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    first = kernel.first
    from_l2 = first("l1tex__m_xbar2l1tex_read_bytes.sum")
    to_l2 = first("l1tex__m_l1tex2xbar_write_bytes.sum")
    return {
        "counted_read_bytes": sum(counted.get("read", {}).values()),
        "counted_write_bytes": sum(counted.get("written", {}).values()),
        "l2_read_bytes": _sectors(kernel, "read") if from_l2 is None else from_l2,
        "l2_write_bytes": _sectors(kernel, "write") if to_l2 is None else to_l2,
        "dram_read_bytes": first("dram__bytes_read.sum"),
        "dram_write_bytes": first("dram__bytes_write.sum"),
        "l1_hit_share": first("l1tex__t_sector_hit_rate.pct"),
        "l2_hit_share": first("lts__t_sector_hit_rate.pct"),
        "l2_busy_share": first("lts__throughput.avg.pct_of_peak_sustained_elapsed"),
        "dram_busy_share": first(
            "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
            "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        ),
    }


def _spills(kernel: Kernel, sass: Sequence[Instruction]) -> dict[str, float | None]:
    """Warp instructions on local memory, counted from SASS where there is any.

    Local memory holds spilled registers and arrays that are indexed at run time, alike.
    """

    def executed(opcode: str, *names: str) -> float | None:
        if sass:
            return sum(one.executed for one in sass if one.opcode == opcode)
        return kernel.first(*names)

    return {
        "local_loads": executed(
            "LDL", "smsp__inst_executed_op_local_ld.sum", "sass__inst_executed_local_loads"
        ),
        "local_stores": executed(
            "STL", "smsp__inst_executed_op_local_st.sum", "sass__inst_executed_local_stores"
        ),
    }


def stalls(kernel: Kernel) -> list[dict[str, Any]]:
    """Why warps did not issue, the greatest reason first; "selected" is a warp that issues.

    cycles  a warp spends so for each instruction it issues; None where only samples are known
    share   percent of all cycles of warps
    """
    cycles = {
        found[1]: value
        for name, value in kernel.metrics.items()
        if (found := _STALL.fullmatch(name))
    }
    weights = cycles or {
        found[1]: value
        for name, value in kernel.metrics.items()
        if (found := _STALL_SAMPLES.fullmatch(name))
    }
    total = sum(weights.values())
    return [
        {
            "reason": reason,
            "cycles": cycles.get(reason),
            "share": 100 * weight / total,
        }
        for reason, weight in sorted(weights.items(), key=lambda item: -item[1])
        if weight > 0
    ]


def _share(part: float, total: float) -> float:
    return 100 * part / total if total else 0.0


def opcodes(sass: Iterable[Instruction], top: int) -> list[dict[str, Any]]:
    """Executed warp instructions and samples by opcode, the most executed first."""
    executed: dict[str, float] = defaultdict(float)
    samples: dict[str, float] = defaultdict(float)
    for one in sass:
        executed[one.opcode] += one.executed
        samples[one.opcode] += one.samples
    total, all_samples = sum(executed.values()), sum(samples.values())
    return [
        {
            "opcode": opcode,
            "executed": count,
            "executed_share": _share(count, total),
            "samples_share": _share(samples[opcode], all_samples),
        }
        for opcode, count in sorted(executed.items(), key=lambda item: -item[1])[:top]
        if count
    ]


def hot_lines(instructions: Sequence[Instruction], top: int) -> list[dict[str, Any]]:
    """Source lines by samples, the hottest first; empty where no instruction has a line.

    stall  the reason most of a line's samples have, "" where the page says none
    """
    groups: dict[tuple[str, int], list[Instruction]] = defaultdict(list)
    for one in instructions:
        groups[one.file, one.line].append(one)
    if not any(line for _, line in groups):
        return []
    samples = sum(one.samples for one in instructions)
    executed = sum(one.executed for one in instructions)
    rows = []
    for (file, line), members in groups.items():
        reasons: dict[str, float] = defaultdict(float)
        for one in members:
            for reason, samples_of in one.stalls.items():
                reasons[reason] += samples_of
        worst = max(reasons, key=lambda reason: reasons[reason], default="")
        rows.append(
            {
                "file": shown_path(file) if line else "(no line)",
                "line": line,
                "text": members[0].text if line else "",
                "samples_share": _share(sum(one.samples for one in members), samples),
                "executed_share": _share(sum(one.executed for one in members), executed),
                "stall": worst if worst and reasons[worst] else "",
            }
        )
    rows.sort(key=lambda row: (-row["samples_share"], -row["executed_share"]))
    return rows[:top]


def shown_path(file: str) -> str:
    """A source file from the repository's folder on, or its name."""
    found = re.search(r"(?:^|/)((?:csrc|sidmlp_kernels|benchmarks)/.*)$", file)
    return found[1] if found else file.rsplit("/", 1)[-1]


def _missing(value: Any, name: str = "") -> Iterator[str]:
    if value is None:
        yield name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _missing(inner, f"{name}.{key}" if name else key)
    elif value == [] and name in ("stalls", "opcodes", "lines"):
        yield name


# -- in words


def describe(reading: Mapping[str, Any]) -> list[str]:
    """The reading for a terminal, line by line."""
    sm, occupancy, memory = reading["sm"], reading["occupancy"], reading["memory"]
    spills, instructions = reading["spills"], reading["instructions"]
    pipes = ", ".join(f"{name} {_percent(share)}" for name, share in reading["pipes"].items())
    said = [
        f"kernel        {reading['kernel']}  grid {reading['grid']}  block {reading['block']}",
        f"duration      {_number(reading['duration_us'], ' us')} at "
        f"{_number(reading['clock_mhz'], ' MHz')}",
        f"SM            {_percent(sm['active_share'])} of the time active, then busy "
        f"{_percent(sm['busy_share'])}, {_number(sm['ipc_active'])} instructions a cycle "
        f"({_number(sm['ipc_elapsed'])} over all cycles)",
        f"pipes         {pipes}",
        f"instructions  {_count(instructions['executed'])} of warps, "
        f"{_count(instructions['per_request'])} a request",
        f"occupancy     {_percent(occupancy['achieved_share'])} achieved, "
        f"{_percent(occupancy['theoretical_share'])} possible; "
        f"{_count(occupancy['registers'])} registers, {_bytes(occupancy['shared_bytes'])} shared, "
        f"{_number(occupancy['waves'])} waves",
        f"spills        {_count(spills['local_loads'])} local loads, "
        f"{_count(spills['local_stores'])} local stores of warps",
    ]
    for word, counted in (("read", "counted_read_bytes"), ("write", "counted_write_bytes")):
        of = memory[counted]
        said.append(
            f"{word:13} {_bytes(of)} counted, L2 {_against(memory[f'l2_{word}_bytes'], of)}, "
            f"DRAM {_against(memory[f'dram_{word}_bytes'], of)}"
        )
    said.append(
        f"memory        L2 busy {_percent(memory['l2_busy_share'])}, DRAM busy "
        f"{_percent(memory['dram_busy_share'])}; hits L1 {_percent(memory['l1_hit_share'])}, "
        f"L2 {_percent(memory['l2_hit_share'])}"
    )
    said.append("stalls        share of warps' cycles, cycles for each instruction")
    said += [
        f"  {row['reason']:24} {row['share']:5.1f}%  {_number(row['cycles'])}"
        for row in reading["stalls"]
        if row["share"] >= 1
    ]
    said.append("opcodes       share executed, share of samples")
    said += [
        f"  {row['opcode']:24} {row['executed_share']:5.1f}%  {row['samples_share']:5.1f}%"
        for row in reading["opcodes"][:12]
    ]
    said.append("source lines  share of samples, share executed, most frequent stall")
    if not reading["lines"]:
        said.append("  none: the kernel was compiled without line information")
    for row in reading["lines"]:
        place = f"{row['file']}:{row['line']}" if row["line"] else row["file"]
        said.append(
            f"  {row['samples_share']:5.1f}%  {row['executed_share']:5.1f}%  {row['stall']:16} "
            f"{place}  {row['text'][:80]}".rstrip()
        )
    if reading["missing"]:
        said.append(f"not in the report: {', '.join(reading['missing'])}")
    return said


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.4g}{unit}" if value < 1e4 else f"{value:,.0f}{unit}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _against(value: float | None, counted: float) -> str:
    """Bytes, and how many times what was counted they are."""
    if value is None or not counted:
        return _bytes(value)
    times = value / counted
    return f"{_bytes(value)} ({times:,.0f}x)" if times >= 10 else f"{_bytes(value)} ({times:.2g}x)"
