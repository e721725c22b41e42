"""Curves and tables of a run: what was trained, how good it became, how fast it is.

Reads what the other commands left in the run directory and writes into report/ inside it
  teacher.png, student.png   loss, validation NDCG@10, learning rate and gradient norm by epoch;
                             encoder.png likewise of a student's own encoder, its score the MSE, and
                             student++.png, student++-encoder.png of --plus
  report.md, report.json     Recall and NDCG of every method that `sidmlp evaluate` measured, its
                             share of the teacher's, and users per second if --speed was given
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_execution_arguments, positive
from .run_directory import RunDirectory, add_run_argument

# Trainings: name -> the command that leaves the record.
TRAININGS = {"teacher": "train-teacher", "student": "distill"}
SPEED = "speed.json"
# A second run directory's student, in the table of the first.
PLUS = "student++"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    add = parser.add_argument
    add(
        "--plus",
        type=Path,
        metavar="DIR",
        help="run directory of a student++ of the same data, evaluated alike, for a row and "
        "curves of its own",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: report, inside the run directory)",
    )
    group = parser.add_argument_group("users per second")
    group.add_argument(
        "--speed",
        action="store_true",
        help="measure them now; without it those of an earlier --speed are reported",
    )
    group.add_argument("--batch", type=positive, default=128, help="users of a call when timing")
    group.add_argument(
        "--seconds", type=float, default=5.0, help="how long to time each method, about"
    )
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from sidmlp.data.files import write_atomically, write_json
    from sidmlp.reporting.curves import draw_curves
    from sidmlp.reporting.summary import notes, summary_of, table

    directory = RunDirectory(options.run)
    if not directory.path.is_dir():
        raise ValueError(f"{directory.path} is no run directory; run `sidmlp data` first")
    evaluation = evaluated(directory)
    quality = dict(evaluation["quality"])
    trained = trainings(directory)
    if options.plus is not None:
        plus = RunDirectory(options.plus)
        quality[PLUS] = quality_of_plus(directory, plus, evaluation)
        own = trainings(plus)
        if "student" in own:  # not one that was imported
            trained[PLUS] = own["student"]
        if "encoder" in own:
            trained[f"{PLUS}-encoder"] = own["encoder"]
    out = options.out or directory.path / "report"
    if options.speed:
        from .evaluate import made_of_plus
        from .loop_options import execution_of
        from .speed import measure_speed

        timing = (evaluation["beams"], options.batch, options.seconds)
        measured = measure_speed(
            directory,
            tuple(quality),
            *timing,
            plus=options.plus,
            execution=execution_of(options),
        )
        found = {"made_from": directory.fingerprints(), **made_of_plus(options.plus)}
        found["speed"] = measured
        write_json(directory.path / SPEED, found)
    about = {
        "split": evaluation["split"],
        "beams": evaluation["beams"],
        "users": evaluation["users"],
        "training": {
            name: {key: value for key, value in record.items() if key != "curve"}
            for name, record in trained.items()
        },
    }
    summary = summary_of(quality, speeds(directory), about)
    for name, record in trained.items():
        shown = (record["curve"], record["best_epoch"], record["measure"])
        draw_curves(out / f"{name}.png", name, *shown)
    text = table(summary)
    page = page_of(directory, summary, text, notes(summary), list(trained))
    write_json(out / "report.json", summary)
    write_atomically(out / "report.md", lambda path: _write(path, page))
    print(text)
    print(f"written to {out}")


def evaluated(directory: RunDirectory) -> dict[str, Any]:
    """What `sidmlp evaluate` left; ValueError where that is nothing, damaged or outdated."""
    from sidmlp.data.files import read_json
    from sidmlp.reporting.summary import check_quality

    path = directory.path / "evaluate.json"
    again = f"run `sidmlp evaluate --run {directory.path}`"
    if not path.is_file():
        raise ValueError(f"{directory.path} has no result of `sidmlp evaluate` yet; {again}")
    found = read_json(path)
    missing = [key for key in ("split", "beams", "quality", "made_from") if key not in found]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}; {again} again")
    check_made_from(directory, found["made_from"], str(path), again)
    check_plus(found, str(path), f"{again} with --plus")
    check_quality(found["quality"], str(path))
    # A seed chooses a sample of users and says nothing where all were asked.
    return {"users": None, **found, "seed": found.get("seed") if found.get("users") else None}


def check_made_from(
    directory: RunDirectory, made_from: dict[str, str], what: str, remedy: str
) -> None:
    """Raises ValueError where a step of the run was done anew after ``what`` was measured."""
    now = directory.fingerprints()
    for command, fingerprint in made_from.items():
        if now.get(command) != fingerprint:
            raise ValueError(
                f"{what} was measured before `sidmlp {command}` ran last; {remedy} again"
            )


def check_plus(found: dict[str, Any], what: str, remedy: str) -> None:
    """Raises ValueError where a further student was trained anew after it was measured."""
    if "plus" in found:
        plus = found["plus"]
        check_made_from(RunDirectory(Path(plus["directory"])), plus["made_from"], what, remedy)


def quality_of_plus(
    directory: RunDirectory, plus: RunDirectory, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """The kernel's row of the other run, which must have answered the same questions."""
    other = evaluated(plus)
    same = ("split", "beams", "users", "seed")
    wrong = [key for key in same if other[key] != evaluation[key]]
    data = [run.require("data")["fingerprint"] for run in (directory, plus)]
    if wrong or data[0] != data[1]:
        what = wrong[0] if wrong else "data"
        raise ValueError(
            f"{plus.path} was evaluated on other {what} than {directory.path}; evaluate both alike"
        )
    if "kernel" not in other["quality"]:
        raise ValueError(
            f"{plus.path}: the kernel was not measured; run `sidmlp evaluate --run {plus.path}`"
        )
    return other["quality"]["kernel"]


