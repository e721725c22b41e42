"""benchmarks/quality.py on a toy data set, for its tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_scripts import BENCHMARKS
from small_runs import LOOP, SIZES

SCRIPTS = (
    "common",
    "bench_arguments",
    "quality_settings",
    "quality_state",
    "quality_jobs",
    "quality_answers",
    "quality_stages",
    "quality",
    "table_cells",
    "quality_tables",
)
WITHOUT_PLUS = "tokenize,teacher,student,evaluate,speed"


def quality_modules() -> Iterator[SimpleNamespace]:
    """The scripts as modules, importable as they are when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def toy_arguments(data: Path, work: Path, *more: str) -> list[str]:
    """Of one experiment that takes a second."""
    return [
        *("--data", str(data), "--tokenizer", "walk", "--work", str(work / "work")),
        *("--out", str(work / "out"), "--stages", WITHOUT_PLUS, "--device", "cpu"),
        *("--tokenize", "--max-items 4", "--training", " ".join([*LOOP, "--device", "cpu"])),
        *("--teacher", " ".join([*SIZES, "--epochs", "3"])),
        *("--student", "--hidden 16 --heads 2 --epochs 2"),
        *("--beams", "10", "--batch", "16", "--speed-seconds", "0.05", "--commit", "abc"),
        *more,
    ]
