"""Energy of replays, from the GPU's own counter of all energy that it has used (nvidia-ml-py).

The counter covers the whole board, idle power included, and moves in steps of many milliseconds.
Replays run all the time, and what is counted lies between two of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import gpu_nvml
import torch

SECONDS = 0.5  # at least so long between the two steps
BURST_SECONDS = 0.005  # replays between two looks at the counter


@dataclass(frozen=True)
class Energy:
    """What `runs` runs in `seconds` took."""

    joules: float
    runs: int
    seconds: float


def counted(
    run: Callable[[], object],
    read_millijoules: Callable[[], int],
    *,
    burst: int,
    seconds: float = SECONDS,
    wait: Callable[[], object] = torch.cuda.synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Energy of `run`, called `burst` times between looks at the counter.

    Raises gpu_nvml.Unavailable where the counter stands still.
    """
    done, last, begun = 0, read_millijoules(), None
    end = clock() + 5 * seconds + 1
    while True:
        for _ in range(burst):
            run()
        wait()
        done += burst
        now, at = read_millijoules(), clock()
        if now != last:
            last = now
            if begun is None:
                begun = (now, done, at)
            elif at - begun[2] >= seconds:
                return Energy((now - begun[0]) / 1e3, done - begun[1], at - begun[2])
        if at > end:
            raise gpu_nvml.Unavailable(f"NVML's energy counter stood still for {5 * seconds} s")


def energy_of(replay: Callable[[], object], replay_us: float) -> Energy:
    """Energy of replays that take about `replay_us`; gpu_nvml.Unavailable where NVML cannot say."""
    burst = max(1, int(BURST_SECONDS * 1e6 / replay_us))
    with gpu_nvml.this_gpu() as (nvml, gpu):
        return counted(replay, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu), burst=burst)
