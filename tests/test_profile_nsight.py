"""profile_nsight without a GPU: its target, how it calls ncu, and every way to fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import SIZES, scripts
from ncu_pages import COUNTED, lines_page, raw_page, sass_page

from sidmlp_kernels.testing import make_problem

MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "library_trie",
    "decode_variants",
    "work_counts",
    "profile_pages",
    "profile_reading",
    "profile_words",
    "profile_target",
    "profile_nsight",
)
Modules = SimpleNamespace


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    yield from scripts(MODULES)


@pytest.mark.parametrize("operator", ["beam_decode", "decode_states", "context_readout"])
def test_the_target_on_the_cpu(modules: Modules, monkeypatch, tmp_path, operator: str) -> None:
    """The same way as on a GPU, but for the profiler's start and stop."""
    target = modules.profile_target
    monkeypatch.setattr(target, "REQUESTS", 16)
    words = f"--backend cpu --operator {operator} --batch 3 --dtype float32 --beams 5 --k 2"
    words += f" --catalogue amazon14_beauty --data {tmp_path} --warm 1 --facts {tmp_path / 'f'}"
    with torch.no_grad():
        call, facts = target.prepare(target.parser().parse_args(words.split()), "cpu", SIZES)
        results = call()
    shapes = [[3, 16]] if operator == "context_readout" else [[3, 2], [3, 2], [3, 2, 4], [3]]
    found = [results] if isinstance(results, torch.Tensor) else results
    assert [list(tensor.shape) for tensor in found] == shapes
    written = sum(tensor.numel() * tensor.element_size() for tensor in found)
    assert facts["counted"]["written"]["results"] == written
    assert all(size > 0 for size in facts["counted"]["read"].values())
    assert facts["catalogue"]["items"] == 12_101
    json.dumps(facts)


def test_a_readout_reads_weights_and_states(modules: Modules) -> None:
    plan = make_problem(batch=2).plan("cpu", torch.bfloat16)
    counted = modules.profile_target.counted_bytes(plan, "context_readout", 2, 12, None)
    dim = plan.packed.spec.dim
    weights = sum(t.numel() * t.element_size() for t in plan.packed.readout)
    assert counted == {
        "read": {"weights": weights, "states": 2 * 12 * (2 * dim + 1)},
        "written": {"results": 2 * dim * 4},
    }


# -- the command

FAKE = '''#!{python}
"""Stands in for ncu: notes its arguments, answers with pages and messages of a test."""
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
script = json.loads((here / "script.json").read_text())
if "--import" in words:
    shown = words[words.index("--print-source") + 1] if "--print-source" in words else "raw"
    print(script[shown], end="")
    sys.exit(0)
after = lambda word: words[words.index(word) + 1]
if script["facts"] is not None:
    pathlib.Path(after("--facts")).write_text(json.dumps(script["facts"]))
if script["report"]:
    pathlib.Path(after("-o") + script["ending"]).write_text("report")
print(script["says"])
sys.exit(script["status"])
'''
FACTS = {
    "gpu": "NVIDIA H200",
    "torch": "2.11",
    "plan": ["backend cuda"],
    "catalogue": {"name": "amazon14_beauty", "origin": "real", "items": 12_101},
    "counted": COUNTED,
}
Run = Callable[..., int]


@pytest.fixture
def run(modules: Modules, tmp_path: Path) -> Run:
    """profile_nsight with a fake ncu that does what the keywords say; its exit status."""
    fake = tmp_path / "ncu"
    fake.write_text(FAKE.replace("{python}", sys.executable))
    fake.chmod(0o755)

    def call(*words: str, **script: Any) -> int:
        usual = {"facts": FACTS, "report": True, "ending": "", "says": "==PROF==", "status": 0}
        pages = {"raw": raw_page(), "sass": sass_page(), "cuda,sass": lines_page()}
        (tmp_path / "script.json").write_text(json.dumps({**usual, **pages, **script}))
        given = ["--backend", "cuda", "--batch", "512", "--ncu", str(fake)]
        if "--out" not in words:
            given += ["--out", str(tmp_path / "report")]
        return modules.profile_nsight.main([*given, *words])

    return call


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_a_profile_is_read_and_kept(run: Run, tmp_path: Path, capsys) -> None:
    target = tmp_path / "results" / "profile.json"
    assert run("--json", str(target), "--commit", "abc", "--cache", "warm") == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200: beam_decode on cuda, bfloat16, batch 512, 50 beams" in said
    assert "duration      400 us" in said
    assert str(tmp_path / "report.ncu-rep") in said
    report = json.loads(target.read_text())
    assert report["kind"] == "profile"
    assert report["machine"]["commit"] == "abc"
    assert report["setting"]["kernel"] == "beam_decode|decode"
    assert report["results"][0]["instructions"]["per_request"] == 200_000


