"""What quality.py trains: the arguments of every step, as the command line takes them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sidmlp.cli import build_parser
from sidmlp.cli.arguments import parse
from sidmlp.cli.run_directory import RunDirectory

STAGES = ("tokenize", "teacher", "student", "plus", "evaluate", "speed")
TRAINED = {"teacher": "train-teacher", "student": "distill", "plus": "distill"}
TEXTS = "item_text.jsonl.gz"

# Tokenizers of our own; any other name is a variant of the data set's semantic_ids.npz.
OWN_TOKENIZERS = {
    "rqvae": ["--tokenizer", "rqvae", "--codes", "256,256,256"],
    "opq": ["--tokenizer", "opq", "--codes", "256,256,256"],
    "rkmeans": ["--tokenizer", "rkmeans", "--codes", "256,256,256"],
}

# After these the command line's own defaults hold: what is measured is what a user gets.
DEFAULTS = {"tokenize": "", "teacher": "", "student": "", "plus": "--encoder mlp"}


@dataclass(frozen=True)
class Experiment:
    """One data set, tokenizer and seed: where it is kept, and what is asked for.

    run: the teacher's and student's run directory; plus: the student++'s. arguments: of each
    trained stage and of "tokenize", without --run. users: a sample of test users, None takes all.
    jobs: processes of the references, which go from request to request. commit: what is measured,
    where the tree is no git checkout. methods: evaluate asks these alone, None asks all.
    """

    data: Path
    tokenizer: str
    seed: int
    work: Path
    arguments: dict[str, list[str]]
    beams: int = 50
    users: int | None = None
    device: str = "auto"
    batch: int = 512
    seconds_per_method: float = 3.0
    jobs: int = 1
    commit: str | None = None
    methods: tuple[str, ...] | None = None
    say: Callable[[str], None] = field(default=print, compare=False)

    @property
    def name(self) -> str:
        """Of files: data set, tokenizer, seed."""
        return f"{self.data.name}-{self.tokenizer}-seed{self.seed}"

    @property
    def run(self) -> RunDirectory:
        """Of teacher and student."""
        return RunDirectory(self.work / self.name)

    @property
    def plus(self) -> RunDirectory:
        """Of the student++; data, codes and teacher are links to the other's."""
        return RunDirectory(self.run.path / "plus")


def arguments_of(
    data: Path, tokenizer: str, seed: int, more: dict[str, str]
) -> dict[str, list[str]]:
    """Of each stage its default arguments and then `more`, whose options take precedence.

    Raises ValueError for a tokenizer that is neither ours nor in the data set, and for arguments
    that a command refuses.
    """
    found = {
        stage: shlex.split(f"{text} {more.get(stage, '')}") for stage, text in DEFAULTS.items()
    }
    found["tokenize"] = [*_tokenizer(data, tokenizer), *found["tokenize"]]
    for stage in found:
        found[stage] += ["--seed", str(seed)]
    return found


def _tokenizer(data: Path, tokenizer: str) -> list[str]:
    if tokenizer in OWN_TOKENIZERS:
        texts = data / TEXTS
        return [*OWN_TOKENIZERS[tokenizer], *(["--texts", str(texts)] if texts.is_file() else [])]
    given = data / "semantic_ids.npz"
    variants: list[str] = []
    if given.is_file():
        with np.load(given) as archive:
            variants = archive.files
    if tokenizer not in variants:
        raise ValueError(
            f"tokenizer: expected one of {', '.join([*OWN_TOKENIZERS, *sorted(variants)])}, got "
            f"{tokenizer!r}; the latter are those of {given}"
        )
    return ["--semantic-ids", str(data), tokenizer]


def command_options(command: str, run: Path, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; ValueError with argparse's reason for arguments it refuses."""
    try:
        return parse(build_parser(command), [command, "--run", str(run), *arguments])
    except ValueError as error:
        raise ValueError(f"sidmlp {command}: {error}") from None


def check_arguments(arguments: dict[str, list[str]], stages: Sequence[str]) -> None:
    """Raises ValueError where a command of the chosen stages would refuse its arguments."""
    for stage in stages:
        if stage in arguments:
            command_options(TRAINED.get(stage, stage), Path("."), arguments[stage])
