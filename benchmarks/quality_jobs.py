"""A method asked by several processes, each of a share of the users."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sidmlp.cli.evaluate import ask
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.evaluate import Questions
from sidmlp.training import Execution


def ask_in_processes(
    run: RunDirectory,
    name: str,
    questions: Questions,
    beams: int,
    execution: Execution,
    jobs: int,
) -> tuple[Tensor, str]:
    """``sidmlp.cli.evaluate.ask`` by so many processes of one thread each; the answers are the same
    to the bit if they do not depend on who is asked together.

    Whatever is raised meanwhile ends the processes at once, and their answers are lost.
    """
    if jobs == 1:
        return ask(run, name, questions, beams, execution)
    shares = np.array_split(np.arange(len(questions.examples)), jobs)
    wanted = [Questions.of(questions.examples.take(share)) for share in shares if share.size]
    asked = partial(_ask, run=run, name=name, beams=beams, execution=execution)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
        try:
            found = list(pool.map(asked, wanted))
        except BaseException:
            # Time is up, say: leaving the pool would wait for all that it was asked.
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return torch.cat([items for items, _ in found]), found[0][1]


def _ask(
    questions: Questions, run: RunDirectory, name: str, beams: int, execution: Execution
) -> tuple[Tensor, str]:
    return ask(run, name, questions, beams, execution)