def test_how_ncu_is_called(run: Run, tmp_path: Path) -> None:
    assert run("--operator", "context_readout", "--dtype", "float16", "--launch", "2") == 0
    profile, *imports = calls(tmp_path)
    text = " ".join(profile)
    for part in (
        "--clock-control none",
        "--cache-control all",
        "--set full",
        "--import-source yes",
        "--profile-from-start off",
        "-k regex:context_readout|readout",
        "-s 2 -c 1",
        f"-o {tmp_path / 'report.ncu-rep'}",
        "profile_target.py --warm 3",
        "--operator context_readout --batch 512 --dtype float16 --beams 50 --k 10",
    ):
        assert part in text, part
    assert "--data" not in text
    assert [words[words.index("--page") + 1] for words in imports] == ["raw", "source", "source"]
    assert all("--csv" in words for words in imports)


def test_a_report_may_have_another_ending(run: Run, tmp_path: Path, capsys) -> None:
    assert run(ending=".ncu-rep") == 0
    assert "report.ncu-rep.ncu-rep" in capsys.readouterr().out
    assert run(report=False) == 1, "the report of an earlier run must not be read"


def test_json_goes_beside_the_other_results(
    run: Run, modules: Modules, monkeypatch, tmp_path: Path
) -> None:
    """In a folder of its own: tables are made of every file of the one above."""
    monkeypatch.setattr(modules.profile_nsight, "RESULTS", tmp_path / "results")
    assert run("--json") == 0
    path = tmp_path / "results" / "profiles" / "report-nvidia-h200.json"
    assert json.loads(path.read_text())["kind"] == "profile"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"facts": {"problem": "no GPU here"}, "status": 1, "report": False}, "no GPU here"),
        (
            {"says": "==ERROR== ERR_NVGPUCTRPERM - The user does not", "report": False},
            "got ERR_NVGPUCTRPERM; run as root",
        ),
        (
            {"says": "==WARNING== No kernels were profiled.", "report": False},
            "matches 'beam_decode|decode' in a call of beam_decode on cuda, got none; pass another",
        ),
        (
            {"says": "==ERROR== A driver resource was unavailable.", "report": False, "status": 9},
            "expected a report, got: A driver resource was unavailable.; ",
        ),
        (
            {"facts": None, "says": "Traceback\nImportError: no torch", "status": 1},
            "expected one call of beam_decode, got: ImportError: no torch; run it alone",
        ),
        ({"raw": "nonsense\n"}, "raw page: expected a line of metric names"),
    ],
    ids=["problem", "permission", "kernel", "error", "target", "page"],
)
def test_every_failure_is_one_sentence(
    run: Run, capsys, script: dict[str, Any], message: str
) -> None:
    assert run(**script) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("profile_nsight: ")


def test_without_ncu(modules: Modules, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(modules.profile_nsight, "PLACES", (str(tmp_path / "*" / "ncu"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    words = ["--backend", "cuda", "--batch", "1"]
    assert modules.profile_nsight.main(words) == 1
    assert "ncu: expected Nsight Compute on PATH" in capsys.readouterr().err
    assert modules.profile_nsight.main([*words, "--ncu", str(tmp_path / "none")]) == 1
    assert "--ncu: expected a program, got" in capsys.readouterr().err
    for version in ("2025.1", "2025.3"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch(mode=0o755)
    assert modules.profile_nsight.find_ncu(None) == str(tmp_path / "2025.3" / "ncu")


def test_a_target_that_hangs_is_ended(modules: Modules) -> None:
    with pytest.raises(modules.profile_nsight.ProfileError, match="within 1 s, got none"):
        modules.profile_nsight.run(["sleep", "60"], 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--k", "60"], "--k: expected at most --beams 50, got 60"),
        (["--launch", "-1"], "--launch: expected at least 0"),
        (["--backend", "cpu"], "invalid choice: 'cpu'"),
    ],
)
def test_wrong_arguments(run: Run, capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_target_says_so(modules: Modules, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    facts = tmp_path / "facts.json"
    words = "--backend triton --operator beam_decode --batch 1 --dtype bfloat16 --beams 50 --k 10"
    words += f" --catalogue amazon14_beauty --warm 1 --facts {facts}"
    assert modules.profile_target.main(words.split()) == 1
    assert "torch finds no CUDA device" in json.loads(facts.read_text())["problem"]
