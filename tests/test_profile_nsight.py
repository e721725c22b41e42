"""profile_nsight without a GPU: pages as ncu prints them, the reading, and every way to fail."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidmlp_kernels.testing import make_problem

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = (
    "common",
    "decode_catalogues",
    "decode_checks",
    "library_trie",
    "decode_variants",
    "work_counts",
    "profile_reading",
    "profile_target",
    "profile_nsight",
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

Modules = SimpleNamespace


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    """The scripts as modules, importable as they are when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield Modules(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name)


def page(rows: Sequence[Sequence[str]]) -> str:
    """Rows as ncu prints them: every cell in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return text.getvalue()


# Column of the raw page -> (unit, cell).
RAW = {
    "ID": ("", "0"),
    "Process ID": ("", "4711"),
    "Process Name": ("", "python3.11"),
    "Host Name": ("", "127.0.0.1"),
    "Kernel Name": ("", "void sidmlp::cuda::beam_decode_kernel<__nv_bfloat16>(DecodeView, int)"),
    "Context": ("", "1"),
    "Stream": ("", "7"),
    "Block Size": ("", "(256, 1, 1)"),
    "Grid Size": ("", "(512, 1, 1)"),
    "Device": ("", "0"),
    "CC": ("", "9.0"),
    "dram__bytes_read.sum": ("Mbyte", "4.5"),
    "dram__bytes_write.sum": ("byte", "2,048"),
    "gpc__cycles_elapsed.max": ("cycle", "750,000"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "0.4"),
    "gpu__time_duration.sum": ("ns", "400,000"),
    "l1tex__m_l1tex2xbar_write_bytes.sum": ("Kbyte", "640"),
    "l1tex__m_xbar2l1tex_read_bytes.sum": ("Gbyte", "1.5"),
    "l1tex__t_sector_hit_rate.pct": ("%", "31.5"),
    "launch__occupancy_limit_registers": ("block", "2"),
    "launch__occupancy_limit_shared_mem": ("block", "3"),
    "launch__registers_per_thread": ("register/thread", "128"),
    "launch__shared_mem_per_block_driver": ("byte/block", "1,024"),
    "launch__shared_mem_per_block_dynamic": ("Kbyte/block", "60"),
    "launch__shared_mem_per_block_static": ("byte/block", "0"),
    "launch__waves_per_multiprocessor": ("", "1.94"),
    "lts__t_sector_hit_rate.pct": ("%", "99.1"),
    "lts__t_sectors_op_read.sum": ("sector", "47,000,000"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12.25"),
    "sm__cycles_active.avg": ("cycle", "600,000"),
    "sm__inst_executed.avg.per_cycle_active": ("inst/cycle", "1.2"),
    "sm__inst_executed.avg.per_cycle_elapsed": ("inst/cycle", "0.96"),
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": ("%", "11"),
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active": ("%", "22"),
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": ("%", "0.75"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "n/a"),
    "sm__instruction_throughput.avg.pct_of_peak_sustained_active": ("%", "33.3"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "25"),
    "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "17.5"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "3.5"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.5"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "2"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "5"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1"),
    "smsp__average_warps_issue_stalled_tex_throttle_per_issue_active.ratio": ("inst", "0"),
    "smsp__inst_executed.sum": ("inst", "102,400,000"),
    "smsp__pcsamp_warps_issue_stalled_barrier": ("", "300"),
    "smsp__pcsamp_warps_issue_stalled_barrier_not_issued": ("", "999"),
    "smsp__pcsamp_warps_issue_stalled_wait": ("", "100"),
}

MEASURED = [
    "Warp Stall Sampling (All Samples)",
    "Warp Stall Sampling (Not-issued Samples)",
    "# Samples",
    "Instructions Executed",
    "Thread Instructions Executed",
    "stall_barrier",
    "stall_long_sb",
    "stall_barrier (Not Issued)",
    "stall_long_sb (Not Issued)",
]


def measured(samples: int, executed: int, barrier: int = 0, long_sb: int = 0) -> list[str]:
    numbers = [samples, samples, samples, executed, 32 * executed, barrier, long_sb, 900, 900]
    return [f"{value:,}" for value in numbers]


# address -> (SASS, numbers)
SASS = {
    "0x7f5800010000": ("      LDG.E.128.CONSTANT R4, [R2.64] ", measured(60, 5_000, 0, 60)),
    "0x7f5800010010": ("@!P0  HMMA.16816.F32.BF16 R8, R4, R6, R8 ", measured(20, 3_000, 5, 10)),
    "0x7f5800010020": ("      STL.64 [R1+0x8], R10 ", measured(4, 40)),
    "0x7f5800010030": ("@UP1  LDL R3, [R1+0x8] ", measured(6, 60)),
    "0x7f5800010040": ("      BAR.SYNC.DEFER_BLOCKING 0x0 ", measured(10, 900, 10)),
}
FIRST, SECOND, STORE, LOAD, BARRIER = SASS


def raw_page(columns: dict[str, tuple[str, str]] | None = None) -> str:
    columns = RAW if columns is None else columns
    units, cells = zip(*columns.values(), strict=True)
    return page([list(columns), units, cells])


def sass_page() -> str:
    rows = [[address, text, *numbers] for address, (text, numbers) in SASS.items()]
    return page([["Kernel Name", "beam_decode_kernel"], ["Address", "Source", *MEASURED], *rows])


def lines_page() -> str:
    """A source line has the sums of its instructions; one instruction stands in both files."""

    def source(line: int, text: str, numbers: list[str]) -> list[str]:
        return [str(line), text, "-", "", *numbers]

    def instruction(address: str) -> list[str]:
        return ["", "", address, SASS[address][0], *SASS[address][1]]

    header = ["Line No", "Source", "Address", "Source", *MEASURED]
    none = [""] * len(MEASURED)
    return page(
        [
            ["File Path", "/work/csrc/cuda/heads.cuh"],
            ["Function Name", "beam_decode_kernel"],
            header,
            source(1, '// The heads, "in one launch".', none),
            source(41, "    const Vec w = load(weight, row);", measured(60, 5_000, 0, 60)),
            instruction(FIRST),
            source(42, "    sum = mma(w, x, sum);", measured(30, 3_100, 5, 10)),
            instruction(SECOND),
            instruction(STORE),
            instruction(LOAD),
            ["File Path", "/usr/local/cuda/include/cooperative_groups.h"],
            ["Function Name", "beam_decode_kernel"],
            header,
            source(7, "  __syncthreads();", measured(30, 3_900)),
            instruction(SECOND),
            instruction(BARRIER),
        ]
    )


COUNTED = {"read": {"weights": 1_000_000, "trie": 500_000}, "written": {"results": 1_024}}


@pytest.fixture(scope="module")
def reading(modules: Modules) -> dict[str, Any]:
    parse = modules.profile_reading
    return parse.make_reading(
        parse.parse_raw(raw_page())[0],
        parse.parse_source(sass_page()),
        parse.parse_source(lines_page()),
        batch=512,
        counted=COUNTED,
    )


# -- pages


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1,234.5", "Kbyte", 1_234_500),
        ("3", "Mbyte/block", 3e6),
        ("2", "GB", 2e9),
        ("1,500", "ns", 1.5e-6),
        ("1,500", "nsecond", 1.5e-6),
        ("2", "ms", 2e-3),
        ("3", "us", 3e-6),
        ("1.98", "Ghz", 1.98e9),
        ("7", "register/thread", 7),
        ("7", "%", 7),
        ("n/a", "", None),
        ("", "byte", None),
        ("nan", "%", None),
        ("(256, 1, 1)", "", None),
    ],
)
def test_cells_become_base_units(
    modules: Modules, text: str, unit: str, value: float | None
) -> None:
    found = modules.profile_reading.number(text, unit)
    assert found == (None if value is None else pytest.approx(value))


def test_the_raw_page(modules: Modules) -> None:
    said = "==PROF== Connected to process 1\n\n" + raw_page()
    (kernel,) = modules.profile_reading.parse_raw(said)
    assert kernel.name.startswith("void sidmlp::cuda::beam_decode_kernel")
    assert (kernel.grid, kernel.block) == ("(512, 1, 1)", "(256, 1, 1)")
    assert kernel.metrics["dram__bytes_read.sum"] == 4.5e6
    assert "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active" not in kernel.metrics
    assert not {"ID", "Device"} & set(kernel.metrics)


def test_what_is_no_raw_page_is_refused(modules: Modules) -> None:
    for text in ("", "==ERROR== broken\n", page([["Address", "Source"]])):
        with pytest.raises(ValueError, match="raw page: expected a line of metric names"):
            modules.profile_reading.parse_raw(text)
    only_header = page([list(RAW), ["" for _ in RAW]])
    assert modules.profile_reading.parse_raw(only_header) == []


def test_the_page_of_sass(modules: Modules) -> None:
    found = modules.profile_reading.parse_source(sass_page())
    assert [one.opcode for one in found] == ["LDG", "HMMA", "STL", "LDL", "BAR"]
    assert [one.executed for one in found] == [5_000, 3_000, 40, 60, 900]
    assert [one.samples for one in found] == [60, 20, 4, 6, 10]
    assert found[1].stalls == {"barrier": 5, "long_sb": 10}
    assert {(one.file, one.line) for one in found} == {("", 0)}


def test_other_names_of_columns(modules: Modules) -> None:
    text = page([["#", "Address", "Source", "Samples"], ["1", "0x10", "NOP", "7"]])
    (only,) = modules.profile_reading.parse_source(text)
    assert (only.opcode, only.samples, only.executed) == ("NOP", 7, 0)


def test_the_page_of_lines_gives_each_instruction_one_line(modules: Modules) -> None:
    found = modules.profile_reading.parse_source(lines_page())
    assert [(one.address, one.line) for one in found] == [
        (FIRST, 41),
        (SECOND, 42),
        (STORE, 42),
        (LOAD, 42),
        (BARRIER, 7),
    ]
    assert found[0].text == "const Vec w = load(weight, row);"


# -- the reading


def test_duration_and_multiprocessors(reading: dict[str, Any]) -> None:
    assert reading["duration_us"] == pytest.approx(400)
    assert reading["clock_mhz"] == pytest.approx(1875)
    assert reading["sm"] == {
        "active_share": pytest.approx(80),
        "busy_share": 33.3,
        "ipc_active": 1.2,
        "ipc_elapsed": 0.96,
    }
    assert reading["instructions"] == {"executed": 102_400_000, "per_request": 200_000}


def test_pipes(reading: dict[str, Any]) -> None:
    pipes = {"tensor": 3.5, "fma": 17.5, "alu": 11, "lsu": 22, "xu": None}
    assert reading["pipes"] == pipes
    assert reading["pipe_metrics"]["tensor_op_gmma"] == 0.75
    assert reading["missing"] == ["pipes.xu"]


def test_occupancy(reading: dict[str, Any]) -> None:
    assert reading["occupancy"] == {
        "achieved_share": 24.5,
        "theoretical_share": 25,
        "registers": 128,
        "shared_bytes": 61_024,
        "waves": 1.94,
        "blocks_by_registers": 2,
        "blocks_by_shared": 3,
    }


def test_traffic_stands_beside_what_was_counted(reading: dict[str, Any]) -> None:
    memory = reading["memory"]
    assert (memory["counted_read_bytes"], memory["counted_write_bytes"]) == (1_500_000, 1_024)
    assert (memory["l2_read_bytes"], memory["l2_write_bytes"]) == (1.5e9, 640_000)
    assert (memory["dram_read_bytes"], memory["dram_write_bytes"]) == (4.5e6, 2_048)
    assert reading["counted"] == COUNTED


def test_sectors_where_the_report_has_no_bytes(modules: Modules) -> None:
    parse = modules.profile_reading
    rest = {name: cell for name, cell in RAW.items() if not name.startswith("l1tex__m_")}
    found = parse.make_reading(parse.parse_raw(raw_page(rest))[0], [], [], batch=1, counted=COUNTED)
    assert found["memory"]["l2_read_bytes"] == 32 * 47_000_000
    assert found["memory"]["l2_write_bytes"] is None
    wanted = {"memory.l2_write_bytes", "opcodes", "lines", "spills.local_loads"}
    assert wanted <= set(found["missing"])


def test_spills_are_counted_in_sass(reading: dict[str, Any], modules: Modules) -> None:
    assert reading["spills"] == {"local_loads": 60, "local_stores": 40}
    parse = modules.profile_reading
    no_sass = parse.parse_raw(
        raw_page(RAW | {"smsp__inst_executed_op_local_ld.sum": ("inst", "70")})
    )[0]
    found = parse.make_reading(no_sass, [], [], batch=1, counted=COUNTED)
    assert found["spills"] == {"local_loads": 70, "local_stores": None}


def test_stalls_are_sorted(reading: dict[str, Any], modules: Modules) -> None:
    assert [(row["reason"], row["cycles"], row["share"]) for row in reading["stalls"]] == [
        ("long_scoreboard", 5, pytest.approx(62.5)),
        ("barrier", 2, pytest.approx(25)),
        ("selected", 1, pytest.approx(12.5)),
    ]
    sampled = {name: cell for name, cell in RAW.items() if "average_warps" not in name}
    kernel = modules.profile_reading.parse_raw(raw_page(sampled))[0]
    assert modules.profile_reading.stalls(kernel) == [
        {"reason": "barrier", "cycles": None, "share": pytest.approx(75)},
        {"reason": "wait", "cycles": None, "share": pytest.approx(25)},
    ]


def test_opcodes(reading: dict[str, Any]) -> None:
    assert [row["opcode"] for row in reading["opcodes"]] == ["LDG", "HMMA", "BAR", "LDL", "STL"]
    assert reading["opcodes"][0]["executed_share"] == pytest.approx(100 * 5_000 / 9_000)
    assert reading["opcodes"][0]["samples_share"] == pytest.approx(60)


def test_hot_lines(reading: dict[str, Any]) -> None:
    lines = reading["lines"]
    assert [(row["file"], row["line"], row["stall"]) for row in lines] == [
        ("csrc/cuda/heads.cuh", 41, "long_sb"),
        ("csrc/cuda/heads.cuh", 42, "long_sb"),
        ("cooperative_groups.h", 7, "barrier"),
    ]
    assert [row["samples_share"] for row in lines] == [pytest.approx(x) for x in (60, 30, 10)]
    assert sum(row["executed_share"] for row in lines) == pytest.approx(100)


def test_in_words(reading: dict[str, Any], modules: Modules) -> None:
    said = "\n".join(modules.profile_reading.describe(reading))
    for part in (
        "400 us at 1,875 MHz",
        "tensor 3.5%, fma 17.5%, alu 11.0%, lsu 22.0%, xu -",
        "102,400,000 of warps, 200,000 a request",
        "24.5% achieved, 25.0% possible; 128 registers, 61 kB shared, 1.94 waves",
        "60 local loads, 40 local stores",
        "1.5 MB counted, L2 1.5 GB (1,000x), DRAM 4.5 MB (3x)",
        "long_scoreboard           62.5%  5",
        "csrc/cuda/heads.cuh:41  const Vec w = load(weight, row);",
        "not in the report: pipes.xu",
    ):
        assert part in said, part


def test_a_report_without_anything_still_reads(modules: Modules) -> None:
    parse = modules.profile_reading
    bare = {name: cell for name, cell in RAW.items() if "__" not in name}
    kernel = parse.parse_raw(raw_page(bare))[0]
    found = parse.make_reading(kernel, [], [], batch=1, counted=COUNTED)
    json.dumps(found, allow_nan=False)
    said = "\n".join(parse.describe(found))
    assert "none: the kernel was compiled without line information" in said
    assert "duration_us" in found["missing"]


# -- the target


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
