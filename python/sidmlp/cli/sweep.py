"""Distil with many settings, one after the other, and say which is best on validation.

  sidmlp sweep --run runs/films --set hidden=128,512,2048 --set alpha=0.5,0.9 --epochs 20
  sidmlp sweep --run runs/films --published

Every option of `sidmlp distill` can be given once, for all runs, or with --set in several values.
Each run is a run directory of its own inside the sweep's, with the same data, codes and teacher; it
can be exported and evaluated as any other. Finished runs are kept and an interrupted one goes on
when the same command runs again. The test items are never looked at.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from . import distill
from .arguments import positive
from .run_directory import RunDirectory
from .sweep_grid import (
    NOT_SETTINGS,
    PUBLISHED,
    SEARCHES,
    Setting,
    combinations,
    label,
    parsed,
    values,
)

SETTING = "setting.json"
SCORE = "validation_ndcg@10"
# These decide which examples the teacher is asked about and how its answers are kept.
OF_FEATURES = ("seed", "max_examples", "feature_dtype", "feature_precision")
# What argparse keeps beside the options.
NOT_VALUES = ("command", "run_command", "training_defaults")
OWN = ("set", "published", "search", "runs", "sweep_seed", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments, those of ``sidmlp distill`` among them."""
    group = parser.add_argument_group("sweep")
    add = group.add_argument
    add(
        "--set",
        type=values,
        action="append",
        metavar="NAME=A,B,..",
        help="an option of `sidmlp distill`, without its dashes, and values to try; may be given "
        "many times",
    )
    add(
        "--published",
        action="store_true",
        help="the paper's widths, and ranges of its other settings: "
        + ", ".join(PUBLISHED)
        + "; --set replaces those of an option",
    )
    add(
        "--search",
        choices=SEARCHES,
        help="grid: every combination; axes: every value alone, the others as given once; random: "
        "--runs of the combinations (default: grid, and axes with --published)",
    )
    add("--runs", type=positive, metavar="N", help="how many combinations --search random takes")
    add(
        "--sweep-seed",
        type=int,
        default=0,
        metavar="N",
        help="which combinations --search random takes",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where runs and table go (default: sweep, inside the run directory)",
    )
    distill.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Runs what is not finished yet; prints and writes the table."""
    from .sweep_table import write_table

    directory = RunDirectory(options.run)
    directory.require("train-teacher")
    settings = chosen_settings(options)
    check_values(directory, settings)
    out = options.out or directory.path / "sweep"
    rows: list[dict[str, Any]] = []
    for number, (setting, own) in enumerate(settings, 1):
        print(f"\n# {number} of {len(settings)}: {label(setting)}", flush=True)
        rows.append({"setting": setting, **one_run(directory, out / label(setting), own, setting)})
        best, text = write_table(out, rows, len(settings))
    print(f"\n{text}")
    if best is None:
        raise ValueError(f"no run of the sweep came to an end; {out}/sweep.md says why")
    chosen = rows[best]
    where = shlex.quote(str(out / label(chosen["setting"])))
    print(f"\nbest on validation: {label(chosen['setting'])}; `sidmlp export --run {where}`")


def chosen_settings(options: argparse.Namespace) -> list[tuple[Setting, argparse.Namespace]]:
    """Each different setting with the options of its ``sidmlp distill``; all checked beforehand."""
    grid = dict(PUBLISHED) if options.published else {}
    asked = options.set or []
    given = [name for name, _ in asked]
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise ValueError(f"--set {twice[0]}: given twice; write all of its values in one --set")
    grid |= dict(asked)
    if options.into is not None:
        raise ValueError("--into: every run of a sweep has a directory of its own; say --out")
    if not grid:
        raise ValueError("nothing to sweep; give --set NAME=A,B,.. or --published")
    search = options.search or ("axes" if options.published else "grid")
    if (search == "random") != (options.runs is not None):
        raise ValueError("--runs and --search random belong together; give both or neither")
    parser = argparse.ArgumentParser(prog="sidmlp distill")
    distill.add_arguments(parser)
    kept = {name: value for name, value in vars(options).items() if name not in OWN}
    common = argparse.Namespace(**kept)
    for name, texts in grid.items():  # every value, also where a random search may skip it
        for text in texts:
            parsed({name: text}, parser, common)
    settings: list[tuple[Setting, argparse.Namespace]] = []
    for setting in combinations(grid, search, options.runs, options.sweep_seed):
        own = parsed(setting, parser, common)
        if all(own != other for _, other in settings):
            settings.append((setting, own))
    return settings


def check_values(
    directory: RunDirectory, settings: list[tuple[Setting, argparse.Namespace]]
) -> None:
    """ValueError for a setting that its training would refuse: not hours later, at its turn."""
    from sidmlp.distill import DistillOptions
    from sidmlp.student import StudentConfig

    from .artifacts import load_teacher
    from .loop_options import execution_of, loop_options

    teacher = load_teacher(directory)
    for setting, own in settings:
        try:
            loop_options(own, execution_of(own))
            DistillOptions(alpha=own.alpha, tau=own.tau)
            StudentConfig(
                codes_per_level=teacher.codes_per_level,
                dim=teacher.dim,
                attention_dim=own.attention or teacher.dim,
                num_heads=own.heads,
                ffn_dim=own.ffn or 4 * teacher.dim,
                hidden_dim=own.hidden,
                embedding_dim=teacher.dim,
                blocks_per_head=own.blocks,
            )
        except ValueError as error:
            raise ValueError(f"{label(setting)}: {error}") from None


def one_run(
    directory: RunDirectory, path: Path, options: argparse.Namespace, setting: Setting
) -> dict[str, Any]:
    """Distils in ``path`` unless that is done; what its record says, or why it failed."""
    from sidmlp.data.files import read_json, write_json
    from sidmlp.reporting import read_log
    from sidmlp.training import TrainingFailed
    from sidmlp.training.loop import LATER_OPTIONS

    from .loop_options import execution_of
    from .shared_run import student_run

    described = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in (*NOT_SETTINGS, *NOT_VALUES)
    }
    # Defaults differ between devices, so runs of one sweep are of one kind.
    described["device"] = execution_of(options).device.type
    varies = any(name.replace("-", "_") in OF_FEATURES for name in setting)
    own = student_run(directory, path, share_features=not varies)
    if (path / SETTING).is_file() and not options.restart:
        earlier = read_json(path / SETTING)
        earlier = {**LATER_OPTIONS, **earlier}
        changed = [name for name in described if described[name] != earlier.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path} was made with {name}={earlier.get(name)!r}, this sweep has "
                f"{described[name]!r}; use the same options, --out for another sweep, or --restart"
            )
    else:
        write_json(path / SETTING, described)
    try:
        record = None if options.restart else own.require("distill")
    except ValueError:  # not finished, or of a teacher that has changed
        record = None
    if record is None:
        try:
            distill.run(argparse.Namespace(**{**vars(options), "run": path}))
        except TrainingFailed as error:
            print(error)
            return {"failed": str(error)}
        record = own.require("distill")
    else:
        print(f"finished earlier: validation NDCG@10 {record[SCORE]:.4f}")
    seconds = [facts.get("seconds", 0.0) for facts in read_log(own.log("student"))]
    facts = {name: record[name] for name in (SCORE, "best_epoch", "epochs")}
    return {**facts, "seconds": round(sum(seconds), 1)}
