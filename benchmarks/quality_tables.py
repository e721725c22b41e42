"""The tables of quality.py: how good, what share of the teacher, and which goals are met.

Experiments that differ by their seed alone are one group: mean and standard deviation over seeds.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from table_cells import markdown, number_cell

Report = dict[str, Any]
Row = dict[str, Any]

QUALITY_TABLES = ("quality", "quality-goals")
METRICS = {
    "recall_5": "Recall@5",
    "ndcg_5": "NDCG@5",
    "recall_10": "Recall@10",
    "ndcg_10": "NDCG@10",
}
# Method -> its words, and whether the table has it even if nobody measured it, which is an error.
METHODS = {
    "popularity": ("popularity", True),
    "teacher-unconstrained": ("teacher, unconstrained", True),
    "teacher": ("teacher, constrained", True),
    "kernel": ("student", True),
    "student++": ("student++", False),
    "rescore": ("student proposes, teacher orders", True),
}
RECOVERING = ("kernel", "student++", "rescore")
UNTIMED = ("popularity",)
EVERY = ("teacher", "student")  # stages that every experiment has
# Method -> least share of the teacher's NDCG@10.
SHARES = {"kernel": 0.996, "student++": 0.97, "rescore": 0.999}
# Method, its kernel in fp32, its reference: their metrics are to be the same.
PARITY = (
    ("kernel", "kernel-float32", "reference"),
    ("student++", "student++-float32", "reference++"),
)
TEACHERS = {"amazon14_beauty": 0.0365}


def quality_tables(reports: Sequence[Report]) -> dict[str, str]:
    """Name -> table; ValueError that names the experiment where one lacks what a table prints."""
    if not reports:
        return {}
    found = groups(reports)
    header = ["data, tokenizer", "", *METRICS.values(), "of the teacher's NDCG@10", "users/s"]
    rows = [row for group in found for row in group_rows(group)]
    text = f"{markdown(header, rows, left=2)}\n\n{words(found)}"
    return {"quality": text, "quality-goals": goals_table(found)}


def groups(reports: Sequence[Report]) -> list[list[Report]]:
    """Experiments by data set and tokenizer, each group in the order of seeds.

    Raises ValueError for two of one seed, and where a group's settings differ.
    """
    by_name: dict[tuple[str, str], list[Report]] = {}
    for report in sorted(reports, key=lambda r: _field(r, "setting", "seed")):
        key = (_field(report, "setting", "data"), _field(report, "setting", "tokenizer"))
        by_name.setdefault(key, []).append(report)
    for group in by_name.values():
        seeds = [report["setting"]["seed"] for report in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name_of(group[0])}: expected one experiment a seed, got {seeds}")
        for report in group[1:]:
            for what in ("split", "beams", "users"):
                _same(group[0], report, what, lambda r, what=what: _field(r, "setting", what))
        for stage in {*EVERY, *(stage for report in group for stage in report["stages"])}:
            # One seed timed is enough; what has not been trained has no results either.
            have = [r for r in group if stage in EVERY or stage in r["stages"]]
            for report in have[1:]:
                _same(have[0], report, stage, lambda r, stage=stage: _wanted(r, stage))
    return [by_name[key] for key in sorted(by_name)]


def name_of(report: Report) -> str:
    """An experiment for people."""
    setting = report.get("setting", {})
    return f"{setting.get('data')}, {setting.get('tokenizer')}, seed {setting.get('seed')}"


def group_rows(group: Sequence[Report]) -> list[list[str]]:
    """A row per method."""
    setting = group[0]["setting"]
    seeds = "one seed" if len(group) == 1 else f"{len(group)} seeds"
    rows: list[list[str]] = []
    for method, (label, _) in METHODS.items():
        own = method_rows(group, method)
        if not own:
            continue
        shares = [_number(r, row, "recovery", "ndcg_10") for r, row in _of(group, own, method)]
        # How fast a method is does not depend on the seed.
        timed = [(r, row) for r, row in own if "speed" in r["stages"]] or own
        speeds = [] if method in UNTIMED else [_number(r, w, "users_per_s") for r, w in timed]
        rows.append(
            [
                "" if rows else f"{setting['data']}, {setting['tokenizer']}, {seeds}",
                label,
                *(spread([_number(r, row, metric) for r, row in own]) for metric in METRICS),
                share_cell(shares, own[0][1]) if shares else "-",
                number_cell(statistics.median(speeds)) if speeds else "-",
            ]
        )
    return rows


def method_rows(group: Sequence[Report], method: str) -> list[tuple[Report, Row]]:
    """The method's results in each experiment; none of any, or ValueError."""
    found = []
    for report in group:
        results = _field(report, "results")
        row = next((row for row in results if row["method"] == method), None)
        if row is not None:
            found.append((report, row))
    if len(found) < len(group) and (found or METHODS[method][1]):
        have = [report for report, _ in found]
        lacking = next(report for report in group if report not in have)
        raise ValueError(
            f"{name_of(lacking)}: expected results of {method}, got none; run "
            "benchmarks/quality.py with its stages student, plus and evaluate"
        )
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; a value alone where there is no other."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def share_cell(shares: Sequence[float], row: Row) -> str:
    """Mean and standard deviation over seeds; of one seed the interval over users."""
    mean = f"{statistics.mean(shares):.1%}"
    if len(shares) > 1:
        return f"{mean} ± {100 * statistics.stdev(shares):.1f}"
    low, high = row.get("recovery_interval", {}).get("ndcg_10", (None, None))
    return mean if low is None else f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"


