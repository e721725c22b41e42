"""Markdown tables from benchmarks/results/*.json, and their places in documents.

    python benchmarks/make_tables.py                       print every table
    python benchmarks/make_tables.py --update README.md    rewrite the tables of a document
    python benchmarks/make_tables.py --check README.md     exit with 1 where it is out of date

A document marks the place of a table, whose lines between the markers belong to this script:

    <!-- table:decode-batch -->
    <!-- /table -->

With results of several machines a marker names one: table:decode-batch@amd-epyc, as in the name of
its file, <kind>-<machine>.json; all of quality.py's files, quality-<experiment>.json, make one
table. A table of a GPU, of whole requests or of quality stays empty until it has been measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, format_count, read_json
from gpu_tables import GPU_TABLES, decode_gpu_tables
from quality_tables import QUALITY_TABLES, quality_tables
from request_tables import REQUEST_TABLES, requests_cpu_tables, requests_gpu_tables
from table_cells import markdown, number_cell, time_cell, times_cell

Report = dict[str, Any]
Row = dict[str, Any]

MARKER = re.compile(
    r"(?P<open><!-- table:(?P<name>[\w-]+)(?:@(?P<machine>[\w-]+))? -->\n)"
    r"(?P<body>(?:(?!<!-- table:).)*?)(?P<close><!-- /table -->)",
    re.DOTALL,
)
OPENING = re.compile(r"<!-- table:[^>]*-->")

KERNEL = "recommender-float32"

# Above this share of the processor used by others, a point's times are called noisy.
QUIET = 0.05


def caption(report: Report) -> str:
    """Where and how the numbers were measured, as one line below a table."""
    machine, setting = report["machine"], report["setting"]
    if report["kind"] in ("decode-gpu", "requests-gpu"):
        facts = [report["gpu"], f"torch {machine['torch']}"]
    elif report["kind"] in ("decode", "requests-cpu"):
        facts = [machine["cpu"], f"{setting['threads']} threads", f"torch {machine['torch']}"]
    else:
        facts = [machine["cpu"], f"{setting['threads']} threads", machine["compiler"]]
    facts.append(f"commit {machine['commit']}")
    others = max((point.get("others_cpu_share", 0.0) for point in report["results"]), default=0.0)
    if others > QUIET:
        facts.append(f"**noisy: others used up to {others:.0%} of the processor**")
    again = [point["batch"] for point in report["results"] if point.get("remeasured")]
    if again:
        facts.append(f"batch {' and '.join(map(str, again))} measured a second time, as noisy")
    if not report.get("complete", True):
        facts.append("**a benchmark that did not finish**")
    if setting.get("quick"):
        facts.append("**a quick try-out, not a measurement**")
    return f"<sub>{', '.join(facts)}</sub>"


def variant(point: Row, key: str) -> Row:
    """A participant of a point by its key; an empty row where it did not take part."""
    return next((row for row in point["variants"] if row["key"] == key), {})


def points_on(report: Report, axis: str, sort_by: str) -> list[Row]:
    """The points that vary `axis`, in ascending order."""
    points = [point for point in report["results"] if axis in point["axes"]]
    if sort_by == "items":
        return sorted(points, key=lambda p: report["catalogues"][p["catalogue"]]["items"])
    return sorted(points, key=lambda p: p[sort_by])


def base_point(report: Report) -> Row | None:
    """The point that all axes start from."""
    base = report["setting"]["base"]
    wanted = {name: base[name] for name in ("catalogue", "batch", "num_beams", "isas")}
    found = (p for p in report["results"] if all(p[n] == v for n, v in wanted.items()))
    return next(found, None)


PARTICIPANTS = {
    "eager": "PyTorch, eager",
    "compiled": "PyTorch, torch.compile",
    "recommender-float32": "`Recommender.decode_states`, fp32",
    "plan-float32": "the operator alone, fp32",
    "recommender-bfloat16": "`Recommender.decode_states`, bf16 weights",
    "plan-bfloat16": "the operator alone, bf16 weights",
}


def peers_table(report: Report) -> str | None:
    """Everyone at the base point."""
    point = base_point(report)
    if point is None:
        return None
    header = [
        "",
        "p50",
        "p99",
        "p50, caches warm",
        "µs a request",
        "requests/s",
        "eager",
        "compiled",
    ]
    rows = []
    for key, label in PARTICIPANTS.items():
        row = variant(point, key)
        if not row:
            continue
        faster = row.get("times_faster_than", {})
        rows.append(
            [
                label,
                time_cell(row["p50_us"]),
                time_cell(row["p99_us"]),
                time_cell(row.get("warm_p50_us")),
                number_cell(row["us_per_request"]),
                number_cell(row["users_per_s"]),
                times_cell(faster.get("eager")),
                times_cell(faster.get("compiled")),
            ]
        )
    return markdown(header, rows)


def axis_table(report: Report, axis: str) -> str | None:
    """One row per value of an axis: peers, kernel, ratios."""
    sort_by = {"batch": "batch", "catalogue": "items", "beams": "num_beams"}[axis]
    points = points_on(report, axis, sort_by)
    if not points:
        return None
    first = {"batch": ["batch"], "catalogue": ["catalogue", "items"], "beams": ["beams"]}[axis]
    header = [
        *first,
        "eager",
        "compiled",
        "kernel",
        "kernel p99",
        "kernel, bf16",
        "kernel requests/s",
        "eager / kernel",
        "compiled / kernel",
    ]
    rows = []
    for point in points:
        kernel = variant(point, KERNEL)
        catalogue = report["catalogues"][point["catalogue"]]
        value = {
            "batch": [str(point["batch"])],
            "catalogue": [catalogue["name"], format_count(catalogue["items"])],
            "beams": [str(point["num_beams"])],
        }[axis]
        rows.append(
            [
                *value,
                time_cell(variant(point, "eager").get("p50_us")),
                time_cell(variant(point, "compiled").get("p50_us")),
                time_cell(kernel["p50_us"]),
                time_cell(kernel["p99_us"]),
                time_cell(variant(point, "recommender-bfloat16").get("p50_us")),
                number_cell(kernel["users_per_s"]),
                times_cell(kernel["times_faster_than"].get("eager")),
                times_cell(kernel["times_faster_than"].get("compiled")),
            ]
        )
    return markdown(header, rows, left=2 if axis == "catalogue" else 1)


def isa_table(report: Report) -> str | None:
    """The kernel with each instruction set."""
    points = points_on(report, "isa", "batch")
    if not points:
        return None
    rows = []
    for point in points:
        for isa in point["isas"]:
            cells = [variant(point, f"plan-{w}-{isa}") for w in ("float32", "bfloat16")]
            rows.append([isa, *(time_cell(cell.get("warm_p50_us")) for cell in cells)])
    return markdown(["instruction set", "fp32 weights", "bf16 weights"], rows)


def goals_table(report: Report) -> str | None:
    """Goal, measured, met or not."""
    rows = [
        [
            f"batch {goal['batch']}, times faster than {goal['peer']}",
            f"{goal['target']:.0f}x",
            times_cell(goal["got"]),
            "met" if goal["met"] else "**missed**",
        ]
        for goal in report["goals"]
    ]
    return markdown(["goal", "target", "measured", ""], rows) if rows else None


def goal_lines(report: Report) -> list[str]:
    """The goals for a terminal."""
    return [
        f"{'pass' if g['met'] else 'MISS'}  batch {g['batch']}: {g['got']:.1f}x faster than "
        f"{g['peer']}, goal {g['target']:.0f}x"
        for g in report["goals"]
    ]


def decode_tables(report: Report) -> dict[str, str]:
    """Name -> table of bench_decode's results."""
    tables = {
        "decode-peers": peers_table(report),
        "decode-batch": axis_table(report, "batch"),
        "decode-catalogue": axis_table(report, "catalogue"),
        "decode-beams": axis_table(report, "beams"),
        "decode-isa": isa_table(report),
        "decode-goals": goals_table(report),
    }
    made = {name: table for name, table in tables.items() if table is not None}
    if "decode-catalogue" in made and report["left_out"]:
        reasons = "; ".join(f"{gone['catalogue']}: {gone['why']}" for gone in report["left_out"])
        made["decode-catalogue"] += f"\n\nLeft out: {reasons}."
    return made


