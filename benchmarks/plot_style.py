"""How plots look: titles, grid, logarithmic axes with the measured values as ticks."""

from __future__ import annotations

from collections.abc import Sequence

from common import format_count
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator


def titled(axes: Axes, title: str, below: str) -> None:
    """Title in bold, facts in grey under it."""
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", pad=22)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9, color="#555555")


def finish(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_axes(axes: Axes, where: Sequence[float]) -> None:
    """Both scales logarithmic, and a tick at every measured value."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(where)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_count(round(x))))
