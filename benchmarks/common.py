"""What every benchmark here says about its machine, and the JSON file it leaves.

    results/<kind>-<machine>.json = {"kind", "machine", "setting", "results", ..}

`machine` holds facts (processor, cores, torch, commit, GPUs), `setting` what was asked for, and
`results` one object per measured point. Tables and plots are made from these files alone
(make_tables.py, plot_results.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidmlp_kernels.trie import host_library

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COUNT_SUFFIXES = {"": 1, "k": 1_000, "M": 1_000_000}
HOST_CLOCK = "call, host clock"  # how a row says that the GPU took no part
TWO_LAUNCHES = "cuda, two launches"  # the cuda backend as nobody gets it who does not ask for it
REQUIRED_KEYS = ("kind", "machine", "setting", "results")


def parse_count(text: str) -> int:
    """12k -> 12000, 20M -> 20000000; argparse's error otherwise."""
    match = re.fullmatch(r"(\d+)([kM]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected counts such as 500, 12k or 20M, got {text!r}")
    return int(match[1]) * COUNT_SUFFIXES[match[2]]


def format_count(number: int) -> str:
    """20000000 -> 20M, 12101 -> 12.1k, 500 -> 500."""
    for suffix, size in (("M", 1_000_000), ("k", 1_000)):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def cpu_flags() -> list[str]:
    """The vector instructions that this processor has and kernels or torch may use."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    present = found[1].split() if found else []
    return [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if f in present]


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak since `reset_peak`) of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1])


def reset_peak() -> None:
    """Sets VmHWM to what is in use now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def system_memory(field: str) -> int:
    """MemTotal or MemAvailable of the machine in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if match is None:
        raise RuntimeError(f"/proc/meminfo has no {field}")
    return int(match[1]) * 1024


class OthersCpuShare:
    """How much of the processor others used meanwhile: 0 on a quiet machine, 1 = all of it.

        with OthersCpuShare() as others:
            ...
        others.share

    Counts stolen time of a virtual machine as others', and so children that still run.
    """

    def __enter__(self) -> OthersCpuShare:
        self._begin = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        total, busy, own = (
            end - begin for begin, end in zip(self._begin, self._seconds(), strict=True)
        )
        # Ticks are coarse: a short stretch may seem to have used less than this process alone.
        self.share = min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """CPU seconds since boot: of all kinds, not idle, and of this process."""
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, idle, waiting, irq, softirq, steal = map(int, first[1:9])
        busy = user + nice + system + irq + softirq + steal
        per_second = os.sysconf("SC_CLK_TCK")
        return (busy + idle + waiting) / per_second, busy / per_second, sum(os.times()[:4])


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git: a tarball on a bare machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def gpu_facts() -> list[dict[str, Any]]:
    """Name, driver, memory, clocks and power limit of every GPU, from nvidia-ml-py.

    Empty where that package, the driver or a GPU is missing.
    """
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    facts = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        facts.append(
            {
                "name": pynvml.nvmlDeviceGetName(gpu),
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total),
                "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                "max_sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
                "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
            }
        )
    pynvml.nvmlShutdown()
    return facts


def machine_facts() -> dict[str, Any]:
    """Everything about machine and build that a number depends on; call it before measuring.

    load_average is the last minute's: well below 1 on a quiet machine.
    """
    build = host_library().build_info()
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": cpu_flags(),
        "memory_bytes": system_memory("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "compiler": build["compiler"],
        "flags": build["flags"],
        "commit": commit(),
        "load_average": os.getloadavg()[0],
        "gpus": gpu_facts(),
    }


def slug(name: str) -> str:
    """A name as a part of a file name: "AMD EPYC 9654" -> "amd-epyc-9654"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_path(kind: str, machine: str) -> Path:
    """results/<kind>-<machine>.json; `machine` is the processor or GPU that was measured."""
    return RESULTS / f"{kind}-{slug(machine)}.json"


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes one benchmark's results; a file of that name is replaced at once or not at all."""
    missing = [key for key in REQUIRED_KEYS if key not in data]
    if missing:
        raise ValueError(f"results: expected the keys {REQUIRED_KEYS}, got none of {missing}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """One benchmark's results; ValueError where the file is none."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; run the benchmark again") from error
    if not isinstance(data, dict) or any(key not in data for key in REQUIRED_KEYS):
        raise ValueError(
            f"{path}: expected an object with {', '.join(REQUIRED_KEYS)}; run the benchmark again"
        )
    return data
