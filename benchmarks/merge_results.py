"""One results file of bench_decode --device cuda from several that measured some points each.

    python benchmarks/merge_results.py PIECE.json PIECE.json .. --out results/decode-gpu-<gpu>.json

All pieces must come from one commit, one kind of GPU and one setting; which backends took part may
differ, and every point says who did. A point that several pieces
have is taken from the last one that has it: name a file again last to replace its points. What was
left out in one piece and measured in another is not left out. Facts of each piece (machine,
ceilings, seconds) are kept under `pieces`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import read_json, write_json

Report = dict[str, Any]

# What tells points apart, and what pieces may differ in.
IDENTITY = ("catalogue", "batch", "num_beams", "codes_per_level")
FREE = ("axes", "backends", "other_processes", "peers_about", "threads", "timing")
OF_PIECES = ("machine", "ceilings", "seconds", "compile_seconds")


def identity(entry: dict[str, Any]) -> tuple[str, ...]:
    """What tells a point, or what was left out, from others."""
    return tuple(repr(entry.get(name)) for name in IDENTITY)


def merged(reports: Sequence[Report], names: Sequence[str]) -> Report:
    """All points of `reports`; ValueError, by `names`, where two do not belong together."""
    first = reports[0]
    for report, name in zip(reports, names, strict=True):
        if report["kind"] != "decode-gpu":
            raise ValueError(f"{name}: expected results of a GPU, got {report['kind']!r}")
        facts = (
            ("gpu", first["gpu"], report["gpu"]),
            ("torch", first["machine"]["torch"], report["machine"]["torch"]),
            ("commit", first["machine"]["commit"], report["machine"]["commit"]),
            ("setting", _fixed(first), _fixed(report)),
        )
        for what, expected, got in facts:
            if expected != got:
                raise ValueError(
                    f"{name}: expected the {what} of {names[0]}, {expected}, got {got}; measure "
                    "the piece again"
                )
    points: dict[tuple[str, ...], dict[str, Any]] = {}
    left: list[tuple[int, dict[str, Any]]] = []
    owner: dict[tuple[str, ...], int] = {}
    for number, report in enumerate(reports):
        for point in report["results"]:
            points[identity(point)], owner[identity(point)] = point, number
        left += [(number, gone) for gone in report["left_out"]]
    gathered = {
        name: list(dict.fromkeys(x for report in reports for x in report["setting"].get(name, [])))
        for name in ("axes", "backends")
    }
    catalogues = {key: about for report in reports for key, about in report["catalogues"].items()}
    return {
        **first,
        "complete": all(report["complete"] for report in reports),
        "setting": {**first["setting"], **gathered},
        "catalogues": catalogues,
        "results": list(points.values()),
        "left_out": [gone for number, gone in left if owner.get(identity(gone), number) == number],
        "pieces": [
            {
                **{key: report[key] for key in OF_PIECES if key in report},
                "axes": report["setting"].get("axes"),
                "backends": report["setting"].get("backends"),
                "points": sum(owner[identity(point)] == n for point in report["results"]),
            }
            for n, report in enumerate(reports)
        ],
    }


def _fixed(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report["setting"].items() if key not in FREE}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where pieces do not belong together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="PIECE")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args(arguments)
    try:
        report = merged([read_json(path) for path in args.files], [str(p) for p in args.files])
        write_json(args.out, report)
    except (OSError, ValueError) as error:
        print(f"merge_results: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(report['results'])} points, {len(report['left_out'])} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
