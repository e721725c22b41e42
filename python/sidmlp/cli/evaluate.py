"""Measure how often the held-out next item of a user is among the recommendations.

Recall@10 is the share of users whose next item is among the first ten; NDCG@10 also rewards a high
place. No method may recommend what the user already had. The methods:
  popularity             the most chosen items, the same for everybody
  teacher                the Transformer under beam search over the catalogue
  teacher-unconstrained  the same without the catalogue: some answers are no item at all
  reference              the student, decoded by plain PyTorch
  kernel                 the exported student, decoded by sidmlp_kernels
With --plus DIR also
  student++              the exported student of another run directory, as `sidmlp distill --encoder
                         mlp --into DIR` makes it, decoded by sidmlp_kernels
With --rescore teacher also
  rescore                the kernel proposes as many items as there are beams, the teacher scores
                         them in one forward and orders them
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_execution_arguments, positive, seed
from .run_directory import RunDirectory, add_run_argument

if TYPE_CHECKING:
    from torch import Tensor

    from sidmlp.evaluate import Questions, Recommend
    from sidmlp.teacher import GenerativeTeacher
    from sidmlp.training import Execution

METHODS = ("popularity", "teacher", "teacher-unconstrained", "reference", "kernel")
RESCORERS = ("teacher",)
RESCORE = "rescore"
PLUS = "student++"
DEFAULT = ("popularity", "teacher", "reference", "kernel")


def methods(text: str) -> tuple[str, ...]:
    """Method names separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, got {name!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_argument(parser)
    add = parser.add_argument
    add(
        "--methods",
        type=methods,
        default=DEFAULT,
        metavar="NAME,NAME,..",
        help="what to measure",
    )
    add("--beams", type=positive, default=50, help="candidates kept per level")
    add("--users", type=positive, metavar="N", help="a random sample of users (default: all)")
    add("--split", choices=("test", "validation"), default="test", help="which held-out item")
    add(
        "--rescore",
        choices=RESCORERS,
        help="measure its order of the kernel's items, beside both alone (default: nobody's)",
    )
    add("--plus", type=Path, metavar="DIR", help="run directory of a further student to measure")
    add("--seed", type=seed, default=0, help="start of all random numbers")
    add_execution_arguments(parser, precision="fp32")


def run(options: argparse.Namespace) -> None:
    """Measures and prints a table; also written to evaluate.json."""
    from sidmlp.data.files import write_json
    from sidmlp.evaluate import format_table

    from .loop_options import execution_of

    directory = RunDirectory(options.run)
    names = options.methods
    if options.plus is not None:
        names += (PLUS,)
    if options.rescore:
        names += tuple(name for name in ("teacher", "kernel") if name not in names)
        names += (RESCORE,)
    found = measure(
        directory,
        names,
        options.beams,
        options.split,
        options.users,
        options.seed,
        execution_of(options),
        plus=None if options.plus is None else RunDirectory(options.plus),
    )
    write_json(
        directory.path / "evaluate.json",
        {
            "split": options.split,
            "beams": options.beams,
            "users": options.users,
            "seed": options.seed,
            "made_from": directory.fingerprints(),
            **made_of_plus(options.plus),
            "quality": found,
        },
    )
    header = ("", "Recall@5", "NDCG@5", "Recall@10", "NDCG@10", "")
    rows = [
        (name, *(f"{values[key]:.4f}" for key in QUALITY), values.get("note", ""))
        for name, values in found.items()
    ]
    print(format_table(header, rows))


QUALITY = ("recall_5", "ndcg_5", "recall_10", "ndcg_10")


def made_of_plus(plus: Path | None) -> dict[str, Any]:
    """Which further student was measured: its run directory and what that had then."""
    if plus is None:
        return {}
    made_from = RunDirectory(plus).fingerprints()
    return {"plus": {"directory": str(plus.resolve()), "made_from": made_from}}


def measure(
    directory: RunDirectory,
    names: tuple[str, ...],
    beams: int,
    split_name: str = "test",
    users: int | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    plus: RunDirectory | None = None,
) -> dict[str, dict[str, Any]]:
    """Per method its Quality as a dict, and a note where there is something to say.

    execution: of teacher, reference and kernel; fp32 on the CPU by default. plus: where the
    student++ is. Raises ValueError where that is not exported, or of other data.
    """
    from sidmlp.data import leave_last_out
    from sidmlp.evaluate import Quality, Questions
    from sidmlp.training import Execution

    from .artifacts import load_data

    if beams < 10:
        raise ValueError(f"--beams must be at least 10, as ten items are scored, got {beams}")
    execution = execution or Execution()
    if plus is not None:
        both = [run.require("data")["fingerprint"] for run in (directory, plus)]
        if both[0] != both[1]:
            raise ValueError(f"{plus.path} is of other data than {directory.path}")
        plus.require("export")
    split = leave_last_out(load_data(directory))
    examples = split.test if split_name == "test" else split.validation
    questions = Questions.of(examples).sample(users, seed)
    answers = {}
    for name in names:
        asked = (directory, name)
        if name == PLUS:
            assert plus is not None
            asked = (plus, "kernel")
        items, note = ask(*asked, questions, beams, execution)
        quality = asdict(Quality.of(items, questions.targets))
        answers[name] = quality | ({"note": note} if note else {})
    return answers


def ask(
    directory: RunDirectory, name: str, questions: Questions, beams: int, execution: Execution
) -> tuple[Tensor, str]:
    """What a method recommends, int64 [n, 10] in dense item indices, and a note if there is one.

    name: one of METHODS, or RESCORE. execution: as in ``measure``.
    """
    from sidmlp.data import leave_last_out
    from sidmlp.evaluate import (
        by_callable,
        by_popularity,
        by_reference,
        by_teacher,
        encoder_features,
        own_encoder_features,
    )

    from .artifacts import load_codes, load_data, load_encoder, load_student, load_teacher

    if name == "popularity":
        data = load_data(directory)
        return by_popularity(data, leave_last_out(data), questions), ""
    kernel = partial(kernel_recommend, directory, beams, execution)
    if name == "kernel":
        return by_callable(kernel(), questions), ""
    teacher, (codes, tokens) = load_teacher(directory), load_codes(directory)
    if name == RESCORE:
        return by_callable(kernel(teacher), questions), ""
    if name == "reference":
        student, encoder = load_student(directory), load_encoder(directory)
        student.to(execution.device)
        features = (
            encoder_features(teacher, codes, questions, execution)
            if encoder is None
            else own_encoder_features(encoder, tokens, codes, questions, execution)
        )
        return by_reference(student, features, codes, questions, num_beams=beams), ""
    constrained = name == "teacher"
    found = by_teacher(
        teacher,
        codes,
        questions,
        num_beams=beams,
        constrained=constrained,
        execution=execution,
    )
    wasted = float(found.invalid.double().mean()) / beams
    note = "" if constrained else f"{wasted:.1%} of its beams name no item"
    return found.items, note


def kernel_recommend(
    directory: RunDirectory,
    beams: int,
    execution: Execution,
    rescore_by: GenerativeTeacher | None = None,
) -> Recommend:
    """The exported student behind sidmlp_kernels, in dense item indices.

    execution: see ``served_student``. rescore_by: the teacher, to order the student's items; see
    ``rescoring``.
    """
    import numpy as np
    import torch

    from .artifacts import load_data
    from .served import rescoring, served_student

    model, checkpoint = served_student(directory, execution)
    rescore = None if rescore_by is None else rescoring(model, checkpoint, rescore_by)
    ids = load_data(directory).item_ids
    order = np.argsort(ids)

    def recommend(histories: list[np.ndarray], exclude: list[np.ndarray], k: int) -> torch.Tensor:
        batch = model.batch([ids[history] for history in histories])
        seen = [ids[items] for items in exclude]
        by = None if rescore is None else rescore(batch)
        found = model.decode(batch, k=k, num_beams=beams, exclude=seen, rescore=by)
        items = found.items.cpu().numpy()
        dense = order[np.searchsorted(ids, np.maximum(items, ids.min()), sorter=order)]
        return torch.from_numpy(np.where(items < 0, -1, dense))

    return recommend
