"""Jobs side by side, each in a process of its own: one that dies or hangs takes no other along."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

EXIT_SECONDS = 10.0  # for a process that has answered


def _answer(sender: connection.Connection, work: Callable[..., str], job: Sequence[Any]) -> None:
    sender.send(work(*job))


def in_processes(
    work: Callable[..., str], jobs: Sequence[Sequence[Any]], *, workers: int, seconds: float
) -> Iterator[tuple[int, str]]:
    """(number of the job, what `work(*job)` returned or why it did not), in the order they end.

    Spawned, not forked: CUDA does not survive a fork. A job is killed after `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(jobs))
    running: dict[Any, tuple[int, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_answer, args=(sender, work, job), daemon=True)
                process.start()
                sender.close()  # so that the receiver sees the end of the process
                running[receiver] = (number, process, time.monotonic() + seconds)
            first = min(deadline for _, _, deadline in running.values())
            ready = connection.wait(list(running), timeout=max(0.0, first - time.monotonic()))
            now = time.monotonic()
            late = [one for one, (_, _, end) in running.items() if end <= now and one not in ready]
            for receiver in [*ready, *late]:
                number, process, _ = running.pop(receiver)
                if receiver in late:
                    process.kill()
                    answer = f"not done after {seconds:.0f} s"
                else:
                    answer = _received(receiver, process)
                    process.join(EXIT_SECONDS)
                    process.kill()
                process.join()
                receiver.close()
                yield number, answer
    finally:
        for _, process, _ in running.values():
            process.kill()


def _received(receiver: Any, process: Any) -> str:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with {process.exitcode}"
