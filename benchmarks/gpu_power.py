"""What holds the clocks of a GPU while it replays a graph, as nvidia-ml-py tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gpu_nvml
import torch

SECONDS = 0.3
BURST_SECONDS = 0.02
# Bits of NVML's clock event reasons that mean slower clocks than asked for.
REASONS = {
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "software thermal": 0x20,
    "hardware thermal": 0x40,
    "power brake": 0x80,
}


def power_state(
    replay: Callable[[], object],
    replay_us: float,
    *,
    seconds: float = SECONDS,
    wait: Callable[[], object] = torch.cuda.synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The power limit, the lowest SM clock seen and why clocks were held, looked up while replays
    run; gpu_nvml.Unavailable where NVML cannot say."""
    burst = max(1, int(BURST_SECONDS * 1e6 / replay_us))
    clocks, held = [], set()
    with gpu_nvml.this_gpu() as (nvml, gpu):
        reasons_of = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        if reasons_of is None:
            reasons_of = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        end = clock() + seconds
        while clock() < end:
            for _ in range(burst):
                replay()
            clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))  # while they run
            reasons = reasons_of(gpu)
            held |= {name for name, bit in REASONS.items() if reasons & bit}
            wait()
        limit = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000
    return {
        "limit_w": limit,
        "power_capped": "power cap" in held,
        "held_by": sorted(held),
        "lowest_sm_clock_mhz": min(clocks),
    }
