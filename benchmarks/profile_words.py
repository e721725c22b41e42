"""A reading of profile_reading in words, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
