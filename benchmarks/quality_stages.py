"""The stages of quality.py: each a command of `sidmlp` called in this process, or a measurement.

A stage that is finished leaves its mark in stages.json of the run directory: with which arguments,
in how many seconds, on what machine. Later calls skip it; other arguments are refused. Weights of
finished stages are rounded to float16 first, so that what is measured is what is kept.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quality_answers
import torch
from common import commit, cpu_name
from quality_settings import TRAINED, Experiment, command_options
from quality_state import halve_weights

from sidmlp.cli.run_directory import RunDirectory
from sidmlp.cli.shared_run import student_run
from sidmlp.cli.speed import measure_speed
from sidmlp.data.files import read_json, sha256_of_file, write_json
from sidmlp.training import Execution


class TimeUp(Exception):
    """A stage has had its time; what it has done so far is kept."""


def run_stage(stage: str, experiment: Experiment, seconds: float | None) -> bool:
    """Runs one stage unless it is finished; False where its time was not enough.

    Raises ValueError where it was finished with other arguments, or cannot run.
    """
    wanted = _wanted(stage, experiment)
    done = finished(experiment).get(stage)
    if done is not None and done["made_from"] == _made_from(stage, experiment):
        if done["wanted"] != wanted:
            raise ValueError(
                f"{experiment.name}: {stage} was finished with {done['wanted']}, this call has "
                f"{wanted}; use the same, or another --work"
            )
        experiment.say(f"{experiment.name}: {stage} was finished earlier")
        return True
    begin = time.perf_counter()
    try:
        with time_limit(seconds):
            STAGE[stage](experiment)
    except TimeUp:
        _mark(experiment, stage, "seconds_before", time.perf_counter() - begin)
        experiment.say(f"{experiment.name}: {stage} is not finished after {seconds:.0f} s")
        return False
    taken = time.perf_counter() - begin
    before = read_json(_marks(experiment)).get("seconds_before", {}).get(stage, 0.0)
    if stage == "evaluate" and experiment.methods is not None:
        experiment.say(f"{experiment.name}: {', '.join(experiment.methods)} asked, {taken:.0f} s")
        _mark(experiment, stage, "seconds_before", taken)
        return True  # others are yet to be asked
    entry = {
        "wanted": wanted,
        "made_from": _made_from(stage, experiment),
        "seconds": round(taken + before, 1),
        "where": where(experiment),
    }
    _mark(experiment, stage, "stages", entry)
    experiment.say(f"{experiment.name}: {stage} finished, {taken:.0f} s")
    return True


def finished(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Stage -> its mark, of all that have been finished."""
    path = _marks(experiment)
    if not path.is_file():
        write_json(path, {"stages": {}, "seconds_before": {}})
    return read_json(path)["stages"]


