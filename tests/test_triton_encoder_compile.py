"""The Triton encoders compile ahead of time, for every row of their tiles; no GPU is needed
(as test_triton_compile.py does for the decode)."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from sidmlp_kernels import MLPEncoderSpec, T5Spec, backends
from sidmlp_kernels.spec import FEED_FORWARDS

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)

import triton
from compiled_triton import TARGETS, Code, Launch, compiled
from compiled_triton_encoders import record_encoder

from sidmlp_kernels.ops.triton import encoder_tiles as tiles

SPILLS_OF = "3.6"  # Triton's version; another compiler allocates other registers
ARCHITECTURES = {160: ("sm_90a", "sm_80"), 99: ("sm_86", "sm_100a")}
FIRST_OF = {number: row for number, row in enumerate(tiles.TABLE) if row.max_dim == 128}

Job = tuple[int, str, str]  # row, case, architecture


def dtype_of(row: tiles.EncoderRow) -> torch.dtype:
    return torch.bfloat16 if row.half else torch.float32


def jobs() -> Iterator[tuple[Job, Launch]]:
    """The widest encoders of each row, with one activation after another; on both architectures
    where it is the row of the published width. Then sizes that are no multiples of anything."""
    for number, row in enumerate(tiles.TABLE):
        activation = FEED_FORWARDS[number % 4]
        widest: dict[str, T5Spec | MLPEncoderSpec] = {
            activation: T5Spec(1, row.max_dim, 6, 64, 1024, 50, activation),
            "mlp": MLPEncoderSpec(1, 4, row.max_dim, 512, 50, 82),
        }
        for case, spec in widest.items():
            for launch in record_encoder(spec, dtype_of(row), shared=row.shared):
                for architecture in ARCHITECTURES[row.shared][: 2 if number in FIRST_OF else 1]:
                    yield (number, f"{launch.kernel}, {case}", architecture), launch
    odd = (T5Spec(1, 200, 3, 200, 130, 50, "gated-gelu"), MLPEncoderSpec(1, 3, 200, 130, 50, 82))
    for spec in odd:
        for dtype in (torch.float16, torch.float32):
            row = tiles.choose_encoder_tiles(dtype == torch.float16, 256)
            (number,) = (n for n, r in enumerate(tiles.TABLE) if r.tiles == row and r.shared == 160)
            for launch in record_encoder(spec, dtype):
                yield (number, f"{launch.kernel}, odd sizes", "sm_90a"), launch


JOBS = dict(jobs())


@pytest.fixture(scope="module")
def codes() -> Iterator[dict[Job, Future[Code]]]:
    """All jobs, under way in a few processes."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(8, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield {job: pool.submit(compiled, launch, job[2]) for job, launch in JOBS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"row {job[0]}, {job[1]}, {job[2]}")
def test_shared_memory_fits(codes: dict[Job, Future[Code]], job: Job) -> None:
    shared = codes[job].result().shared
    assert shared <= TARGETS[job[2]][1], f"{tiles.TABLE[job[0]]}: fewer or smaller tiles"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_rows_spill_only_with_a_reason(codes: dict[Job, Future[Code]], number: int) -> None:
    """A row that spills says why in its field `spills`; no other row says anything."""
    if not triton.__version__.startswith(SPILLS_OF + "."):
        pytest.skip(f"the table says what Triton {SPILLS_OF} spills, this is {triton.__version__}")
    row = tiles.TABLE[number]
    first = ARCHITECTURES[row.shared][0]
    found = {job: codes[job].result() for job in JOBS if job[0] == number and job[2] == first}
    spilled = [f"  {case}: {code}" for (_, case, _), code in found.items() if code.spills]
    text = "\n".join([str(row), *spilled])
    if row.spills:
        assert spilled, f"nothing spills, but the row says {row.spills!r}: {text}"
    else:
        assert not spilled, f"registers spill, and the row does not say why: {text}"


@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_every_row_is_chosen(number: int) -> None:
    row = tiles.TABLE[number]
    chosen = tiles.choose_encoder_tiles(row.half, row.max_dim, shared=row.shared)
    assert chosen == dataclasses.replace(row.tiles, inner=min(row.tiles.inner, row.max_dim))


def test_tiles_know_nothing_of_the_batch_or_the_length() -> None:
    """Neither as an argument nor in what is compiled: a request has the same bits in any batch."""
    given = list(inspect.signature(tiles.choose_encoder_tiles).parameters)
    assert given == ["half", "dim", "head_dim", "shared"]
    for spec in (T5Spec(4, 128, 6, 64, 1024, 1030), MLPEncoderSpec(4, 4, 128, 512, 1030, 3000)):
        few = record_encoder(spec, torch.bfloat16, batch=1, tokens=5)
        many = record_encoder(spec, torch.bfloat16, batch=4096, tokens=2077)
        assert few == many
        assert len(few) == 2  # layers share one code


def test_heads_that_are_wide_meet_fewer_keys_at_a_time() -> None:
    for half in (False, True):
        usual, wide = (tiles.choose_encoder_tiles(half, 128, head) for head in (64, 256))
        assert wide.keys == max(16, usual.keys // 4)
        assert tiles.choose_encoder_tiles(half, 128, 16).keys == usual.keys


def test_the_table_ends_at_the_limits_of_the_backend() -> None:
    assert backends._TRITON_ENCODER == {
        "dim": tiles.MAX_DIM,
        "num_heads": tiles.MAX_HEADS,
        "head_dim": tiles.MAX_HEAD_DIM,
        "hidden_dim": tiles.MAX_HIDDEN,
    }
    for half in (False, True):
        tiles.choose_encoder_tiles(half, tiles.MAX_DIM, shared=tiles.LEAST_SHARED)
        for dim, shared in ((2048, tiles.MOST_SHARED), (64, 48)):
            with pytest.raises(RuntimeError, match=rf"got {dim} \({shared} KB\)"):
                tiles.choose_encoder_tiles(half, dim, shared=shared)


def test_the_table_prints_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidmlp_kernels.ops.triton.encoder_tiles"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    header, *lines = done.stdout.splitlines()
    assert header.split()[:3] == ["weights", "dim", "shared"]
    assert len(lines) == len(tiles.TABLE)
    for line, row in zip(lines, tiles.TABLE, strict=True):
        cells = ["half" if row.half else "float32", row.max_dim, row.shared]
        assert line.split()[:3] == [str(cell) for cell in cells]
        assert line.endswith(row.spills)
