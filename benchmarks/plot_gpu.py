"""Plots of bench_decode --device cuda: one per axis, everyone a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from common import format_count
from gpu_axis_tables import OPERATOR, axis_points, axis_value, decode_rows, main_dtype, value_cell
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from plot_style import finish, log_axes, titled
from table_cells import time_cell

Report = dict[str, Any]

# Name of a participant -> label, colour (safe for colour-blind readers), marker, line.
LINES = {
    "teacher": ("the teacher, Hugging Face generate", "#000000", "x", "-"),
    "reference": ("the reference, eager", "#7f7f7f", "o", "-"),
    "static": ("STATIC-style masks, compiled", "#cc79a7", "v", "-"),
    "compiled": ("PyTorch, compiled, CUDA graph", "#e69f00", "s", "-"),
    "cpu": ("ours, cpu", "#009e73", "P", ":"),
    "cuda": ("ours, cuda", "#0072b2", "D", "-"),
    "triton": ("ours, triton", "#56b4e9", "^", "-"),
}
LABELS = {
    "batch": "requests in a batch",
    "items": "items in the catalogue (uniformly random codes)",
    "beams": "beams",
    "codes": "codes a level (uniformly random codes)",
}


def axis_plot(report: Report, axis: str, column: str) -> Figure | None:
    """One line per participant, of the larger base batch; None with fewer than two points."""
    points = axis_points(report, axis)
    if axis != "batch" and points:
        largest = max(point["batch"] for point in points)
        points = [point for point in points if point["batch"] == largest]
    if len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    where = [axis_value(report, axis, point) for point in points]
    rows = [decode_rows(report, point) for point in points]
    for name, (label, colour, marker, line) in LINES.items():
        drawn = [(x, r[name][column]) for x, r in zip(where, rows, strict=True) if name in r]
        if len(drawn) > 1:
            x, y = zip(*drawn, strict=True)
            style = {"color": colour, "marker": marker, "linestyle": line}
            axes.plot(x, y, markersize=5, linewidth=2, label=label, **style)
    log_axes(axes, where)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: value_cell(axis, round(x))))
    axes.set_xlabel(LABELS[axis])
    axes.legend(frameon=False, loc="best")
    finish(axes)
    _titles(report, axis, column, points[0], axes)
    return figure


def _titles(report: Report, axis: str, column: str, point: dict[str, Any], axes: Any) -> None:
    about = report["catalogues"][point["catalogue"]]
    items = f"{about['items']:,} items"
    levels = f"{len(point['codes_per_level'])} levels"
    facts = {
        "batch": f"{about['name']}, {items}, {point['num_beams']} beams",
        "items": f"batch {point['batch']}, {point['num_beams']} beams, {levels}",
        "beams": f"batch {point['batch']}, {about['name']}, {items}",
        "codes": f"batch {point['batch']}, {point['num_beams']} beams, {levels}, {items}",
    }[axis]
    where = f"{report['gpu']}, {main_dtype(report)}, torch {report['machine']['torch']}"
    quick = "  -  a quick try-out, not a measurement" if report["setting"].get("quick") else ""
    if column == "p50_us":
        title, label, cell = f"Time of {OPERATOR} (median, caches warm)", "time", time_cell
    else:
        title, label = "Requests per second", "requests per second"
        cell = lambda y: format_count(round(y))  # noqa: E731
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: cell(y)))
    # Of the values between powers of ten, 2 and 5 alone have room for a number.
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda y, _: cell(y) if f"{y:.0e}"[0] in "25" else "")
    )
    titled(axes, title, f"{facts}\n{where}{quick}")


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "batch": lambda report: axis_plot(report, "batch", "p50_us"),
    "items": lambda report: axis_plot(report, "items", "users_per_s"),
    "beams": lambda report: axis_plot(report, "beams", "users_per_s"),
    "codes": lambda report: axis_plot(report, "codes", "users_per_s"),
}
