"""Pages as Nsight Compute prints them, small ones, for the tests of profile_nsight."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence


def page(rows: Sequence[Sequence[str]]) -> str:
    """Rows as ncu prints them: every cell in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return text.getvalue()


# Column of the raw page -> (unit, cell).
RAW = {
    "ID": ("", "0"),
    "Process ID": ("", "4711"),
    "Process Name": ("", "python3.11"),
    "Host Name": ("", "127.0.0.1"),
    "Kernel Name": ("", "void sidmlp::cuda::beam_decode_kernel<__nv_bfloat16>(DecodeView, int)"),
    "Context": ("", "1"),
    "Stream": ("", "7"),
    "Block Size": ("", "(256, 1, 1)"),
    "Grid Size": ("", "(512, 1, 1)"),
    "Device": ("", "0"),
    "CC": ("", "9.0"),
    "dram__bytes_read.sum": ("Mbyte", "4.5"),
    "dram__bytes_write.sum": ("byte", "2,048"),
    "gpc__cycles_elapsed.max": ("cycle", "750,000"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "0.4"),
    "gpu__time_duration.sum": ("ns", "400,000"),
    "l1tex__m_l1tex2xbar_write_bytes.sum": ("Kbyte", "640"),
    "l1tex__m_xbar2l1tex_read_bytes.sum": ("Gbyte", "1.5"),
    "l1tex__t_sector_hit_rate.pct": ("%", "31.5"),
    "launch__occupancy_limit_registers": ("block", "2"),
    "launch__occupancy_limit_shared_mem": ("block", "3"),
    "launch__registers_per_thread": ("register/thread", "128"),
    "launch__shared_mem_per_block_driver": ("byte/block", "1,024"),
    "launch__shared_mem_per_block_dynamic": ("Kbyte/block", "60"),
    "launch__shared_mem_per_block_static": ("byte/block", "0"),
    "launch__waves_per_multiprocessor": ("", "1.94"),
    "lts__t_sector_hit_rate.pct": ("%", "99.1"),
    "lts__t_sectors_op_read.sum": ("sector", "47,000,000"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12.25"),
    "sm__cycles_active.avg": ("cycle", "600,000"),
    "sm__inst_executed.avg.per_cycle_active": ("inst/cycle", "1.2"),
    "sm__inst_executed.avg.per_cycle_elapsed": ("inst/cycle", "0.96"),
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": ("%", "11"),
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active": ("%", "22"),
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": ("%", "0.75"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "n/a"),
    "sm__instruction_throughput.avg.pct_of_peak_sustained_active": ("%", "33.3"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "25"),
    "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "17.5"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "3.5"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.5"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "2"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "5"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1"),
    "smsp__average_warps_issue_stalled_tex_throttle_per_issue_active.ratio": ("inst", "0"),
    "smsp__inst_executed.sum": ("inst", "102,400,000"),
    "smsp__pcsamp_warps_issue_stalled_barrier": ("", "300"),
    "smsp__pcsamp_warps_issue_stalled_barrier_not_issued": ("", "999"),
    "smsp__pcsamp_warps_issue_stalled_wait": ("", "100"),
}

MEASURED = [
    "Warp Stall Sampling (All Samples)",
    "Warp Stall Sampling (Not-issued Samples)",
    "# Samples",
    "Instructions Executed",
    "Thread Instructions Executed",
    "stall_barrier",
    "stall_long_sb",
    "stall_barrier (Not Issued)",
    "stall_long_sb (Not Issued)",
]


def measured(samples: int, executed: int, barrier: int = 0, long_sb: int = 0) -> list[str]:
    numbers = [samples, samples, samples, executed, 32 * executed, barrier, long_sb, 900, 900]
    return [f"{value:,}" for value in numbers]


# address -> (SASS, numbers)
SASS = {
    "0x7f5800010000": ("      LDG.E.128.CONSTANT R4, [R2.64] ", measured(60, 5_000, 0, 60)),
    "0x7f5800010010": ("@!P0  HMMA.16816.F32.BF16 R8, R4, R6, R8 ", measured(20, 3_000, 5, 10)),
    "0x7f5800010020": ("      STL.64 [R1+0x8], R10 ", measured(4, 40)),
    "0x7f5800010030": ("@UP1  LDL R3, [R1+0x8] ", measured(6, 60)),
    "0x7f5800010040": ("      BAR.SYNC.DEFER_BLOCKING 0x0 ", measured(10, 900, 10)),
}
FIRST, SECOND, STORE, LOAD, BARRIER = SASS


def raw_page(columns: dict[str, tuple[str, str]] | None = None) -> str:
    columns = RAW if columns is None else columns
    units, cells = zip(*columns.values(), strict=True)
    return page([list(columns), units, cells])


def sass_page() -> str:
    rows = [[address, text, *numbers] for address, (text, numbers) in SASS.items()]
    return page([["Kernel Name", "beam_decode_kernel"], ["Address", "Source", *MEASURED], *rows])


def lines_page() -> str:
    """A source line has the sums of its instructions; one instruction stands in both files."""

    def source(line: int, text: str, numbers: list[str]) -> list[str]:
        return [str(line), text, "-", "", *numbers]

    def instruction(address: str) -> list[str]:
        return ["", "", address, SASS[address][0], *SASS[address][1]]

    header = ["Line No", "Source", "Address", "Source", *MEASURED]
    none = [""] * len(MEASURED)
    return page(
        [
            ["File Path", "/src/csrc/cuda/heads.cuh"],
            ["Function Name", "beam_decode_kernel"],
            header,
            source(1, '// The heads, "in one launch".', none),
            source(41, "    const Vec w = load(weight, row);", measured(60, 5_000, 0, 60)),
            instruction(FIRST),
            source(42, "    sum = mma(w, x, sum);", measured(30, 3_100, 5, 10)),
            instruction(SECOND),
            instruction(STORE),
            instruction(LOAD),
            ["File Path", "/usr/local/cuda/include/cooperative_groups.h"],
            ["Function Name", "beam_decode_kernel"],
            header,
            source(7, "  __syncthreads();", measured(30, 3_900)),
            instruction(SECOND),
            instruction(BARRIER),
        ]
    )


# Bytes that the profiled call was counted to touch.
COUNTED = {"read": {"weights": 1_000_000, "trie": 500_000}, "written": {"results": 1_024}}
