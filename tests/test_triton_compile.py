"""The Triton backend compiles ahead of time, for every row of its table of tiles; no GPU is needed.

What is compiled are the arguments and constants of real launches (compiled_triton.py). Checked are
what only a launch would show otherwise: that shared memory fits, and what registers spill.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from sidmlp_kernels import backends
from sidmlp_kernels.spec import StudentSpec

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)

import triton
from compiled_triton import TARGETS, Code, Launch, compiled, record

from sidmlp_kernels.ops.triton import tiles

SPILLS_OF = "3.6"  # Triton's version; another compiler allocates other registers
ROWS = list(enumerate(tiles.TABLE))
# What the rows for so much shared memory (kilobytes) are compiled for.
ARCHITECTURES = {160: ("sm_90a", "sm_80"), 99: ("sm_86", "sm_100a")}
HALF_ROW, FLOAT_ROW = (
    next(number for number, row in ROWS if row.half is half) for half in (True, False)
)


def published(hidden_dim: int = 512, **changes: int) -> StudentSpec:
    """The published student, but for its hidden width."""
    sizes = {"dim": 128, "attention_dim": 384, "num_heads": 4, "ffn_dim": 1024, **changes}
    return StudentSpec((256,) * 4, hidden_dim=hidden_dim, embedding_dim=128, **sizes)


def row_of(like: tiles.Row, hidden: int) -> int:
    """The number of the row that is chosen for as many beams and as much shared memory."""
    chosen = tiles.choose_tiles(like.half, hidden, like.max_beams, like.shared)
    return next(number for number, row in ROWS if row.tiles is chosen and row.half is like.half)


def usual_width(number: int) -> int:
    """The smallest power of two from the published 512 on whose tiles are the row's."""
    row = tiles.TABLE[number]
    widths = [512 << i for i in range(6)] if row.max_hidden >= 512 else []
    for width in [*widths, row.max_hidden]:
        if width <= row.max_hidden and row_of(row, width) == number:
            return width
    raise AssertionError(f"no width has the tiles of {row}")


def dtype_of(number: int) -> torch.dtype:
    return torch.bfloat16 if tiles.TABLE[number].half else torch.float32


def recorded() -> Iterator[tuple[int, str, Launch, Sequence[str]]]:
    """Rows, names of cases, launches to compile and for which architectures.

    Compiling a beam search takes 10 to 50 seconds, so not every combination is tried: decode_states
    holds all of beam_decode, and rows for more beams differ from others in how many they sort.
    """
    for number, row in ROWS:
        where = ARCHITECTURES[row.shared]
        beams, dtype, shared = row.max_beams, dtype_of(number), row.shared
        usual, widest = published(usual_width(number)), published(row.max_hidden)
        every = ("beam_decode", "decode_states", "context_readout", "level_logits")
        names = ("decode_states",) if row.shared == tiles.LEAST_SHARED else every
        launches = record(usual, dtype, num_beams=beams, shared=shared, operators=names)
        for name, launch in launches.items():
            yield number, f"{name}, hidden {usual.hidden_dim}", launch, where
        if widest == usual:
            continue
        names = ("beam_decode", "level_logits") if beams <= 64 else ("level_logits",)
        wide = record(widest, dtype, num_beams=beams, shared=shared, operators=names)
        for name, launch in wide.items():
            yield number, f"{name}, hidden {widest.hidden_dim}", launch, where[:1]
    odd = published(500, dim=100, attention_dim=100, ffn_dim=130)
    for number in (HALF_ROW, FLOAT_ROW):
        row = tiles.TABLE[number]
        launches = record(
            odd,
            torch.float16 if row.half else torch.float32,
            num_beams=row.max_beams,
            states_dtype=torch.float32 if row.half else torch.bfloat16,
            operators=("decode_states", "level_logits"),
        )
        for name, launch in launches.items():
            yield number, f"{name}, sizes that are no multiples", launch, ("sm_90a",)


Job = tuple[int, str, str]  # row, case, architecture

