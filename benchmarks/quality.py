"""How good students are on real data: tokenizer, teacher, student, student++, rescoring, measured.

    python benchmarks/quality.py --data ../shared/data/amazon14_beauty --tokenizer rkmeans3_dedup \\
        --seeds 0,1,2 --work runs/quality

One experiment is a data set, a tokenizer and a seed; its stages are tokenize, teacher, student,
plus, evaluate and speed, and what is finished is not done again. Validation chooses, the test items
are looked at by evaluate alone. Each experiment with an evaluation leaves
results/quality-<data>-<tokenizer>-seed<n>.json, from which quality_tables.py makes tables.

Between machines: --state DIR is read before, and written after every stage: what is finished, in
parts under 16 MiB (--progress: trainings under way too). --seconds ends the whole call in
time, --stage-seconds one stage; the exit status is then 3, and the same command goes on. The
reference goes from request to request and is no faster on a GPU: --methods leaves it out there, and
a later call with --device cpu adds it, with --jobs by several processes of one thread each. Of
several seeds it is enough to time one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quality_answers
import quality_stages
from bench_arguments import words
from common import RESULTS, gpu_facts, machine_facts, write_json
from quality_settings import DEFAULTS, STAGES, Experiment, arguments_of, check_arguments
from quality_state import pack, unpack

from sidmlp.cli.shared_run import student_run
from sidmlp.data.files import read_json

NOT_FINISHED = 3
LEAST_SECONDS = 10.0  # less than that is not worth beginning a stage


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when all stages are finished, 3 when time was up, 1 for a mistake."""
    args = parser().parse_args(arguments)
    began = time.monotonic()
    try:
        stages = tuple(words(args.stages))
        wrong = [stage for stage in stages if stage not in STAGES]
        if wrong or not stages:
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}, got {args.stages!r}")
        for experiment in experiments(args, stages):
            if not run_experiment(experiment, stages, args, began):
                return NOT_FINISHED
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--data", type=Path, required=True, help="directory with sequences.npz")
    add("--tokenizer", required=True, help="rqvae, opq, rkmeans, or a variant of semantic_ids.npz")
    add("--seeds", default="0", metavar="N,N,..", help="one experiment each")
    add("--stages", default=",".join(STAGES), help="which, in this order: " + ",".join(STAGES))
    add("--work", type=Path, default=Path("runs/quality"), help="run directories")
    add("--state", type=Path, help="bundles to go on from and to leave")
    add("--progress", action="store_true", help="bundle trainings that are under way, too")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    for stage, text in DEFAULTS.items():
        also = "; {student}: the student's run directory" if stage == "plus" else ""
        add(f"--{stage}", default="", metavar="ARGS", help=f"after the default: {text}{also}")
    add("--training", default="", metavar="ARGS", help="for teacher, student and plus alike")
    add("--beams", type=int, default=50)
    add("--users", type=int, help="a sample of test users; all by default")
    add("--methods", help="evaluate asks these alone, and is finished by a call that asks all")
    add("--device", default="auto", help="of evaluation: cpu, cuda or auto")
    add("--jobs", type=int, default=1, help="processes of a reference, with --device cpu")
    add("--batch", type=int, default=512, help="users of a call when timing")
    add("--speed-seconds", type=float, default=3.0, help="to time each method")
    add("--commit", help="what is measured, where the tree is no git checkout")
    add("--seconds", type=float, help="for the whole call")
    add("--stage-seconds", default="", metavar="STAGE=S,..", help="for single stages of a call")
    return made


def experiments(args: argparse.Namespace, stages: Sequence[str]) -> list[Experiment]:
    """One per seed; all arguments are checked first."""
    if not (args.data / "sequences.npz").is_file():
        raise ValueError(f"data: expected a directory with sequences.npz, got {args.data}")
    limits(args)
    if args.beams < quality_answers.K:
        raise ValueError(f"beams: expected at least {quality_answers.K}, got {args.beams}")
    if args.jobs < 1 or (args.jobs > 1 and args.device != "cpu"):
        raise ValueError(
            f"jobs: expected at least 1, and more than 1 with --device cpu alone, got {args.jobs} "
            f"with --device {args.device}"
        )
    methods = None if args.methods is None else tuple(words(args.methods))
    known = (*quality_answers.METHODS, *quality_answers.METHODS_PLUS)
    if methods is not None and not set(methods) <= set(known):
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {args.methods!r}")
    found = []
    for seed in map(int, words(args.seeds)):
        more = {stage: getattr(args, stage) for stage in DEFAULTS}
        for stage in ("teacher", "student", "plus"):
            more[stage] = f"{args.training} {more[stage]}"
        own = arguments_of(args.data, args.tokenizer, seed, more)
        check_arguments(own, stages)
        found.append(
            Experiment(
                data=args.data,
                tokenizer=args.tokenizer,
                seed=seed,
                work=args.work,
                arguments=own,
                beams=args.beams,
                users=args.users,
                device=args.device,
                jobs=args.jobs,
                batch=args.batch,
                seconds_per_method=args.speed_seconds,
                commit=args.commit,
                methods=methods,
                say=lambda line: print(line, flush=True),
            )
        )
    return found


