"""The programs of tests/native that `make sanitize` builds and runs on a GPU compile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cuda_headers() -> Path | None:
    """Those beside nvcc, or where the toolkit says that it is, or where it usually is."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    found = [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    return next((include for include in found if (include / "cuda_fp16.h").exists()), None)


@pytest.mark.parametrize("program", ["decode_check", "encode_check"])
def test_compiles(program: str) -> None:
    """As C++ and without code generation, in seconds: it holds no device code."""
    include = cuda_headers()
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if include is None or compiler is None:
        pytest.skip("no CUDA toolkit, or no C++ compiler, is installed")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += ["-I", "csrc", "-I", "tests", "-isystem", str(include), "-x", "c++"]
    command += [f"tests/native/{program}.cu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
