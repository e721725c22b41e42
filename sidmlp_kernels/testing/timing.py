"""Timing callables side by side: medians and 99th percentiles of raw samples.

Variants take turns call by call, so that a change of clocks or a busy neighbour meets all of them.
On a GPU, CUDA events on the current stream measure what the device did, else the wall clock does.
Verify results before timing them; this only times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds per call of one variant."""

    median: float
    p99: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """From at least one sample."""
        ordered = sorted(samples)
        worst = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        return cls(statistics.median(ordered), worst, tuple(samples))

    def __str__(self) -> str:
        return f"median {self.median:.1f} us, p99 {self.p99:.1f} us of {len(self.samples)}"


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 50,
    warmup: int = 5,
    max_seconds: float | None = None,
) -> dict[str, Timing]:
    """Microseconds per call of each variant, over `rounds` rounds after `warmup` rounds.

    max_seconds: stop after the round that reaches it (at least one round is measured).
    Raises ValueError for no variants or fewer than one round.
    """
    if not variants or rounds < 1 or warmup < 0:
        raise ValueError(
            f"variants, rounds, warmup: expected at least one variant and one round, got "
            f"{len(variants)} variants, {rounds} rounds, {warmup} rounds of warm-up; "
            "pass e.g. {'kernel': lambda: plan.decode_states(states, mask)}"
        )
    measure = _device_call if torch.device(device).type == "cuda" else _host_call
    for _ in range(warmup):
        for call in variants.values():
            measure(call)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(measure(call))
        if max_seconds is not None and time.perf_counter() - begin >= max_seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _host_call(call: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def _device_call(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
