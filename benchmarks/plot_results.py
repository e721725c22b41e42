"""Plots (PNG) of benchmarks/results/decode-*.json, beside the files or in another folder.

    python benchmarks/plot_results.py [benchmarks/results/decode-<machine>.json ..] [--out FOLDER]

    <file>-batch.png      time of a batch against its size
    <file>-catalogue.png  requests per second against the catalogue's size
    <file>-peers.png      everyone at the base point

and of results/decode-gpu-<gpu>.json (plot_gpu):

    <file>-batch.png      time of a batch against its size
    <file>-items.png, -beams.png, -codes.png   requests per second along an axis

Needs matplotlib (pip extra `benchmark`). A plot whose axis was not measured is not made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import plot_gpu
from common import RESULTS, format_count, read_json
from make_tables import base_point, number_cell, points_on, time_cell, variant
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from plot_style import finish, log_axes, titled

Report = dict[str, Any]

# Key of a participant -> label, colour (safe for colour-blind readers), marker.
LINES = {
    "eager": ("PyTorch, eager", "#7f7f7f", "o"),
    "compiled": ("PyTorch, torch.compile", "#e69f00", "s"),
    "recommender-float32": ("sidmlp_kernels, fp32", "#0072b2", "D"),
    "recommender-bfloat16": ("sidmlp_kernels, bf16 weights", "#56b4e9", "^"),
}


def subtitle(report: Report, extra: str) -> str:
    """Machine and fixed sizes, for the line below a title."""
    machine, setting = report["machine"], report["setting"]
    where = f"{machine['cpu']}, {setting['threads']} threads, torch {machine['torch']}"
    quick = "  -  a quick try-out, not a measurement" if setting.get("quick") else ""
    return f"{extra}\n{where}{quick}"


def line_chart(
    report: Report, axis: str, sort_by: str, column: str
) -> tuple[Figure, Axes, list[float]] | None:
    """One line per participant over an axis, both scales logarithmic; None if not measured."""
    points = points_on(report, axis, sort_by)
    if len(points) < 2:
        return None
    catalogues = report["catalogues"]
    where = [
        catalogues[p["catalogue"]]["items"] if sort_by == "items" else p[sort_by] for p in points
    ]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for key, (label, colour, marker) in LINES.items():
        rows = [(x, variant(p, key)) for x, p in zip(where, points, strict=True)]
        measured = [(x, row[column]) for x, row in rows if row]
        if measured:
            x, y = zip(*measured, strict=True)
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
    log_axes(axes, where)
    axes.legend(frameon=False, loc="best")
    finish(axes)
    return figure, axes, where


def batch_plot(report: Report) -> Figure | None:
    """Time of a batch against its size."""
    made = line_chart(report, "batch", "batch", "p50_us")
    if made is None:
        return None
    figure, axes, _ = made
    base = report["setting"]["base"]
    catalogue = report["catalogues"][base["catalogue"]]
    facts = f"{catalogue['name']}, {catalogue['items']:,} items, {base['num_beams']} beams"
    titled(axes, "Time to decode a batch (median)", subtitle(report, facts))
    axes.set_xlabel("requests in a batch")
    axes.set_ylabel("time")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: time_cell(y)))
    return figure


def catalogue_plot(report: Report) -> Figure | None:
    """Requests per second against the size of the catalogue."""
    made = line_chart(report, "catalogue", "items", "users_per_s")
    if made is None:
        return None
    figure, axes, _ = made
    base = report["setting"]["base"]
    facts = f"batch {base['batch']}, {base['num_beams']} beams; "
    real = [c["items"] for c in report["catalogues"].values() if c["origin"].startswith("real")]
    if real:
        facts += f"real catalogues to {format_count(max(real))} items, then random codes"
    else:
        facts += "random codes"
    titled(axes, "Requests per second against catalogue size", subtitle(report, facts))
    axes.set_xlabel("items in the catalogue")
    axes.set_ylabel("requests per second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_count(round(y))))
    return figure


def peers_plot(report: Report) -> Figure | None:
    """Bars of everyone at the base point, with the times faster than eager."""
    point = base_point(report)
    if point is None:
        return None
    rows = [(key, variant(point, key)) for key in LINES if variant(point, key)]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.6 * len(rows)), layout="constrained")
    labels = [LINES[key][0] for key, _ in rows]
    times = [row["p50_us"] for _, row in rows]
    bars = axes.barh(labels, times, color=[LINES[key][1] for key, _ in rows], height=0.62)
    for bar, (_, row) in zip(bars, rows, strict=True):
        text = time_cell(row["p50_us"])
        faster = row.get("times_faster_than", {}).get("eager")
        if faster is not None:
            text += f"   {number_cell(faster)}x faster than eager"
        axes.annotate(
            text,
            (bar.get_width(), bar.get_y() + bar.get_height() / 2),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: time_cell(x) if x else "0"))
    catalogue = report["catalogues"][point["catalogue"]]
    facts = (
        f"batch {point['batch']}, {point['num_beams']} beams, "
        f"{catalogue['name']} ({catalogue['items']:,} items)"
    )
    titled(axes, "One batch, median time", subtitle(report, facts))
    finish(axes)
    axes.grid(False, axis="y")
    return figure


PLOTS: dict[str, dict[str, Callable[[Report], Figure | None]]] = {
    "decode": {"batch": batch_plot, "catalogue": catalogue_plot, "peers": peers_plot},
    "decode-gpu": plot_gpu.PLOTS,
}


def plot(path: Path, folder: Path) -> list[Path]:
    """Every plot of one results file; the PNGs that were written."""
    report = read_json(path)
    if report["kind"] not in PLOTS:
        raise ValueError(f"{path}: expected results of bench_decode, got {report['kind']!r}")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in PLOTS[report["kind"]].items():
        figure = make(report)
        if figure is None:
            continue
        target = folder / f"{path.stem}-{name}.png"
        figure.savefig(target, dpi=150, metadata={"Software": None})
        plt.close(figure)
        written.append(target)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all results of bench_decode")
    parser.add_argument("--out", type=Path, help="folder for the PNGs; default: beside the file")
    args = parser.parse_args(arguments)
    of_bench_decode = (p for p in sorted(RESULTS.glob("*.json")) if read_json(p)["kind"] in PLOTS)
    files = args.files or list(of_bench_decode)
    if not files:
        parser.error(f"files: expected results in {RESULTS}; run bench_decode.py first")
    try:
        for path in files:
            for written in plot(path, args.out or path.parent):
                print(written)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
