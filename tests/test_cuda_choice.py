"""What the host module says that a launch of the CUDA kernels chooses is what csrc/cuda chooses."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sidmlp_kernels.ops.cuda_kernels import (
    tensor_core_cuts,
    tensor_cores_why_not,
    two_launches_why_not,
)
from sidmlp_kernels.spec import PUBLISHED, StudentSpec
from sidmlp_kernels.trie import host_library

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 16, 17, 32, 33, 64, 65, 264, 265, 4096, 100_000)  # kBatches in shape_answers.cpp
GRID = [
    (spec, dtype, beams)
    for codes, hidden, dim in itertools.product(
        (
            (4,),
            (256,) * 4,
            (1024,) * 3,
            (1024,) * 8,
            (1024, 256, 16, 8),
            (8, 1024),
            (4, 1025),
            (8192,) * 3,
            (8192,) * 8,
            (4, 8193),
        ),
        (32, 100, 512, 1024, 1536, 2048, 2080),
        (16, 72, 128, 1024, 1040),
    )
    for spec in [
        dataclasses.replace(PUBLISHED, codes_per_level=codes, hidden_dim=hidden, dim=dim),
    ]
    for dtype, beams in (
        (torch.float32, 50),
        (torch.float16, 1),
        (torch.bfloat16, 50),
        (torch.bfloat16, 128),
        (torch.bfloat16, 129),
        (torch.bfloat16, 512),
        (torch.bfloat16, 513),
    )
] + [(dataclasses.replace(PUBLISHED, blocks_per_head=2), torch.bfloat16, 50)]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """For each point of the grid what csrc/cuda/sm90/shape.cpp answers, compiled here and now: it
    needs no CUDA headers, and a host module of older sources is found out."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    program = tmp_path_factory.mktemp("native") / "shape_answers"
    sources = ["tests/native/shape_answers.cpp", "csrc/cuda/sm90/shape.cpp"]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", "csrc", *sources]
    done = subprocess.run(
        [*command, "-o", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], input=questions(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(GRID)
    return answers


def questions() -> str:
    lines = []
    for spec, dtype, beams in GRID:
        half, codes = int(dtype != torch.float32), spec.codes_per_level
        sizes = (half, spec.dim, spec.hidden_dim, spec.blocks_per_head, beams, len(codes), *codes)
        lines.append(" ".join(map(str, sizes)))
    return "\n".join(lines) + "\n"


def said(spec: StudentSpec, dtype: torch.dtype, beams: int) -> str:
    """The host module's answer in the words of shape_answers."""
    reason = tensor_cores_why_not(spec, dtype, beams)
    taken = []
    for launches in (1, 2):
        cuts = tensor_core_cuts(spec, dtype, beams, launches)
        if reason:
            assert not cuts
            return reason
        assert cuts or launches == 2
        if not cuts:
            assert two_launches_why_not(spec, dtype, beams)
            break
        taken += [next(cut for cut in cuts if batch <= cut.most_requests) for batch in BATCHES]
    return "".join(f"{cut.cluster}/{cut.group} " for cut in taken)


def test_plans_say_what_launches_choose(launches: list[str]) -> None:
    for point, answer in zip(GRID, launches, strict=True):
        assert said(*point) == answer, point


def test_the_grid_has_every_kind_of_answer(launches: list[str]) -> None:
    for kind in ("float32", "blocks_per_head", "hidden_dim", "dim", "num_beams", "codes_per"):
        assert any(answer.startswith(kind) for answer in launches), kind
    assert "too wide for shared memory" in launches
    usual = said(PUBLISHED, torch.bfloat16, 50)
    assert usual in launches
    assert any("/" in answer and answer != usual for answer in launches), "some cuts do not fit"


def test_a_cut_says_where_it_stands_in_for_another() -> None:
    wide = dataclasses.replace(PUBLISHED, codes_per_level=(8192,) * 3)
    tables = [
        tensor_core_cuts(spec, torch.bfloat16, beams)
        for spec, beams in ((PUBLISHED, 50), (PUBLISHED, 512), (wide, 50))
    ]
    reasons = [cut.reason for cuts in tables for cut in cuts]
    assert len(set(reasons)) == len(reasons)
    assert not any(reason.endswith("more shared memory than there is") for reason in reasons)
    for point in GRID:
        cuts, before = tensor_core_cuts(*point), 0
        usual = next(
            (
                table
                for table in tables
                if any(cut.reason.startswith(other.reason) for cut in cuts for other in table)
            ),
            (),
        )
        for cut in cuts:
            inside = [other for other in usual if before < other.most_requests <= cut.most_requests]
            alone = [other[:4] for other in inside] == [cut[:4]]
            assert cut.reason.endswith("more shared memory than there is") != alone, point
            before = cut.most_requests


def test_nothing_wider_fits_where_something_narrower_does_not() -> None:
    codes, widths = (8192,) * 8, range(32, 2049, 32)
    fits = [
        not tensor_cores_why_not(
            dataclasses.replace(PUBLISHED, codes_per_level=codes, hidden_dim=hidden, dim=1024),
            torch.bfloat16,
            512,
        )
        for hidden in widths
    ]
    assert fits == sorted(fits, reverse=True)
    assert {True, False} == set(fits)


def test_every_width_fits_with_many_beams_and_codes() -> None:
    for codes, dim in (
        ((256,) * 4, 128),
        ((1024,) * 4, 128),
        ((8192,) * 3, 128),
        ((8192,) * 3, 1024),
    ):
        for hidden in range(32, 2049, 32):
            spec = dataclasses.replace(PUBLISHED, codes_per_level=codes, hidden_dim=hidden, dim=dim)
            assert tensor_cores_why_not(spec, torch.float16, 512) == "", spec


def test_levels_are_counted() -> None:
    sizes = {"half": True, "dim": 128, "hidden_dim": 512, "blocks_per_head": 1, "num_beams": 50}
    for codes in ((), (4,) * 9):
        for ask in (host_library().tensor_cores_why_not, host_library().tensor_core_cuts):
            with pytest.raises(ValueError, match=f"codes_per_level: expected 1..8 .* {len(codes)}"):
                ask(**sizes, codes_per_level=codes)


def test_launches_are_one_or_two() -> None:
    sizes = {"half": True, "dim": 128, "hidden_dim": 512, "blocks_per_head": 1, "num_beams": 50}
    with pytest.raises(ValueError, match="launches: expected 1 or 2, got 3"):
        host_library().tensor_core_cuts(**sizes, codes_per_level=(256,) * 4, launches=3)