def catalogue_tables(report: Report) -> dict[str, str]:
    """Name -> table of bench_catalogue's results."""
    header = ["items", "build, s", "from_codes, s", "peak memory growth, MB", "nodes per level"]
    rows = [
        [
            f"{row['items']:,}",
            f"{row['build_trie_seconds']:.4f}",
            f"{row['from_codes_seconds']:.4f}",
            f"{row['peak_rss_growth_bytes'] / 1e6:,.1f}",
            " / ".join(f"{n:,}" for n in row["nodes_per_level"]),
            f"{row['bytes_per_node']:.2f}",
        ]
        for row in report["results"]
    ]
    return {"catalogue": markdown([*header, "bytes a node"], rows)}


KINDS: dict[str, Callable[[Report], dict[str, str]]] = {
    "decode": decode_tables,
    "decode-gpu": decode_gpu_tables,
    "catalogue": catalogue_tables,
    "requests-gpu": requests_gpu_tables,
    "requests-cpu": requests_cpu_tables,
}
MAY_BE_MISSING = (*GPU_TABLES, *REQUEST_TABLES, *QUALITY_TABLES)


def all_tables(results: Path) -> dict[str, dict[str, str]]:
    """Table name -> machine -> Markdown, from every results file of a known kind."""
    tables: dict[str, dict[str, str]] = {}
    experiments = []
    for path in sorted(results.glob("*.json")):
        report = read_json(path)
        kind = report["kind"]
        if kind == "quality":
            experiments.append(report)
            continue
        if kind not in KINDS:
            raise ValueError(f"{path}: expected a kind of {sorted(KINDS)}, got {kind!r}")
        machine = path.stem.removeprefix(f"{kind}-")
        for name, table in KINDS[kind](report).items():
            tables.setdefault(name, {})[machine] = f"{table}\n\n{caption(report)}"
    return tables | {name: {"all": table} for name, table in quality_tables(experiments).items()}


