"""Nsight Compute on one kernel of one call, and what its report says in a page of text.

    python benchmarks/profile_nsight.py --backend cuda --operator beam_decode --batch 512

Runs profile_target.py under ncu with its full set of metrics, clocks as they are
(--clock-control none), and prints a reading: duration, pipes, instructions a request, occupancy,
bytes against those counted, stalls, spills, the hottest source lines. The report is kept for
Nsight Compute's window: runs/profile-<..>.ncu-rep, or --out. --json writes the reading too, by
default to benchmarks/results/profiles, for documents to quote.

ncu runs a kernel some forty times and puts memory back in between. --cache cold (its default)
flushes the caches before each: durations are those of a cold L2, and DRAM traffic shows what a
call reads at all. --cache warm leaves them as the last run did.

Inputs are those of bench_decode_gpu; nothing is verified here. A call that launches several kernels
of the same name: --launch chooses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine_facts, slug, write_json
from decode_catalogues import BEAUTY, REAL
from profile_pages import parse_raw, parse_source
from profile_reading import make_reading
from profile_target import OPERATORS
from profile_words import describe

from sidmlp_kernels.backends import BACKENDS, DTYPES

TARGET = Path(__file__).resolve().parent / "profile_target.py"
KERNELS = {  # of each operator: csrc/cuda and ops/triton name them alike
    "beam_decode": "beam_decode|decode",
    "decode_states": "beam_decode|decode",
    "context_readout": "context_readout|readout",
}
# Asked for by name, in case a version's full set leaves them out.
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
)
# Where toolkits and packages put ncu, in case PATH does not say.
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
WARM = 3


class ProfileError(RuntimeError):
    """Why there is no reading, in one sentence."""


def find_ncu(given: Path | None) -> str:
    """ncu's path; ProfileError where there is none."""
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise ProfileError(f"--ncu: expected a program, got {given}; pass the path of ncu")
        return found
    places = [
        Path(os.environ[name]) / "bin" / "ncu" for name in ("CUDA_HOME",) if name in os.environ
    ]
    for pattern in PLACES:
        folder, rest = Path(pattern).anchor, str(Path(pattern).relative_to("/"))
        places += sorted(Path(folder).glob(rest), reverse=True)  # the newest first
    found = shutil.which("ncu") or next((str(p) for p in places if os.access(p, os.X_OK)), None)
    if found is None:
        raise ProfileError(
            "ncu: expected Nsight Compute on PATH, in $CUDA_HOME/bin, /usr/local/cuda/bin or "
            "/opt/nvidia/nsight-compute, got none; install it (Debian: the package "
            "cuda-nsight-compute of NVIDIA's repository), or pass --ncu"
        )
    return found


def ncu_command(ncu: str, args: argparse.Namespace, report: Path, facts: Path) -> list[str]:
    """ncu around the target."""
    target = [sys.executable, str(TARGET), "--warm", str(WARM), "--facts", str(facts)]
    for name in ("backend", "operator", "batch", "dtype", "beams", "k", "catalogue", "data"):
        value = getattr(args, name)
        if value is not None:
            target += [f"--{name}", str(value)]
    return [
        ncu,
        *("--clock-control", "none"),
        *("--cache-control", "all" if args.cache == "cold" else "none"),
        *("--set", "full"),
        *("--metrics", ",".join(METRICS)),
        *("--import-source", "yes"),
        *("--profile-from-start", "off"),  # profile_target says what to profile
        *("-k", f"regex:{args.kernel}"),
        *("-s", str(args.launch)),
        *("-c", "1"),
        *("-f", "-o", str(report)),
        *target,
    ]


def run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs it with what it starts; ProfileError, and none of them left, after `seconds`."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # numbers with points, whatever the user's language
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise ProfileError(
            f"{Path(command[0]).name}: expected an end within {seconds:.0f} s, got none; "
            "raise --seconds"
        ) from None
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def profile(ncu: str, args: argparse.Namespace, report: Path) -> tuple[Path, dict[str, Any]]:
    """Makes the report; its path and the target's facts. ProfileError says what went wrong."""
    report.parent.mkdir(parents=True, exist_ok=True)
    for old in reports_named(report):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.json"
        done = run(ncu_command(ncu, args, report, path), args.seconds)
        facts = json.loads(path.read_text()) if path.exists() else {}
    said = done.stdout + done.stderr
    if "problem" in facts:
        raise ProfileError(facts["problem"])
    if "ERR_NVGPUCTRPERM" in said:
        raise ProfileError(
            "ncu: expected access to the GPU's performance counters, got ERR_NVGPUCTRPERM; run as "
            "root (in a container: with the capability SYS_ADMIN), or have the driver loaded with "
            "NVreg_RestrictProfilingToAdminUsers=0"
        )
    lines = said.strip().splitlines()
    errors = [line for line in lines if line.startswith("==ERROR==")]
    if not facts:
        last = errors or lines or [f"exit status {done.returncode}"]
        raise ProfileError(
            f"{TARGET.name}: expected one call of {args.operator}, got: {last[-1].strip()}; run "
            f"it alone: python benchmarks/{TARGET.name} --help"
        )
    made = reports_named(report)
    if made:
        return made[0], facts
    if errors:
        raise ProfileError(
            f"ncu: expected a report, got: {errors[0].removeprefix('==ERROR==').strip()}; "
            "correct that, or run ncu by hand"
        )
    raise ProfileError(
        f"--kernel: expected a launch number {args.launch} of a kernel that matches "
        f"{args.kernel!r} in a call of {args.operator} on {args.backend}, got none; pass another "
        "expression, --kernel . matches all"
    )


