"""The final table of a run: how good each method is, its share of the teacher, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import markdown_table

# Methods in the order of the table: name in evaluate.json -> words for people.
METHODS = {
    "popularity": "popularity",
    "teacher": "teacher, constrained to the catalogue",
    "teacher-unconstrained": "teacher, unconstrained",
    "reference": "student, PyTorch reference",
    "kernel": "student, sidmlp_kernels",
    "student++": "student++, sidmlp_kernels",
    "rescore": "student proposes, teacher orders",
}
METRICS = {
    "recall_5": "Recall@5",
    "ndcg_5": "NDCG@5",
    "recall_10": "Recall@10",
    "ndcg_10": "NDCG@10",
}
TEACHER = "teacher"
# Methods whose quality is a share of the teacher's.
RECOVERING = ("reference", "kernel", "student++", "rescore")

Quality = Mapping[str, Mapping[str, Any]]


def check_quality(quality: Quality, where: str) -> None:
    """Raises ValueError where a method lacks a metric, or has one outside [0, 1]."""
    for method, values in quality.items():
        for metric in METRICS:
            value = values.get(metric)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"{where}: {method} has {metric}={value!r}, expected a number from 0 to 1; "
                    "run `sidmlp evaluate` again"
                )


def recovery(quality: Quality) -> dict[str, dict[str, float]]:
    """Per method and metric its share of the constrained teacher's; empty without a teacher.

    A metric of which the teacher has nothing is left out.
    """
    teacher = quality.get(TEACHER, {})
    return {
        method: {
            metric: quality[method][metric] / teacher[metric]
            for metric in METRICS
            if teacher.get(metric)
        }
        for method in RECOVERING
        if method in quality and teacher
    }


def summary_of(
    quality: Quality, speed: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the table says, as JSON.

    quality: method -> METRICS as in evaluate.json; speed: method -> {"users_per_s", ..}; about:
    what was measured, kept as it is.
    """
    return {
        **about,
        "quality": {method: dict(values) for method, values in quality.items()},
        "recovery": recovery(quality),
        "speed": {method: dict(values) for method, values in speed.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table, one row per method."""
    quality, shares, speed = (summary[key] for key in ("quality", "recovery", "speed"))
    order = [method for method in METHODS if method in quality]
    order += [method for method in quality if method not in METHODS]
    header = ["", *METRICS.values(), "of the teacher's NDCG@10", "users/s"]
    rows = []
    for method in order:
        share = shares.get(method, {}).get("ndcg_10")
        users = speed.get(method, {}).get("users_per_s")
        rows.append(
            [
                METHODS.get(method, method),
                *(f"{quality[method][metric]:.4f}" for metric in METRICS),
                "-" if share is None else f"{share:.1%}",
                "-" if users is None else f"{users:,.0f}",
            ]
        )
    return markdown_table(header, rows)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Sentences below the table: a method's own, how times were taken, what is missing."""
    quality, speed = summary["quality"], summary["speed"]
    found = [
        f"{METHODS.get(method, method)}: {values['note']}."
        for method, values in quality.items()
        if values.get("note")
    ]
    settings: dict[str, list[str]] = {}
    for method, values in speed.items():
        if method in quality:
            settings.setdefault(values["how"], []).append(METHODS.get(method, method))
    found += [f"users/s of {'; '.join(who)}: {how}." for how, who in settings.items()]
    missing = [words for method, words in METHODS.items() if method not in quality]
    if missing:
        found.append(f"Not measured: {'; '.join(missing)}.")
    return found
