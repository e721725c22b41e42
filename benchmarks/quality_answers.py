"""What every method recommends to every test user, kept as the rank of the right item.

ranks.npz: method -> uint8 [users], 0-based rank of the user's target among the first ten items, 10
where it is not among them; answers.json says from which models each was made. All metrics, and how
sure they are, follow from these ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from quality_jobs import ask_in_processes
from quality_settings import Experiment
from torch import Tensor

from sidmlp.cli.artifacts import load_data
from sidmlp.cli.evaluate import RESCORE, ask
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.data import leave_last_out
from sidmlp.data.files import read_json, write_atomically, write_json
from sidmlp.evaluate import Questions
from sidmlp.metrics import target_ranks
from sidmlp.training import Execution

K = 10
PLUS = "student++"
# A GPU's kernels run in bfloat16 unless told otherwise; these show what that does.
EXACT, EXACT_PLUS = "kernel-float32", "student++-float32"
REFERENCE_PLUS, RESCORE_PLUS = "reference++", "rescore++"
METHODS = ("popularity", "teacher", "teacher-unconstrained", "reference", "kernel", EXACT, RESCORE)
METHODS_PLUS = (REFERENCE_PLUS, PLUS, EXACT_PLUS, RESCORE_PLUS)
MODELS = ("train-teacher", "distill")
# How many of the things that an answer is made from are models, or the data; they come last.
_MODELS_OF = dict.fromkeys((*METHODS, *METHODS_PLUS), 2)
_MODELS_OF |= {"popularity": 1, "teacher": 1, "teacher-unconstrained": 1}
SAMPLE_SEED = 0  # one sample for every experiment's seed, so that these differ by training alone
RESAMPLES = 1000
LEVEL = 0.95
METRICS = ("recall_5", "ndcg_5", "recall_10", "ndcg_10")


def answer_all(experiment: Experiment, plus: RunDirectory | None) -> None:
    """Asks every method that has not answered yet, of experiment.methods if given, and keeps each
    answer at once."""
    run = experiment.run
    questions = Questions.of(leave_last_out(load_data(run)).test).sample(
        experiment.users, SAMPLE_SEED
    )
    made_from = _made_from(experiment, plus, len(questions.targets))
    asked = _methods(experiment, plus, questions)
    kept = answers(run)
    for method, facts in kept.items():
        _check_asked_alike(experiment, method, facts["made_from"], made_from[method])
    for method, recommend in asked.items():
        if experiment.methods is not None and method not in experiment.methods:
            continue
        if method in kept and kept[method]["made_from"] == made_from[method]:
            continue
        experiment.say(f"{experiment.name}: {method}")
        items, note = recommend()
        ranks = target_ranks(items.cpu(), questions.targets, K).to(torch.uint8).numpy()
        _keep(run, method, ranks, {"made_from": made_from[method], "note": note})
    _forget(run, [method for method in answers(run) if method not in asked])
    names = {name: name for name in METHODS}
    _write_evaluation(run, run, experiment, names)
    if plus is not None:
        own = {REFERENCE_PLUS: "reference", PLUS: "kernel", RESCORE_PLUS: RESCORE}
        _write_evaluation(run, plus, experiment, own)


def methods_of(experiment: Experiment) -> set[str]:
    """All that there are for its students."""
    has_plus = (experiment.plus.path / "distill.json").is_file()
    return {*METHODS, *(METHODS_PLUS if has_plus else ())}


def answers(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Method -> {"made_from", "note"} of all that have answered."""
    path = run.path / "answers.json"
    return read_json(path) if path.is_file() else {}


def ranks_of(run: RunDirectory) -> dict[str, np.ndarray]:
    """Method -> uint8 [users]."""
    path = run.path / "ranks.npz"
    if not path.is_file():
        return {}
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def current_ranks(experiment: Experiment) -> dict[str, np.ndarray]:
    """``ranks_of`` the models that there are now: answers of earlier ones are left out."""
    run = experiment.run
    ranks, facts = ranks_of(run), answers(run)
    if not ranks:
        return {}
    plus = experiment.plus if (experiment.plus.path / "distill.json").is_file() else None
    now = _made_from(experiment, plus, len(next(iter(ranks.values()))))
    models = {name: facts[name]["made_from"][-_MODELS_OF[name] :] for name in ranks}
    return {
        name: values
        for name, values in ranks.items()
        if name in now and models[name] == now[name][-_MODELS_OF[name] :]
    }


def per_user(ranks: np.ndarray) -> np.ndarray:
    """float64 [users, 4] in the order of METRICS, of ranks uint8 [users]."""
    gain = 1 / np.log2(ranks.astype(np.float64) + 2)
    return np.stack([ranks < 5, gain * (ranks < 5), ranks < 10, gain * (ranks < 10)], axis=1)


def measured(ranks: dict[str, np.ndarray], teacher: str = "teacher") -> list[dict[str, Any]]:
    """Of each method its METRICS, their intervals, and its share of the teacher's with intervals.

    Intervals hold LEVEL of RESAMPLES bootstrap samples of users, the same samples for all methods.
    A metric of which the teacher has nothing has no share.
    """
    names = list(ranks)
    values = np.stack([per_user(ranks[name]) for name in names])  # [methods, users, 4]
    samples = _bootstrap(values)  # [RESAMPLES, methods, 4]
    means = values.mean(1)
    rows = []
    for number, name in enumerate(names):
        row: dict[str, Any] = {
            "method": name,
            **dict(zip(METRICS, means[number].tolist(), strict=True)),
            "interval": _intervals(samples[:, number]),
        }
        if name not in ("popularity", teacher) and teacher in names:
            base = names.index(teacher)
            with np.errstate(divide="ignore", invalid="ignore"):
                share, spread = means[number] / means[base], samples[:, number] / samples[:, base]
            known = [metric for c, metric in enumerate(METRICS) if np.isfinite(share[c])]
            found = _intervals(spread)
            row["recovery"] = {m: float(share[METRICS.index(m)]) for m in known}
            row["recovery_interval"] = {m: found[m] for m in known if m in found}
        rows.append(row)
    return rows


