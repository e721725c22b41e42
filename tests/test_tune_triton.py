"""tune_triton without a GPU: its candidates, the table it rewrites, and a rehearsal on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import SIZES, scripts

from sidmlp_kernels.ops.triton import tiles
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Timing

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "decode_variants",
    "gpu_timing",
    "own_processes",
    "triton_candidates",
    "triton_bench",
    "tune_triton",
)
ROW = tiles.TABLE[0]
WARPS, STAGES = ROW.tiles.warps, ROW.tiles.stages
SOURCE = Path(tiles.__file__).read_text()


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts(MODULES)


# -- candidates


def test_a_grid_is_all_combinations(modules: SimpleNamespace) -> None:
    assert modules.triton_candidates.parse_vary(["warps=4,8", "stages=2,3"]) == [
        {"warps": 4, "stages": 2},
        {"warps": 4, "stages": 3},
        {"warps": 8, "stages": 2},
        {"warps": 8, "stages": 3},
    ]


@pytest.mark.parametrize("words", [["warps"], ["warps="], ["warps=4,"], ["n=4", "n=8"], ["n=-1"]])
def test_a_wrong_grid_is_named(modules: SimpleNamespace, words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"as in warps=4,8, got '{words[-1]}'"):
        modules.triton_candidates.parse_vary(words)


def test_candidates_are_what_differs_once(modules: SimpleNamespace) -> None:
    checked = modules.triton_candidates.checked
    groups = [[0, 1], [8, 4]]
    given = [
        {"warps": WARPS},
        {"warps": WARPS, "stages": STAGES + 1},
        {"stages": STAGES + 1},
        {"groups": [list(pair) for pair in tiles.GROUPS]},
        {"groups": groups},
    ]
    assert checked(given, ROW) == [{"stages": STAGES + 1}, {"groups": groups}]
    with pytest.raises(ValueError, match="differ from the row, got none"):
        checked(given[:1], ROW)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"warp": 4}, "got 'warp'"),
        ({"warps": 0}, "warps: expected a whole number from 1 on, got 0"),
        ({"warps": True}, "got True"),
        ({"warps": "4"}, "got '4'"),
        ({"groups": []}, "groups: expected ascending"),
        ({"groups": 3}, "got 3"),
        ({"groups": [[1, 1]]}, "from batch 0 on"),
        ({"groups": [[0, 1], [4, 32]]}, "group up to 16"),
        ({"groups": [[0, 2], [4, 1]]}, "ascending"),
        ({"groups": [[0, 1], [0, 2]]}, "ascending"),
    ],
)
def test_wrong_candidates_are_named(
    modules: SimpleNamespace, candidate: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        modules.triton_candidates.checked([candidate], ROW)


def test_candidates_come_from_a_file(modules: SimpleNamespace, tmp_path: Path) -> None:
    read, path = modules.triton_candidates.read_candidates, tmp_path / "candidates.json"
    path.write_text('[{"warps": 4}, {"groups": [[0, 1]]}]')
    assert read(path) == [{"warps": 4}, {"groups": [[0, 1]]}]
    for text, message in (('{"warps": 4}', "expected a list"), ("[4]", "a list"), ("[", "JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match="expected a JSON file"):
        read(tmp_path / "none.json")


def test_plans_inside_take_the_changed_row(modules: SimpleNamespace) -> None:
    before, groups = tiles.TABLE, tiles.GROUPS
    changes = {"warps": WARPS * 2, "groups": [[0, 1], [1, 16]]}

    def chosen() -> tuple[tiles.Tiles, int]:
        return tiles.choose_tiles(ROW.half, ROW.max_hidden, ROW.max_beams), tiles.choose_group(9, 9)

    usual = chosen()
    try:
        with modules.triton_candidates.applied(0, changes):
            assert chosen() == (dataclasses.replace(ROW.tiles, warps=WARPS * 2), 16)
            assert tiles.TABLE[1:] == before[1:]
            raise KeyError
    except KeyError:
        assert chosen() == usual
    assert tiles.TABLE is before
    assert tiles.GROUPS is groups


@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_every_row_has_a_student(modules: SimpleNamespace, number: int) -> None:
    hidden, beams = modules.triton_candidates.usual_sizes(number)
    row = tiles.TABLE[number]
    assert tiles.choose_tiles(row.half, hidden, beams, row.shared) is row.tiles
    if number == 0:
        assert (hidden, beams) == (512, 50)  # published


def measured(**times: float) -> list[dict[str, Any]]:
    return [
        {"changes": {} if name == "row" else {name: 1}, "relative_time": time}
        for name, time in times.items()
    ]


def test_the_best_gains_more_than_noise(modules: SimpleNamespace) -> None:
    best = modules.triton_candidates.choose_best
    assert best(measured(row=1.0, n=0.97, k=0.95, warps=1.2))["changes"] == {"k": 1}
    assert best(measured(row=0.9, n=1.1)) is None  # never the row itself
    assert best(measured(row=1.0, n=0.995)) is None
    assert best(measured(row=1.06, n=0.95)) is None
    assert best(measured(row=0.94, n=0.95)) is None
    assert best(measured(row=1.0)) is None
    assert best([]) is None


# -- the table


def table_of(source: str) -> tuple[tiles.Row, ...]:
    return tiles._parse(source.split('_TILES = """')[1].split('"""')[0])


@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_the_same_numbers_are_the_same_text(modules: SimpleNamespace, number: int) -> None:
    row = tiles.TABLE[number]
    assert modules.triton_candidates.rewritten(SOURCE, number, row.tiles) == SOURCE


@pytest.mark.parametrize("number", range(len(tiles.TABLE)))
def test_one_row_is_rewritten_in_its_columns(modules: SimpleNamespace, number: int) -> None:
    new = dataclasses.replace(tiles.TABLE[number].tiles, warps=16, row_tile=16384, k=8, k_dense=256)
    text = modules.triton_candidates.rewritten(SOURCE, number, new)
    rows = list(tiles.TABLE)
    rows[number] = dataclasses.replace(rows[number], tiles=new)
    assert table_of(text) == tuple(rows)
    pairs = list(zip(SOURCE.split("\n"), text.split("\n"), strict=True))
    ((old_line, new_line),) = [(old, line) for old, line in pairs if old != line]
    assert len(old_line) == len(new_line)
    header = next(line for line in pairs if line[0].startswith("weights "))[0]
    header_ends, ends = (
        [word.end() for word in re.finditer(r"\S+", line)] for line in (header, new_line)
    )
    last = 4 + len(dataclasses.fields(tiles.Tiles))  # words follow
    assert ends[1:last] == header_ends[1:last]


def test_what_follows_the_numbers_stays(modules: SimpleNamespace) -> None:
    lines = SOURCE.split("\n")
    number = next(i for i, line in enumerate(lines) if line.startswith("weights ")) + 1
    lines[number] += "  spills: why"
    new = dataclasses.replace(ROW.tiles, warps=16)
    text = modules.triton_candidates.rewritten("\n".join(lines), 0, new)
    assert text.split("\n")[number].endswith("  spills: why")
    assert text.replace("  spills: why", "") == modules.triton_candidates.rewritten(SOURCE, 0, new)


def test_another_table_is_not_rewritten(modules: SimpleNamespace) -> None:
    rewritten = modules.triton_candidates.rewritten
    for source, number in (
        (SOURCE.replace("row_tile chunk", "chunk row_tile"), 0),
        (SOURCE, len(tiles.TABLE)),
        ("", 0),
    ):
        with pytest.raises(ValueError, match="expected a table _TILES"):
            rewritten(source, number, ROW.tiles)
    with pytest.raises(ValueError, match="warps: expected a number that its column holds"):
        rewritten(SOURCE, 0, dataclasses.replace(ROW.tiles, warps=10**9))


# -- processes


def job(what: str) -> str:
    if what == "die":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
    return what


def test_a_job_that_dies_harms_no_other(modules: SimpleNamespace) -> None:
    jobs = [("die",), ("done",), ("also done",)]
    found = dict(modules.own_processes.in_processes(job, jobs, workers=2, seconds=200.0))
    assert found == {0: "its process ended with 3", 1: "done", 2: "also done"}


def test_a_job_that_hangs_is_killed(modules: SimpleNamespace) -> None:
    found = modules.own_processes.in_processes(job, [("hang",)], workers=1, seconds=1.0)
    assert list(found) == [(0, "not done after 1 s")]


# -- a rehearsal: the CPU backend in place of Triton's, calls in place of graphs


@pytest.fixture
def rehearsal(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended GPU, on which a call takes 10 us for each warp."""
    timing, tune = modules.gpu_timing, modules.tune_triton

    def captured(call: Any) -> Any:
        outputs = call()
        warps = tiles.TABLE[0].tiles.warps
        return SimpleNamespace(replay=lambda: 10.0 * warps, outputs=outputs)

    def sampled(samplers: dict[str, Any], **_: Any) -> dict[str, Timing]:
        return {name: Timing.of([sample()]) for name, sample in samplers.items()}

    def in_processes(work: Any, jobs: Any, **_: Any) -> Iterator[tuple[int, str]]:
        yield from ((number, work(*job)) for number, job in enumerate(jobs))

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "sampled", sampled)
    monkeypatch.setattr(timing, "replays_per_sample", lambda replay: 3)
    monkeypatch.setattr(timing, "warm_sample", lambda replay, replays: replay())
    monkeypatch.setattr(timing, "other_processes", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    monkeypatch.setattr(tune, "in_processes", in_processes)
    monkeypatch.setattr(tune, "why_not", lambda backend: "")
    options = tune.options_of

    def tiny(arguments: Any) -> Any:
        found, candidates = options(arguments)
        changes = {"sizes": SIZES, "tokens": 6, "device": "cpu", "backend": "cpu"}
        return dataclasses.replace(found, num_beams=10, **changes), candidates

    monkeypatch.setattr(tune, "options_of", tiny)
    return modules


def rehearse(modules: SimpleNamespace, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "tuned.json"
    arguments = [*words, "--batches", "3,1,5", "--data", "no such folder", "--out", str(out)]
    assert modules.tune_triton.main(arguments) == 0
    assert not out.with_name("tuned.json.partial").exists()
    return json.loads(out.read_text())


def test_a_rehearsal_finds_and_writes_the_best(
    rehearsal: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "tiles.py"
    copy.write_text(SOURCE)
    monkeypatch.setattr(tiles, "__file__", str(copy))
    half = WARPS // 2
    report = rehearse(rehearsal, tmp_path, "--vary", f"warps={half},{3 * WARPS}", "--write")
    assert report["complete"]
    assert report["left_out"] == []
    relative = [(one["changes"], one["relative_time"]) for one in report["results"]]
    wanted = [({}, 1.0), ({"warps": half}, 0.5), ({"warps": 3 * WARPS}, 3.0)]
    assert [(changes, round(times, 6)) for changes, times in relative] == wanted
    for one in report["results"]:
        points = [(point["operator"], point["batch"]) for point in one["points"]]
        assert points == [
            (op, batch) for op in rehearsal.triton_bench.OPERATORS for batch in (3, 1, 5)
        ]
        assert {about["requests"] for about in one["verified"].values()} == {5}
    assert report["best"]["changes"] == {"warps": half}
    assert table_of(copy.read_text())[0].tiles == dataclasses.replace(ROW.tiles, warps=half)
    assert tiles.TABLE[0] is ROW
    said = capsys.readouterr().out
    assert f"warps={half}: 0.500 of the time" in said
    assert f"best: warps={half}" in said


def test_nothing_is_written_where_nothing_is_faster(
    rehearsal: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tiles.py"
    copy.write_text(SOURCE)
    monkeypatch.setattr(tiles, "__file__", str(copy))
    report = rehearse(rehearsal, tmp_path, "--vary", f"warps={2 * WARPS}", "--write")
    assert report["best"] is None
    assert copy.read_text() == SOURCE


def test_wrong_candidates_are_left_out(
    rehearsal: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not fit, one with wrong scores, one whose bits depend on the batch."""
    right = DecodePlan.beam_decode

    def pretended(self: DecodePlan, context: torch.Tensor) -> Any:
        items, scores, codes, counts = right(self, context)
        now = tiles.TABLE[0].tiles
        if now.warps == 1:
            raise RuntimeError("out of resource: shared memory\nand more lines")
        if now.warps == 2:
            scores = scores + 0.5
        if now.warps == 4 and len(context) == 1:
            scores = torch.nextafter(scores, torch.zeros(()))
        return items, scores, codes, counts

    monkeypatch.setattr(DecodePlan, "beam_decode", pretended)
    vary = ("--vary", "warps=1,2,4,6", "--operators", "beam_decode")
    report = rehearse(rehearsal, tmp_path, *vary)
    assert [one["changes"] for one in report["results"]] == [{}, {"warps": 6}]
    gone = {one["changes"]["warps"]: one["why"] for one in report["left_out"]}
    assert gone[1] == "RuntimeError: out of resource: shared memory .. and more lines"
    assert "float64 reference allows" in gone[2]
    assert "bits not to depend on its batch" in gone[4]


def test_a_reason_is_the_innermost_cause(modules: SimpleNamespace) -> None:
    inner = ValueError("at 7:4:\n  x = tl.arange(0, 3)\n      ^\nmust be a power of 2")
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("at 1:0:\n  call()") from inner
    reason = modules.triton_bench.reason_of(raised.value)
    assert reason == "ValueError: at 7:4: .. must be a power of 2"
    assert modules.triton_bench.reason_of(KeyError()) == "KeyError: "


def test_a_row_that_is_wrong_itself_ends_it(
    rehearsal: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(self: DecodePlan, context: torch.Tensor) -> Any:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(DecodePlan, "beam_decode", broken)
    arguments = ["--vary", "warps=1", "--data", "none", "--out", str(tmp_path / "x.json")]
    assert rehearsal.tune_triton.main(arguments) == 1
    assert "row 0 as it is to run here, got RuntimeError: no such" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row", "99", "--vary", "n=16"], "row: expected 0 to"),
        (["--vary", "n=16", "--batches", "0"], "batches: expected"),
        (["--vary", "n=16", "--operators", "decode"], "operators: expected"),
        (["--vary", "n=16", "--operators", "beam_decode", "--write"], "write: expected both"),
        (["--candidates", "groups.json", "--write"], "write: expected candidates of this row"),
    ],
)
def test_options_are_checked(
    modules: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("groups.json").write_text('[{"groups": [[0, 1]]}]')
    assert modules.tune_triton.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_script_explains_itself() -> None:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tune_triton.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "row_tile" in done.stdout
