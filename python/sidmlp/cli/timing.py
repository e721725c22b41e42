"""Microseconds per request of the student's decoders, and how far their answers agree.

Run as a program it times ``torch.compile`` of the reference in a process of its own, because
nothing can stop a compilation that takes too long but the end of its process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidmlp.beam import Decoded, decode_states
from sidmlp.data import leave_last_out
from sidmlp.evaluate import Questions, encoder_features
from sidmlp.student import Student
from sidmlp.training import seed_everything
from sidmlp.trie import Trie

from .artifacts import load_codes, load_data, load_student, load_teacher
from .run_directory import RunDirectory

K, NUM_BEAMS = 10, 50


@dataclass(frozen=True)
class Problem:
    """The same encoder states for every decoder: some test users of a run."""

    student: Student
    trie: Trie
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, directory: RunDirectory, batch: int) -> Problem:
        """The first ``batch`` test users; items keep their own ids."""
        data, (codes, tokens) = load_data(directory), load_codes(directory)
        questions = Questions.of(leave_last_out(data).test).sample(batch, seed=0)
        features = encoder_features(load_teacher(directory), codes, questions)
        states, mask = features.batch_states(torch.arange(len(features)).numpy())
        trie = Trie.from_codes(codes, data.item_ids, codes_per_level=tokens.codes_per_level)
        return cls(load_student(directory), trie, states, mask)

    def reference(self, exact_ties: bool) -> Callable[[], Decoded]:
        """The reference decode of this problem; exact_ties=False is the faster way PyTorch has."""
        return partial(
            decode_states,
            self.student,
            self.states,
            self.mask,
            self.trie,
            K,
            NUM_BEAMS,
            exact_ties=exact_ties,
        )


def microseconds(call: Callable[[], Any], requests: int, seconds: float = 2.0) -> float:
    """Median time per request of repeated calls, after one that is not counted."""
    call()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) / requests * 1e6


def compiled_microseconds(
    directory: RunDirectory, batch: int, limit_s: float
) -> tuple[float | None, str]:
    """``torch.compile`` of the reference: its time per request or None, and a note why."""
    arguments = [str(directory.path), str(batch), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "sidmlp.cli.timing", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return None, f"not compiled within {limit_s:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return None, f"torch.compile failed: {lines[-1][:200]}"
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["microseconds"], f"after {answer['compile_s']:.0f} s of compiling"


@dataclass(frozen=True)
class Parity:
    """Agreement of two decoders' answers.

    agreeing: share of the reference's items that the other returned for the same request;
    largest_difference: of the scores of items that both returned.
    """

    agreeing: float
    largest_difference: float

    @classmethod
    def of(cls, reference: Decoded, items: Tensor, scores: Tensor) -> Parity:
        """Compares items int64 [B, k] and scores [B, k] with the reference's."""
        same = (reference.items[:, :, None] == items[:, None]) & (items[:, None] >= 0)
        difference = (reference.scores[:, :, None] - scores[:, None]).abs()
        expected = int((reference.items >= 0).sum())
        return cls(
            float(same.sum()) / max(expected, 1),
            float(difference[same].max()) if bool(same.any()) else float("nan"),
        )


def _main(run: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    seed_everything(0)
    problem = Problem.of(RunDirectory(Path(run)), int(batch))
    compiled = torch.compile(problem.reference(exact_ties=False))
    begin = time.perf_counter()
    compiled()
    compile_s = time.perf_counter() - begin
    taken = microseconds(compiled, int(batch))
    print(json.dumps({"microseconds": taken, "compile_s": compile_s}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
