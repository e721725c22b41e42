"""The results of a sweep: sweep.json and sweep.md, written anew after every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidmlp.data.files import write_atomically, write_json
from sidmlp.reporting.markdown import markdown_table

SCORE = "validation_ndcg@10"


def write_table(out: Path, rows: list[dict[str, Any]], total: int) -> tuple[int | None, str]:
    """Writes both files; which row is best (None: all failed), and the table for a terminal.

    rows: {"setting", and SCORE, "best_epoch", "epochs", "seconds", or "failed"}; of equally good
    ones the first is best.
    """
    finished = [number for number, row in enumerate(rows) if SCORE in row]
    best = max(finished, key=lambda number: rows[number][SCORE], default=None)
    write_json(out / "sweep.json", {"runs": rows, "of": total, "best": best})
    text = table_of(rows, best)
    lead = f"Validation NDCG@10 by setting, {len(rows)} of {total} runs; the best in bold."
    write_atomically(out / "sweep.md", lambda path: _write(path, f"{lead}\n\n{text}\n"))
    return best, text


def table_of(rows: list[dict[str, Any]], best: int | None) -> str:
    """Best first, failed ones last; one column per option that varies."""
    names = list(dict.fromkeys(name for row in rows for name in row["setting"]))
    order = sorted(range(len(rows)), key=lambda n: -rows[n].get(SCORE, float("-inf")))
    body = []
    for number in order:
        row = rows[number]
        cells = [row["setting"].get(name, "") for name in names]
        if SCORE in row:
            score = f"{row[SCORE]:.4f}"
            cells += [f"**{score}**" if number == best else score]
            cells += [f"{row['best_epoch']} of {row['epochs']}", f"{row['seconds']:.0f}", ""]
        else:
            cells += ["-", "-", "-", row["failed"]]
        body.append(cells)
    return markdown_table([*names, "validation NDCG@10", "best epoch", "seconds", ""], body, left=0)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
