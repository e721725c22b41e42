"""Times on a GPU: replays of CUDA graphs with the L2 warm and cold, calls, and what the host pays.

    warm  replays of one graph back to back between two events, divided by their number. A spin
          kernel before the first event holds the device until all of them are enqueued, so the
          host's launches do not count; a p99 is one of such means.
    cold  one replay between two events, enqueued behind a write that is larger than the L2. It
          includes the start of a graph, which a replay of one empty kernel, timed alike, shows.
    single  one replay between two events, after another one that fills the L2: its p99 is that of
          single decodes. It includes the start of a graph, as cold does.
    call  one call between two events on an idle stream: launches included.
    wall  a call of our CPU backend by the host's clock.
    host  wall time of enqueueing a few calls, divided by their number; the device idle before, and
          few enough calls that none waits for a place in the queue.

Variants timed alike take turns round by round. Nothing here verifies what it times.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_nvml
import torch

from sidmlp_kernels.testing.timing import Timing

MOST_REPLAYS, FEWEST_REPLAYS = 20, 3
SAMPLE_US = 2000  # a warm sample takes about this long, within these numbers of replays
HOST_CALLS = 20
ENQUEUE_US = 12  # what one replay costs the host at most; the spin kernel covers all of a sample's
CYCLES_PER_US = 2000  # about an H200's clock


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of one call and the outputs that each replay writes again."""

    graph: Any
    outputs: Any

    def replay(self) -> None:
        """Enqueues the graph on the current stream."""
        self.graph.replay()


def captured(call: Callable[[], Any]) -> Captured:
    """The graph of `call`, which has run twice before on a side stream, so that whatever compiles
    or allocates at first use has done so."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return Captured(graph, outputs)


def empty_graph() -> Captured:
    """A graph of one kernel that adds 1 to one number: what a replay costs before it computes."""
    number = torch.zeros(1, device="cuda")
    return captured(lambda: number.add_(1))


def _between_events(call: Callable[[], object], times: int = 1) -> tuple[Any, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    return begin, end


def _us(events: tuple[Any, Any]) -> float:
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) * 1e3


def call_sample(call: Callable[[], object]) -> float:
    """Microseconds of one call on an idle stream."""
    torch.cuda.synchronize()
    return _us(_between_events(call))


def warm_sample(replay: Callable[[], object], replays: int) -> float:
    """Microseconds of a replay, the mean of `replays` back to back."""
    torch.cuda._sleep(replays * ENQUEUE_US * CYCLES_PER_US)
    replay()  # not timed: it brings back into the L2 what other variants drove out
    return _us(_between_events(replay, replays)) / replays


def single_sample(replay: Callable[[], object]) -> float:
    """Microseconds of one replay that follows another."""
    torch.cuda._sleep(4 * ENQUEUE_US * CYCLES_PER_US)
    replay()
    return _us(_between_events(replay))


def wall_sample(call: Callable[[], object]) -> float:
    """Microseconds of a call that does not touch the device."""
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def flush_buffer() -> torch.Tensor:
    """Memory to write before a cold sample: at least twice the L2, and long enough to write that
    the host enqueues the replay meanwhile."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(max(2 * l2, 256 << 20), dtype=torch.uint8, device="cuda")


def cold_sample(replay: Callable[[], object], flush: torch.Tensor) -> float:
    """Microseconds of one replay after a write of `flush`."""
    flush.zero_()
    return _us(_between_events(replay))


def replays_per_sample(replay: Callable[[], object]) -> int:
    """How many replays fill SAMPLE_US."""
    replay()
    once = call_sample(replay)
    return max(FEWEST_REPLAYS, min(MOST_REPLAYS, int(SAMPLE_US / max(once, 1.0))))


def sampled(
    samplers: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int, max_seconds: float
) -> dict[str, Timing]:
    """Medians and p99 of each sampler, which take turns; stops after the round that reaches
    max_seconds."""
    for _ in range(warmup):
        for sample in samplers.values():
            sample()
    found: dict[str, list[float]] = {name: [] for name in samplers}
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, sample in samplers.items():
            found[name].append(sample())
        if time.perf_counter() - begin >= max_seconds:
            break
    return {name: Timing.of(values) for name, values in found.items()}


def host_sample(call: Callable[[], object]) -> float:
    """Microseconds that the host spends on a call."""
    torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    for _ in range(HOST_CALLS):
        call()
    return (time.perf_counter_ns() - begin) / 1e3 / HOST_CALLS


def other_processes() -> int | None:
    """How many other processes compute on this GPU; None where nvidia-ml-py cannot tell.

    Our children, such as a compiler's workers, are not others. In a container the driver may number
    processes otherwise than we do; then one of them is us.
    """
    try:
        with gpu_nvml.this_gpu() as (nvml, gpu):
            torch.cuda.synchronize()  # from now on we are one of them
            pids = [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
    except gpu_nvml.Unavailable:
        return None
    if os.getpid() in pids:
        return sum(not _is_ours(pid) for pid in pids)
    return max(0, len(pids) - 1)


def _is_ours(pid: int) -> bool:
    """Whether `pid` is this process or comes from it."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # gone, or hidden from us
            return False
        parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        pid = int(parent[1]) if parent else 0
    return False
