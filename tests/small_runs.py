"""Run directories of a tiny data set, made by the commands themselves in a second or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sidmlp.cli import main

LOOP = ["--dropout", "0", "--batch-size", "32", "--lr", "1e-2", "--warmup", "2", "--threads", "1"]
SIZES = ["--dim", "16", "--layers", "1", "--heads", "2", "--head-dim", "8", "--ffn", "16"]
TEACHER = [*SIZES, *LOOP, "--epochs", "3"]
STUDENT = ["--hidden", "16", "--heads", "2", *LOOP, "--epochs", "2"]


def save_walks(directory: Path, users: int = 30, items: int = 30) -> Path:
    """A data set as the shared ones are: sequences.npz of walks round a circle of items, and
    semantic_ids.npz with the variant "walk"."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 9, users)
    walks = [(rng.integers(items) + np.arange(n)) % items for n in lengths]
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(
        directory / "sequences.npz",
        items=np.concatenate(walks).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    codes = np.stack(np.unravel_index(np.arange(items), (4, 3, 3)), axis=1)
    np.savez(directory / "semantic_ids.npz", walk=codes.astype(np.int16))
    return directory


def small_run(directory: Path, upto: str = "evaluate") -> Path:
    """A run directory, with every step up to and including ``upto`` done."""
    data = save_walks(directory / "data-set")
    run = directory / "run"
    methods = "popularity,teacher,teacher-unconstrained,reference,kernel"
    steps = {
        "data": ["--arrays", str(data)],
        "tokenize": ["--semantic-ids", str(data), "walk", "--max-items", "4"],
        "train-teacher": TEACHER,
        "distill": STUDENT,
        "export": [],
        "evaluate": ["--methods", methods, "--rescore", "teacher", "--beams", "10"],
    }
    for command, arguments in steps.items():
        assert main([command, "--run", str(run), *arguments]) == 0, command
        if command == upto:
            break
    return run