JOBS: dict[Job, Launch] = {
    (number, case, architecture): launch
    for number, case, launch, architectures in recorded()
    for architecture in architectures
}


@pytest.fixture(scope="module")
def codes() -> Iterator[dict[Job, Future[Code]]]:
    """All jobs, under way in a few processes; rows that share a kernel share its job."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(8, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: dict[tuple[Launch, str], Future[Code]] = {}
        for (_, _, architecture), launch in JOBS.items():
            key = (launch, architecture)
            futures[key] = futures.get(key) or pool.submit(compiled, *key)
        yield {job: futures[launch, job[2]] for job, launch in JOBS.items()}
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
    found = {
        case: codes[row, case, architecture].result()
        for row, case, architecture in JOBS
        if row == number and architecture == ARCHITECTURES[tiles.TABLE[number].shared][0]
    }
    spilled = [f"  {case}: {code}" for case, code in found.items() if code.spills]
    reason = tiles.TABLE[number].spills
    text = "\n".join([str(tiles.TABLE[number]), *spilled])
    if reason:
        assert spilled, f"nothing spills, but the row says {reason!r}: {text}"
    else:
        assert not spilled, f"registers spill, and the row does not say why: {text}"


@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_every_row_is_chosen(number: int) -> None:
    """A row that another hides would never be tested by those who use the library."""
    row = tiles.TABLE[number]
    assert row_of(row, usual_width(number)) == number
    assert row_of(row, row.max_hidden) == number


def test_the_table_ends_at_the_limits_of_the_backend() -> None:
    assert backends._TRITON_WIDTH == tiles.MAX_HIDDEN
    assert backends._TRITON_WIDTH == tiles.MAX_DIM
    assert backends._TRITON_BEAMS == tiles.MAX_BEAMS
    for half in (False, True):
        tiles.choose_tiles(half, tiles.MAX_HIDDEN, tiles.MAX_BEAMS, tiles.LEAST_SHARED)
        for hidden, beams in ((tiles.MAX_HIDDEN + 1, 1), (1, tiles.MAX_BEAMS + 1)):
            with pytest.raises(RuntimeError, match=rf"got {hidden} and {beams} \("):
                tiles.choose_tiles(half, hidden, beams)


def test_tiles_know_nothing_of_the_batch() -> None:
    """Neither as an argument nor in what is compiled: a request has the same bits in any batch."""
    given = list(inspect.signature(tiles.choose_tiles).parameters)
    assert given == ["half", "hidden", "beams", "shared"]
    assert tiles.GROUPS[0] == (0, 1)
    groups = [tiles.choose_group(batch, 132) for batch in range(5000)]
    assert groups == sorted(groups)
    assert {1} < set(groups) <= set(range(1, 17))
    one, many = (
        record(published(), torch.bfloat16, num_beams=50, batch=batch) for batch in (1, 3000)
    )
    assert one == many


def test_the_table_prints_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidmlp_kernels.ops.triton.tiles"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    header, *lines = done.stdout.splitlines()
    assert header.split()[:4] == ["weights", "hidden", "beams", "shared"]
    assert len(lines) == len(tiles.TABLE)
    for line, row in zip(lines, tiles.TABLE, strict=True):
        cells = ["half" if row.half else "float32", row.max_hidden, row.max_beams, row.shared]
        assert line.split()[:4] == [str(cell) for cell in cells]
        assert line.endswith(row.spills)
    assert "RuntimeWarning" not in done.stderr


def test_sizes_above_the_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that the backend runs on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 (A100) or later, some GPU has 7.5" in backends.why_not("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backends.why_not("triton") == ""
    assert backends.why_not("triton", published(16384), num_beams=1024) == ""
    large = published(16385, dim=16400)
    reason = backends.why_not("triton", large, dtype="bfloat16", num_beams=1025)
    for part in ("dim: expected at most 16384, got 16400", "hidden_dim: expected at most 16384"):
        assert part in reason
    assert "num_beams: expected at most 1024, got 1025" in reason
    assert "num_beams" not in backends.why_not("triton", large)
    assert "torch finds no CUDA device" not in reason