def users_that_differ(left: np.ndarray, right: np.ndarray) -> int:
    """Users whose target has another rank."""
    return int((left != right).sum())


def _bootstrap(values: np.ndarray) -> np.ndarray:
    methods, users, metrics = values.shape
    flat = values.transpose(1, 0, 2).reshape(users, -1)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, users, users), minlength=users)
        rows.append(times @ flat / users)
    return np.stack(rows).reshape(-1, methods, metrics)


def _intervals(samples: np.ndarray) -> dict[str, list[float]]:
    """METRIC -> [low, high] of samples [RESAMPLES, 4]; without those that are not finite."""
    tail = (1 - LEVEL) / 2
    return {
        metric: np.quantile(samples[:, column], [tail, 1 - tail]).tolist()
        for column, metric in enumerate(METRICS)
        if np.isfinite(samples[:, column]).all()
    }


def _methods(
    experiment: Experiment, plus: RunDirectory | None, questions: Questions
) -> dict[str, Callable[[], tuple[Tensor, str]]]:
    """How each method is asked."""
    # Models are judged in fp32; kernels as they are served, too.
    exact = Execution.choose(experiment.device, "fp32")
    served = Execution.choose(experiment.device)

    def asked(run: RunDirectory, name: str, how: Execution) -> Callable[[], tuple[Tensor, str]]:
        return partial(ask, run, name, questions, experiment.beams, how)

    def by_reference(run: RunDirectory) -> Callable[[], tuple[Tensor, str]]:
        given = (run, "reference", questions, experiment.beams, exact, experiment.jobs)
        return partial(ask_in_processes, *given)

    run = experiment.run
    names = ("popularity", "teacher", "teacher-unconstrained")
    found = {name: asked(run, name, exact) for name in names}
    found["reference"] = by_reference(run)
    found |= {"kernel": asked(run, "kernel", served), EXACT: asked(run, "kernel", exact)}
    found[RESCORE] = asked(run, RESCORE, served)
    if plus is not None:
        found[REFERENCE_PLUS] = by_reference(plus)
        found |= {PLUS: asked(plus, "kernel", served), EXACT_PLUS: asked(plus, "kernel", exact)}
        found[RESCORE_PLUS] = asked(plus, RESCORE, served)
    return found


def _made_from(
    experiment: Experiment, plus: RunDirectory | None, users: int
) -> dict[str, list[Any]]:
    """What each method's answer depends on."""
    run = experiment.run
    data = run.require("data")["fingerprint"]
    teacher, student = (run.require(name)["fingerprint"] for name in ("train-teacher", "distill"))
    # On another device the kernels' numbers have another format.
    asked = [users, experiment.beams, Execution.choose(experiment.device).device.type]
    found: dict[str, list[Any]] = {name: [*asked, teacher, student] for name in METHODS}
    found["popularity"] = [users, data]
    found["teacher"] = found["teacher-unconstrained"] = [*asked, teacher]
    if plus is not None:
        own = plus.require("distill")["fingerprint"]
        found |= {name: [*asked, teacher, own] for name in METHODS_PLUS}
    return found


def _write_evaluation(
    run: RunDirectory, of: RunDirectory, experiment: Experiment, names: dict[str, str]
) -> None:
    """evaluate.json as `sidmlp evaluate` leaves it, for `sidmlp report`; names: ours -> there."""
    ranks, facts = ranks_of(run), answers(run)
    quality = {}
    for method, name in names.items():
        if method not in ranks:
            continue
        values = per_user(ranks[method]).mean(0).tolist()
        quality[name] = {**dict(zip(METRICS, values, strict=True)), "note": facts[method]["note"]}
    asked = {"split": "test", "beams": experiment.beams, "users": experiment.users}
    asked |= {"seed": SAMPLE_SEED}
    made_from = {name: of.require(name)["fingerprint"] for name in MODELS}
    write_json(of.path / "evaluate.json", {**asked, "made_from": made_from, "quality": quality})


def _keep(run: RunDirectory, method: str, ranks: np.ndarray, facts: dict[str, Any]) -> None:
    every = {**ranks_of(run), method: ranks}
    write_atomically(run.path / "ranks.npz", lambda path: np.savez_compressed(path, **every))
    write_json(run.path / "answers.json", {**answers(run), method: facts})


def _check_asked_alike(
    experiment: Experiment, method: str, kept: list[Any], wanted: list[Any]
) -> None:
    """ValueError where an answer that is kept is of other users or beams than this call's."""
    for what, old, new in zip(("users", "beams"), kept, wanted, strict=False):
        if isinstance(new, int) and old != new:
            raise ValueError(
                f"{experiment.name}: {method} was asked with {old} {what}, this call asks with "
                f"{new}; use the same, or another --work"
            )


def _forget(run: RunDirectory, methods: list[str]) -> None:
    """Drops answers of models that are there no longer."""
    if methods:
        kept = {name: values for name, values in ranks_of(run).items() if name not in methods}
        write_atomically(run.path / "ranks.npz", lambda path: np.savez_compressed(path, **kept))
        facts = {name: value for name, value in answers(run).items() if name not in methods}
        write_json(run.path / "answers.json", facts)
