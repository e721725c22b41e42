"""Markdown tables and the numbers in their cells."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def time_cell(microseconds: float | None) -> str:
    """A time with three digits and its unit."""
    if microseconds is None:
        return "-"
    if microseconds < 1e3:
        return f"{number_cell(microseconds)} µs"
    return f"{number_cell(microseconds / 1e3)} ms"


def number_cell(number: float) -> str:
    """A number with about three digits."""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def times_cell(factor: float | None) -> str:
    """How many times faster."""
    if factor is None:
        return "-"
    return f"{factor:.1f}x" if factor < 100 else f"{factor:.0f}x"


def percent_cell(share: float | None) -> str:
    """A share with two digits at least where it is not 0."""
    if share is None:
        return "-"
    if share == 0:
        return "0"
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
