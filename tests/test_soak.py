"""Graphs replayed again and again: the same bits every time, and memory that stays.

SIDMLP_SOAK=1000000 pytest -m soak --require-cuda replays a million times for each parameter;
without it a few thousand times. Each graph takes its next inputs, decodes and keeps every bit in
which the results ever differed from the first answer to these inputs, all on the GPU, so that no
replay goes unwatched and the host only launches. Beside the decode that is six small kernels.
"""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
from captured_graphs import fields
from parity import DTYPES, GPU_BACKENDS, PUBLISHED
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.recommendations import PackedResults
from sidmlp_kernels.testing import Problem, exclude_tensors, make_problem

REPLAYS = int(os.environ.get("SIDMLP_SOAK", "2000"))
CHUNKS = 20  # after each: everything is compared
SIZES = (1, 8, 32)
MIB = 1 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(300 + REPLAYS // 500),
    pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True),
]


class Table:
    """Rows of several tensors each, as int64 words [rows, N]: one kernel takes a row."""

    def __init__(self, rows: list[list[Tensor]]) -> None:
        self.words = torch.stack([torch.cat([self._padded(t) for t in row]) for row in rows])
        self._like = rows[0]

    @staticmethod
    def _padded(tensor: Tensor) -> Tensor:
        """Its bytes as words, an even number of them: each tensor begins at 16 bytes."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        return torch.nn.functional.pad(flat, (0, -len(flat) % 16)).view(torch.int64)

    def row(self, number: Tensor) -> list[Tensor]:
        """The tensors of row `number`, int64 [1]."""
        left, found = self.words.index_select(0, number)[0].view(torch.uint8), []
        for like in self._like:
            size = like.numel() * like.element_size()
            found.append(left[:size].view(like.dtype).view(like.shape))
            left = left[size + -size % 16 :]
        return found


class Turns:
    """A few batches of one size, and the answers to them; `step` decodes the next one.

    differing  int32, as packed results: the bits in which any step differed from its answer
    done       int64 [1], how many steps there were
    """

    def __init__(self, plan: DecodePlan, problem: Problem, size: int, turns: int = 4) -> None:
        device = plan.packed.device
        self.plan, self.turns = plan, turns
        parts = [
            problem.rows([(3 * turn + row) % problem.batch for row in range(size)])
            for turn in range(turns)
        ]
        longest = max(sum(map(len, part.exclude)) for part in parts)
        rows: list[list[Tensor]] = []
        for part in parts:
            ids, offsets = exclude_tensors(part.exclude, device)
            ids = torch.nn.functional.pad(ids, (0, longest - len(ids)), value=2**62)  # nobody's
            states = part.states.to(device, plan.packed.dtype)
            own = [states, part.mask.to(device), ids, offsets]
            rows.append([*own, PackedResults.of(plan.decode_states(*own)).memory])
        answers = torch.stack([row[-1] for row in rows])
        # A replay that wrote nothing would leave the results of the turn before.
        assert all((answers[turn] != answers[turn - 1]).any() for turn in range(turns))
        self.table = Table(rows)
        self.differing = torch.zeros_like(answers[0])
        self.turn, self.done = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def step(self) -> None:
        *own, answer = self.table.row(self.turn)
        got = PackedResults.of(self.plan.decode_states(*own)).memory
        self.differing.bitwise_or_(got.bitwise_xor_(answer))
        self.done.add_(1)
        torch.remainder(self.done, self.turns, out=self.turn)

    def captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def check(self, steps: int) -> None:
        assert int(self.done) == steps
        differ = int(self.differing.count_nonzero())
        assert differ == 0, f"{differ} of {len(self.differing)} values differed in {steps} steps"


class Memory:
    """What is in use now, and that it stays so."""

    def __init__(self) -> None:
        self.before = self.now()

    @staticmethod
    def now() -> dict[str, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return {
            "torch, allocated": torch.cuda.memory_allocated(),
            "torch, reserved": torch.cuda.memory_reserved(),
            "GPU": total - free,
            "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    def check(self) -> None:
        # Results may come to lie otherwise, others may use the GPU, and a heap rounds.
        slack = {"torch, allocated": 0, "torch, reserved": 4, "GPU": 16, "host": 64}
        for name, bytes_now in self.now().items():
            grown = bytes_now - self.before[name]
            assert grown <= slack[name] * MIB, (
                f"{name}: {grown} bytes more than after the first replays"
            )


def published(**options: Any) -> Problem:
    return make_problem(seed=71, **{**PUBLISHED, "k": 10, "excluded": 30, "batch": 40, **options})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replays(backend: str, device: torch.device, dtype: str) -> None:
    """Graphs of several batch sizes, REPLAYS in all, each size on a stream of its own and so beside
    the others, with calls in between. The bound is the slowest size, whose replays are a third."""
    problem = published()
    plan = problem.plan(backend, DTYPES[dtype], device=device)
    every = [Turns(plan, problem, size) for size in SIZES]
    eager = [Turns(plan, problem, size) for size in (3, 33)]
    graphs = [turns.captured() for turns in every]
    for turns in eager:
        turns.step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in SIZES]
    memory, steps, calls = None, 1, len(eager)  # one step before each capture
    for _ in range(CHUNKS):
        for _ in range(-(-REPLAYS // (CHUNKS * len(SIZES)))):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            steps += 1
            if steps % 50 == 0:
                eager[steps // 50 % 2].step()
                calls += 1
        torch.cuda.synchronize()
        for turns in every:
            turns.check(steps)
        for turns in eager:
            turns.check(int(turns.done))
        assert sum(int(turns.done) for turns in eager) == calls
        if memory is None:
            memory = Memory()
        memory.check()


def test_decoders(backend: str, device: torch.device) -> None:
    """GraphDecoder, which copies in and out, with batches of any size; a twentieth of the replays,
    since a call costs more than its replay."""
    problem = published()
    model = sk.Recommender(
        problem.student, problem.catalogue, device=device, dtype="bfloat16", backend=backend
    )
    settings: dict[str, Any] = {"k": 10, "num_beams": 50}
    decoder = model.capture(SIZES, problem.states.shape[1], **settings)
    states, mask = problem.states.to(device, torch.bfloat16), problem.mask.to(device)
    wanted = fields(model.decode_states(states, mask, **settings))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    sizes, memory = (1, 2, 8, 5, 32, 17), None
    for chunk in range(CHUNKS):
        for number in range(max(len(sizes), REPLAYS // 20 // CHUNKS)):
            batch = sizes[number % len(sizes)]
            first = (chunk + 7 * number) % (problem.batch - batch + 1)
            rows = slice(first, first + batch)
            got = decoder.decode_states(states[rows], mask[rows])
            for own, right in zip(fields(got), wanted, strict=True):
                wrong.add_((own != right[rows]).sum())
        assert int(wrong) == 0, f"{int(wrong)} values differ after {chunk + 1} chunks"
        del got, own
        if memory is None:
            memory = Memory()
        memory.check()
