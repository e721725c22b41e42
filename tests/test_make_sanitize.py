"""`make sanitize` runs every tool on everything, fails with the first finding, and says what a
machine lacks. compute-sanitizer is a script here that notes what it was asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TARGETS = ("decode_check", "encode_check", "encode_mlp_check", "pytest")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


class Sanitizer:
    """A compute-sanitizer that finds something where `finds` is among its arguments."""

    def __init__(self, folder: Path, finds: str = "nothing") -> None:
        self.log = folder / "log"
        self.program = folder / "compute-sanitizer"
        self.program.write_text(
            f'#!/bin/sh\necho "$*" >> {self.log}\n'
            f'case "$*" in *--tool*--error-exitcode\\ 1*{finds}*) exit 1;; esac\n'
        )
        self.program.chmod(0o755)
        self.native = folder / "native"
        self.native.mkdir()
        for name in TARGETS[:-1]:  # up to date: newer than the sources
            (self.native / name).touch()

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        variables = [f"COMPUTE_SANITIZER={self.program}", f"NATIVE={self.native}"]
        command = ["make", "SYSTEM=1", "BUILT=", *variables, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.mark.parametrize("tool", TOOLS)
def test_runs_everything(tool: str, tmp_path: Path) -> None:
    sanitizer = Sanitizer(tmp_path)
    done = sanitizer.make(f"sanitize-{tool}", "ARGS=--tb=line")
    assert done.returncode == 0, done.stderr
    runs = sanitizer.runs()
    assert all(run.startswith(f"--tool {tool} --error-exitcode 1 ") for run in runs)
    assert all(any(target in run for run in runs) for target in TARGETS)
    tests = runs[-1]
    assert "-m sanitize" in tests
    assert "--require-cuda" in tests
    assert tests.endswith("--tb=line")
    parted = [run for run in runs if "kns=encode_t5_long" in run]
    assert len(parted) == (2 if tool == "synccheck" else 0)  # encode_check and the tests
    assert "--kernel-name-exclude kns=at::native" in tests


@pytest.mark.parametrize("target", TARGETS)
def test_a_finding_fails(target: str, tmp_path: Path) -> None:
    sanitizer = Sanitizer(tmp_path, finds=target)
    done = sanitizer.make("sanitize-racecheck")
    assert done.returncode != 0
    assert target in sanitizer.runs()[-1]  # nothing after it


def test_every_tool(tmp_path: Path) -> None:
    listed = Sanitizer(tmp_path).make("-n", "-k", "sanitize").stdout
    assert all(f"sanitize-{tool}" in listed for tool in TOOLS)


def test_without_compute_sanitizer() -> None:
    command = ["make", "sanitize", "SYSTEM=1", "COMPUTE_SANITIZER=no-such-program"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs compute-sanitizer" in done.stdout


def test_without_gpu(tmp_path: Path) -> None:
    """PYTHON: whoever looks for a GPU finds none."""
    sanitizer = Sanitizer(tmp_path)
    done = sanitizer.make("sanitize", "PYTHON=false")
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stdout
    assert not sanitizer.runs()