def filled(text: str, tables: dict[str, dict[str, str]], what: str) -> str:
    """`text` with every marked table as `tables` has it.

    A marker of MAY_BE_MISSING without results gets an empty table, any other ValueError.
    """

    def replacement(found: re.Match[str]) -> str:
        name, machine = found["name"], found["machine"]
        machines = tables.get(name, {})
        if machine is None and len(machines) == 1:
            machine = next(iter(machines))
        if name in MAY_BE_MISSING and machine is None and not machines:
            return f"{found['open']}{found['close']}"
        if machine not in machines:
            have = ", ".join(sorted(machines)) or "no results"
            raise ValueError(
                f"{what}: expected one machine's results for table {name}, got {have} for "
                f"{found['open'].strip()}; run its benchmark, or write table:{name}@<machine>"
            )
        return f"{found['open']}{machines[machine]}\n{found['close']}"

    result, count = MARKER.subn(replacement, text)
    if count != len(OPENING.findall(text)):
        raise ValueError(
            f"{what}: expected `<!-- table:name -->` on a line of its own and `<!-- /table -->` "
            f"after each, got {len(OPENING.findall(text))} openings and {count} whole pairs"
        )
    return result


def _printed(tables: dict[str, dict[str, str]]) -> Iterator[str]:
    for name, machines in tables.items():
        for machine, table in machines.items():
            yield f"{name}@{machine}\n\n{table}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--update", nargs="+", type=Path, metavar="FILE", help="rewrite tables")
    action.add_argument("--check", nargs="+", type=Path, metavar="FILE", help="1 if out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    args = parser.parse_args(arguments)
    stale = []
    try:
        tables = all_tables(args.results)
        for path in args.update or args.check or []:
            text = path.read_text()
            wanted = filled(text, tables, str(path))
            if wanted == text:
                continue
            if args.update:
                path.write_text(wanted)
            else:
                stale.append(path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in stale:
        print(
            f"{path}: its tables differ from {args.results}; run `python benchmarks/"
            f"make_tables.py --update {path}`",
            file=sys.stderr,
        )
    if not (args.update or args.check):
        print("\n".join(_printed(tables)))
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
