"""The scripts of benchmarks/ as modules for their tests, and sizes to rehearse them with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidmlp_kernels.testing import Timing

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GPU_SCRIPTS = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "library_trie",
    "decode_variants",
    "torch_peer",
    "static_peer",
    "work_counts",
    "gpu_nvml",
    "gpu_timing",
    "gpu_ceilings",
    "gpu_energy",
    "gpu_participants",
    "gpu_options",
    "gpu_axes",
    "gpu_rows",
    "gpu_points",
    "bench_arguments",
    "report_header",
    "gpu_arguments",
    "table_cells",
    "gpu_tables",
    "make_tables",
    "merge_results",
    "report_run",
    "bench_decode_gpu",
)
REQUEST_SCRIPTS = (
    "gpu_power",
    "request_inputs",
    "request_options",
    "request_checks",
    "request_peers",
    "request_host",
    "request_points",
    "request_tables",
    "bench_requests",
)
SIZES = {
    "codes_per_level": (256, 256, 256, 256),
    "dim": 16,
    "attention_dim": 24,
    "num_heads": 2,
    "ffn_dim": 16,
    "hidden_dim": 32,
    "blocks_per_head": 1,
}


def scripts(names: Sequence[str], loaded_later: Sequence[str] = ()) -> Iterator[SimpleNamespace]:
    """For a fixture: the scripts, importable as they are when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in (*names, *loaded_later):
            sys.modules.pop(name, None)


def pretend_gpu(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are calls, and times and joules that are made up: a GPU benchmark on the CPU."""
    timing = modules.gpu_timing

    def captured(call: Any) -> Any:
        first = call()
        alone = isinstance(first, torch.Tensor)
        kept = [torch.empty_like(tensor) for tensor in ([first] if alone else first)]

        def replay() -> None:
            found = call()
            for mine, tensor in zip(kept, [found] if alone else found, strict=True):
                mine.copy_(tensor)

        return SimpleNamespace(replay=replay, outputs=kept[0] if alone else kept)

    def sampled(samplers: dict[str, Any], **_: Any) -> dict[str, Timing]:
        return {name: Timing.of([sample(), 9.0]) for name, sample in samplers.items()}

    def sample(call: Any, *_: Any) -> float:
        call()
        return 5.0

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "empty_graph", lambda: captured(lambda: [torch.zeros(1)]))
    monkeypatch.setattr(timing, "sampled", sampled)

    def energy(run: Any, replay_us: float) -> Any:
        run()
        return modules.gpu_energy.Energy(joules=3.0, runs=10, seconds=0.5)

    monkeypatch.setattr(timing, "replays_per_sample", lambda replay: 3)
    for how in ("warm", "cold", "single", "call", "wall", "host"):
        monkeypatch.setattr(timing, f"{how}_sample", sample)
    monkeypatch.setattr(modules.gpu_energy, "energy_of", energy)
    monkeypatch.setattr(timing, "flush_buffer", lambda: torch.empty(1))
    monkeypatch.setattr(timing, "other_processes", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