def limits(args: argparse.Namespace) -> dict[str, float]:
    """--stage-seconds by stage."""
    found = {}
    for word in words(args.stage_seconds):
        stage, _, seconds = word.partition("=")
        try:
            found[stage] = float(seconds)
        except ValueError:
            found[stage] = -1.0
        if stage not in STAGES or found[stage] <= 0:
            raise ValueError(f"stage-seconds: expected STAGE=SECONDS, got {word!r}")
    return found


def run_experiment(
    experiment: Experiment, stages: Sequence[str], args: argparse.Namespace, began: float
) -> bool:
    """All chosen stages of one experiment, and its JSON; False where time was up."""
    run = experiment.run
    if args.state is not None and not run.path.exists():
        unpack(args.state, experiment.name, run.path)
    quality_stages.ensure_data(experiment)
    if (experiment.plus.path / "distill.json").is_file():
        student_run(run, experiment.plus.path, share_features=False)
    for stage in [stage for stage in STAGES if stage in stages]:
        seconds = limits(args).get(stage)
        if args.seconds is not None:
            left = args.seconds - (time.monotonic() - began)
            if left < LEAST_SECONDS:
                experiment.say(f"{experiment.name}: {left:.0f} s are left, {stage} is not begun")
                return False
            seconds = left if seconds is None else min(left, seconds)
        complete = quality_stages.run_stage(stage, experiment, seconds)
        if args.state is not None:
            pack(run.path, args.state, experiment.name, progress=args.progress)
        if not complete:
            return False
        if stage in ("evaluate", "speed") and quality_answers.answers(run):
            path = args.out / f"quality-{experiment.name}.json"
            write_json(path, report(experiment))
            experiment.say(str(path))
    return True


def report(experiment: Experiment) -> dict[str, Any]:
    """The experiment's JSON: what was asked for, on what machines, and what came out."""
    run, marks = experiment.run, quality_stages.finished(experiment)
    ranks, answers = quality_answers.current_ranks(experiment), quality_answers.answers(run)
    speed = read_json(run.path / "speed.json")["speed"] if "speed" in marks else {}
    rows = quality_answers.measured(ranks)
    for row in rows:
        row["note"] = answers[row["method"]]["note"]
        timed = speed.get(row["method"])
        if timed is not None:
            row |= {"users_per_s": timed["users_per_s"], "how": timed["how"]}
    pairs = dict.fromkeys(("kernel", quality_answers.EXACT), "reference")
    plus = (quality_answers.PLUS, quality_answers.EXACT_PLUS)
    pairs |= dict.fromkeys(plus, quality_answers.REFERENCE_PLUS)
    tokens = run.require("tokenize")
    hidden = ("fingerprint", "from")
    return {
        "kind": "quality",
        "complete": quality_answers.methods_of(experiment) <= set(ranks),
        "machine": {**machine_facts(), **({"commit": own} if (own := experiment.commit) else {})},
        "gpus": [gpu["name"] for gpu in gpu_facts()],
        "setting": {
            "data": experiment.data.name,
            "tokenizer": experiment.tokenizer,
            "seed": experiment.seed,
            "split": "test",
            "users": len(next(iter(ranks.values()))),
            "sampled": experiment.users is not None,
            "beams": experiment.beams,
            "bootstrap": f"{quality_answers.RESAMPLES} samples of users, "
            f"{quality_answers.LEVEL:.0%} intervals",
            "codes": {key: value for key, value in tokens.items() if key not in hidden},
        },
        "stages": marks,
        "training": trainings(experiment, marks),
        "users_that_differ": {
            name: {
                "from": other,
                "users": quality_answers.users_that_differ(ranks[name], ranks[other]),
            }
            for name, other in pairs.items()
            if name in ranks and other in ranks
        },
        "results": rows,
    }


def trainings(experiment: Experiment, marks: dict[str, Any]) -> dict[str, Any]:
    """What validation said of teacher, student and student++."""
    records = {"teacher": (experiment.run, "train-teacher"), "student": (experiment.run, "distill")}
    records["plus"] = (experiment.plus, "distill")
    keys = ("validation_ndcg@10", "best_epoch", "epochs")
    return {
        stage: {key: run.require(command)[key] for key in keys}
        for stage, (run, command) in records.items()
        if stage in marks
    }


if __name__ == "__main__":
    sys.exit(main())
