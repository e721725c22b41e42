"""The scripts of benchmarks/ as modules for their tests, and sizes to rehearse them with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    "gpu_arguments",
    "table_cells",
    "gpu_tables",
    "make_tables",
    "merge_results",
    "bench_decode_gpu",
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