def where(experiment: Experiment) -> dict[str, str]:
    """The machine and the build that a stage ran on."""
    built = experiment.commit or commit()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "cpu": cpu_name(), "torch": torch.__version__, "commit": built}


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeUp inside the block after so many seconds; None, or 0 and less, is no limit.

    By a signal, so only in the main thread, and a call of C++ ends first. Files are safe: the
    library writes them whole or not at all.
    """
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise TimeUp

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def ensure_data(experiment: Experiment) -> None:
    """The sequences, read anew: they do not travel with the results."""
    if not experiment.run.data.exists():
        _command("data", experiment.run, ["--arrays", str(experiment.data)])


def _command(name: str, run: RunDirectory, arguments: list[str]) -> None:
    options = command_options(name, run.path, arguments)
    options.run_command(options)


def _tokenize(experiment: Experiment) -> None:
    _command("tokenize", experiment.run, experiment.arguments["tokenize"])


def _teacher(experiment: Experiment) -> None:
    run = experiment.run
    _command("train-teacher", run, experiment.arguments["teacher"])
    _round(run, "train-teacher", [run.teacher])
    # Nobody goes on from here, and it is four times as large as the teacher.
    run.teacher_progress.unlink(missing_ok=True)


def _student(experiment: Experiment) -> None:
    _distil(experiment.run, experiment.arguments["student"])


def _plus(experiment: Experiment) -> None:
    plus = student_run(experiment.run, experiment.plus.path, share_features=False)
    own = str(experiment.run.path)
    _distil(plus, [word.replace("{student}", own) for word in experiment.arguments["plus"]])


def _distil(run: RunDirectory, arguments: list[str]) -> None:
    _command("distill", run, arguments)
    _round(run, "distill", [run.student, run.encoder])
    run.restart_student()  # nobody goes on from here


def _round(run: RunDirectory, command: str, paths: list[Path]) -> None:
    """Rounds the weights of a finished training, those that it has, and renews its record."""
    record = run.require(command)
    found = [path for path in paths if path.is_file()]
    for path in found:
        halve_weights(path)
    facts = {key: value for key, value in record.items() if key not in ("fingerprint", "from")}
    run.finish(command, " ".join(sha256_of_file(path) for path in found), **facts)


def ensure_export(run: RunDirectory) -> None:
    """The checkpoint that the kernels read, made anew where it is missing or outdated."""
    try:
        exported: Path | None = run.exported()
    except ValueError:
        exported = None
    if exported is None or not exported.is_dir() or exported != run.checkpoint:
        shutil.rmtree(run.checkpoint, ignore_errors=True)
        _command("export", run, [])


def students(experiment: Experiment) -> list[RunDirectory]:
    """Run directories of the finished students."""
    found = [experiment.run]
    if "plus" in finished(experiment):
        found.append(student_run(experiment.run, experiment.plus.path, share_features=False))
    return found


def _evaluate(experiment: Experiment) -> None:
    runs = students(experiment)
    for run in runs:
        ensure_export(run)
    plus = runs[1] if len(runs) > 1 else None
    quality_answers.answer_all(experiment, plus)


def _speed(experiment: Experiment) -> None:
    runs = students(experiment)
    for run in runs:
        ensure_export(run)
    methods = ["teacher", "teacher-unconstrained", "kernel", "rescore"]
    found = measure_speed(
        experiment.run,
        [*methods, *(["student++"] if len(runs) > 1 else [])],
        experiment.beams,
        experiment.batch,
        experiment.seconds_per_method,
        plus=runs[1].path if len(runs) > 1 else None,
        execution=Execution.choose(experiment.device),
    )
    models = {name: experiment.run.require(name)["fingerprint"] for name in quality_answers.MODELS}
    write_json(experiment.run.path / "speed.json", {"made_from": models, "speed": found})


STAGE: dict[str, Callable[[Experiment], None]] = {
    "tokenize": _tokenize,
    "teacher": _teacher,
    "student": _student,
    "plus": _plus,
    "evaluate": _evaluate,
    "speed": _speed,
}


def _wanted(stage: str, experiment: Experiment) -> str:
    """What decides a stage's result, besides what it is made from."""
    if stage in experiment.arguments:
        data = str(experiment.data)
        words = (word.replace(data, experiment.data.name) for word in experiment.arguments[stage])
        return shlex.join(words)
    if stage == "evaluate":
        return f"{experiment.beams} beams, {experiment.users or 'all'} users"
    return f"{experiment.beams} beams, calls of {experiment.batch} users"


def _made_from(stage: str, experiment: Experiment) -> list[str]:
    """Fingerprints of what a stage reads and leaves; those of missing results are left out."""
    run, plus = experiment.run, experiment.plus
    own = run.fingerprints()
    command = "tokenize" if stage == "tokenize" else TRAINED.get(stage)
    if stage in ("evaluate", "speed"):
        both = [own.get("distill"), plus.fingerprints().get("distill")]
        return [text for text in (own.get("train-teacher"), *both) if text]
    found = (plus if stage == "plus" else run).fingerprints().get(command or "")
    return [found] if found else []


def _marks(experiment: Experiment) -> Path:
    return experiment.run.path / "stages.json"


def _mark(experiment: Experiment, stage: str, key: str, value: Any) -> None:
    marks = read_json(_marks(experiment))
    if key == "seconds_before":
        value = round(value + marks[key].get(stage, 0.0), 1)
    marks[key][stage] = value
    write_json(_marks(experiment), marks)
