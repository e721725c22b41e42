"""The ceilings of this GPU, measured in the run that they judge: copy rate and matrix rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import gpu_timing as timing
import torch

COPY_BYTES = 1 << 30  # far beyond the L2
MATMUL_SIZE = 8192
SAMPLES, REPEATS = 5, 4


def measured_ceilings(dtypes: Sequence[torch.dtype], device: str) -> dict[str, Any]:
    """Bytes per second of a device-to-device copy, read and written bytes both counted, and FLOP
    per second of a square matrix product of random numbers in each dtype; medians."""
    copy_us = _copy_us(device)
    flop = 2.0 * MATMUL_SIZE**3
    rates = {}
    for dtype in dtypes:
        left, right = (
            torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype) for _ in range(2)
        )
        product = torch.empty_like(left)
        us = _median_us(lambda a=left, b=right, c=product: torch.mm(a, b, out=c))
        rates[str(dtype).removeprefix("torch.")] = flop / us * 1e6
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / copy_us * 1e6,
        "copy_bytes": COPY_BYTES,
        "matmul_flop_per_s": rates,
        "matmul_size": MATMUL_SIZE,
    }


def _copy_us(device: str) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median_us(lambda: target.copy_(source))


def _median_us(call: Any) -> float:
    return statistics.median(timing.warm_sample(call, REPEATS) for _ in range(SAMPLES))