def words(found: Sequence[Sequence[Report]]) -> str:
    """How it was measured, below the table."""
    every = [report for group in found for report in group]
    places = {
        tuple(_where(report, stage).values()) for report in every for stage in report["stages"]
    }
    gpus, _, torches, commits = (sorted(set(column)) for column in zip(*places, strict=True))
    lengths = {report["setting"]["beams"] for report in every}
    facts = [
        f"{' and '.join(gpu for gpu in gpus if gpu != 'none') or 'no GPU'}",
        f"torch {', '.join(torches)}",
        f"commit {', '.join(commits)}",
    ]
    if any(report["setting"]["sampled"] for report in every):
        facts.append("**a sample of users**")
    lead = (
        f"Leave-one-out, the whole catalogue, {', '.join(map(str, sorted(lengths)))} beams; "
        "validation chooses, test items are reported. ± is the standard deviation over seeds; "
        "brackets hold the 95% bootstrap interval over users of the one seed that was run."
    )
    hows = dict.fromkeys(
        row["how"] for report in every for row in report["results"] if "how" in row
    )
    timed = f" users/s, of the seeds that were timed: {'; '.join(hows)}." if hows else ""
    return f"{lead}{timed}\n\n<sub>{', '.join(facts)}</sub>"


def goals_table(found: Sequence[Sequence[Report]]) -> str:
    """Goal, measured, met or not."""
    rows: list[list[Any]] = []
    for group in found:
        setting = group[0]["setting"]
        name = f"{setting['data']}, {setting['tokenizer']}"
        if setting["data"] in TEACHERS:
            scores = [_number(r, row, "ndcg_10") for r, row in method_rows(group, "teacher")]
            mean, least = statistics.mean(scores), TEACHERS[setting["data"]]
            rows.append(
                [f"{name}: teacher's NDCG@10", f"{least:.4f}", f"{mean:.4f}", mean >= least]
            )
        for method, least in SHARES.items():
            own = method_rows(group, method)
            if own:
                mean = statistics.mean(_number(r, w, "recovery", "ndcg_10") for r, w in own)
                label = METHODS[method][0]
                goal, got = f"{least:.1%}", f"{mean:.2%}"
                rows.append([f"{name}: {label}, of the teacher", goal, got, mean >= least])
        rows += [_parity(group, name, *pair) for pair in PARITY if method_rows(group, pair[0])]
    cells = [[*row[:3], "met" if row[3] else "**missed**"] for row in rows]
    return markdown(["goal", "target", "measured", ""], cells)


def _parity(
    group: Sequence[Report], name: str, method: str, kernel: str, reference: str
) -> list[Any]:
    """The fp32 kernel's metrics against the reference's, to four decimals, in every seed."""
    worst = 0.0
    differ = 0
    for report in group:
        pair = []
        for wanted in (kernel, reference):
            row = next((r for r in _field(report, "results") if r["method"] == wanted), None)
            if row is None:
                raise ValueError(f"{name_of(report)}: expected results of {wanted}, got none")
            pair.append(row)
        for metric in METRICS:
            values = [_number(report, row, metric) for row in pair]
            worst = max(worst, abs(values[0] - values[1]))
        differ += _field(report, "users_that_differ", kernel, "users")
    return [
        f"{name}: {METHODS[method][0]}, kernel against reference, fp32, all metrics",
        "< 0.00005",
        f"{worst:.2g}; {differ} users differ",
        worst < 0.00005,
    ]


def _of(
    group: Sequence[Report], own: Sequence[tuple[Report, Row]], method: str
) -> Sequence[tuple[Report, Row]]:
    return own if method in RECOVERING else ()


def _wanted(report: Report, stage: str) -> str:
    """A stage's arguments without its seed."""
    return re.sub(r"--seed \d+", "", str(_field(report, "stages", stage, "wanted")))


def _where(report: Report, stage: str) -> dict[str, str]:
    found = _field(report, "stages", stage, "where")
    return {key: found[key] for key in ("gpu", "cpu", "torch", "commit")}


def _same(first: Report, other: Report, what: str, value: Callable[[Report], Any]) -> None:
    if value(first) != value(other):
        raise ValueError(
            f"{name_of(other)}: expected the {what} of {name_of(first)}, {value(first)!r}, got "
            f"{value(other)!r}; run it again with the same settings"
        )


def _number(report: Report, row: Row, *path: str) -> float:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or value != value:
        raise ValueError(
            f"{name_of(report)}: expected {'.'.join(path)} of {row['method']}, got {value!r}; run "
            "benchmarks/quality.py with its stages evaluate and speed"
        )
    return float(value)


def _field(report: Report, *path: str) -> Any:
    value: Any = report
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"{name_of(report)}: expected {'.'.join(path)}, got none; run "
                "benchmarks/quality.py again"
            )
        value = value[key]
    return value