def reports_named(report: Path) -> list[Path]:
    """The report's file, under whichever of its endings this version of ncu chose."""
    paths = (report, report.with_suffix(".ncu-repz"), Path(f"{report}.ncu-rep"))
    return [path for path in paths if path.exists()]


def read_report(ncu: str, report: Path, args: argparse.Namespace, facts: dict) -> dict[str, Any]:
    """The reading of a report."""

    def page(*options: str) -> str:
        units = ("--print-units", "base")
        command = [ncu, "--import", str(report), "--csv", *units, "--page", *options]
        done = run(command, args.seconds)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ProfileError(
                f"ncu: expected page {options[0]} of {report}, got {said}; open it with ncu-ui"
            )
        return done.stdout

    try:
        kernels = parse_raw(page("raw"))
    except ValueError as error:
        raise ProfileError(f"{report}: {error}") from error
    if not kernels:
        raise ProfileError(f"{report}: expected one kernel, got none; profile it again")
    sass = parse_source(page("source", "--print-source", "sass"))
    try:
        lines = parse_source(page("source", "--print-source", "cuda,sass"))
    except ProfileError:  # no line information: some versions call that an error
        lines = []
    return make_reading(
        kernels[0], sass, lines, batch=args.batch, counted=facts["counted"], top=args.top
    )


def result_of(
    args: argparse.Namespace, report: Path, facts: dict, reading: dict[str, Any]
) -> dict[str, Any]:
    """What --json writes."""
    machine = machine_facts()
    if args.commit:
        machine["commit"] = args.commit
    names = ("backend", "operator", "batch", "dtype", "beams", "k", "cache", "kernel", "launch")
    setting = {name: getattr(args, name) for name in names}
    return {
        "kind": "profile",
        "machine": machine,
        "gpu": facts.get("gpu"),
        "setting": {**setting, "report": report.name, "clock_control": "none"},
        "facts": facts,
        "results": [reading],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    gpu = [backend.name for backend in BACKENDS if backend.device_type == "cuda"]
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--backend", choices=gpu, required=True)
    made.add_argument("--operator", choices=OPERATORS, default="beam_decode")
    made.add_argument("--batch", type=int, required=True)
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and states")
    made.add_argument("--beams", type=int, default=50)
    made.add_argument("--k", type=int, default=10)
    made.add_argument("--catalogue", choices=REAL, default=BEAUTY)
    made.add_argument("--data", type=Path, help="folder of the real catalogues")
    made.add_argument("--kernel", help="regular expression of its name; default: the operator's")
    made.add_argument("--launch", type=int, default=0, help="of those in a call, from 0")
    made.add_argument("--cache", choices=("cold", "warm"), default="cold")
    made.add_argument("--top", type=int, default=20, help="source lines to name")
    made.add_argument("--seconds", type=float, default=540.0, help="most to wait for ncu")
    made.add_argument("--ncu", type=Path, help="path of ncu; default: on PATH or beside CUDA")
    made.add_argument("--out", type=Path, help="report to write (.ncu-rep)")
    made.add_argument("--json", type=Path, nargs="?", const=Path(), help="write the reading here")
    made.add_argument("--commit", help="what is profiled, where the tree is no git checkout")
    return made


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments with their defaults; ValueError names what is wrong."""
    for name, low in (("batch", 1), ("beams", 1), ("k", 1), ("launch", 0), ("top", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    if args.k > args.beams:
        raise ValueError(f"--k: expected at most --beams {args.beams}, got {args.k}")
    args.kernel = args.kernel or KERNELS[args.operator]
    name = f"profile-{args.backend}-{args.operator}-{args.dtype}-batch-{args.batch}-{args.cache}"
    out = args.out or ROOT / "runs" / f"{name}.ncu-rep"
    args.out = out if out.suffix == ".ncu-rep" else Path(f"{out}.ncu-rep")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    try:
        checked(args)
    except ValueError as error:
        made.error(str(error))
    try:
        ncu = find_ncu(args.ncu)
        report, facts = profile(ncu, args, args.out)
        reading = read_report(ncu, report, args, facts)
    except ProfileError as error:
        print(f"profile_nsight: {error}", file=sys.stderr)
        return 1
    print(
        f"{facts.get('gpu', 'GPU')}: {args.operator} on {args.backend}, {args.dtype}, batch "
        f"{args.batch}, {args.beams} beams, {facts['catalogue']['name']}, L2 {args.cache}"
    )
    print("\n".join(describe(reading)))
    print(report)
    if args.json is not None:
        path = args.json
        if path == Path():
            gpu = slug(facts.get("gpu") or "gpu")
            path = RESULTS / "profiles" / f"{args.out.stem}-{gpu}.json"
        write_json(path, result_of(args, report, facts, reading))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