def trainings(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    """Of every training of the run: epochs, best one, its score, and the curve.

    A model that came from elsewhere has none and is left out.
    """
    found = {}
    for name, command in TRAININGS.items():
        record = directory.require(command)
        if "history" in record:
            found[name] = training(directory, name, record, "NDCG@10")
        if "encoder_training" in record:
            found["encoder"] = training(directory, "encoder", record["encoder_training"], "MSE")
    return found


def training(
    directory: RunDirectory, name: str, record: dict[str, Any], measure: str
) -> dict[str, Any]:
    """One of them: numbers of its log where that belongs to it, else those of its record, which
    knows loss and score alone."""
    from sidmlp.reporting import read_log

    curve = read_log(directory.log(name))
    known = [(facts["epoch"], facts["loss"]) for facts in record["history"]]
    if [(facts.get("epoch"), facts.get("loss")) for facts in curve] != known:
        curve = record["history"]
    seconds = [facts["seconds"] for facts in curve if "seconds" in facts]
    best = f"validation_{measure.lower()}"
    return {
        "measure": measure,
        best: record[best],
        "best_epoch": record["best_epoch"],
        "epochs": record["epochs"],
        "seconds": sum(seconds) if len(seconds) == len(curve) else None,
        "curve": curve,
    }


def speeds(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    """What --speed measured; empty where it did not."""
    from sidmlp.data.files import read_json

    path = directory.path / SPEED
    if not path.is_file():
        return {}
    found = read_json(path)
    if not {"made_from", "speed"} <= set(found):
        raise ValueError(f"{path} does not say what was measured; delete it and run --speed again")
    remedy = f"run `sidmlp report --speed --run {directory.path}`"
    check_made_from(directory, found["made_from"], str(path), remedy)
    check_plus(found, str(path), f"{remedy} with --plus")
    return found["speed"]


def page_of(
    directory: RunDirectory,
    summary: dict[str, Any],
    text: str,
    sentences: list[str],
    pictures: list[str],
) -> str:
    """The Markdown page."""
    users = summary["users"] or "all"
    lines = [
        f"# {directory.path.name}",
        "",
        f"The {summary['split']} item of {users} users, {summary['beams']} beams.",
        "",
        text,
        "",
        *(f"{sentence}\n" for sentence in sentences),
    ]
    for name in pictures:
        facts = summary["training"][name]
        measure = facts["measure"]
        score = f"{facts[f'validation_{measure.lower()}']:.{5 if measure == 'MSE' else 4}f}"
        took = "" if facts["seconds"] is None else f", {facts['seconds']:,.0f} s"
        lines += [
            f"## {name}",
            "",
            f"Best validation {measure} {score} in epoch "
            f"{facts['best_epoch']} of {facts['epochs']}{took}.",
            "",
            f"![{name}]({name}.png)",
            "",
        ]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
