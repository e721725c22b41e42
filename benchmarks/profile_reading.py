"""What a report of Nsight Compute says about one kernel: from its pages to a reading.

Where versions of Nsight Compute differ in a metric's name, the first that the report has is taken;
what it lacks is None and stands in "missing".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from profile_pages import Instruction, Kernel

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
