"""One step of training: loss, gradients, clipping, AdamW.

On a GPU a small model's step is hundreds of kernels of a few microseconds each, and launching them
takes longer than running them. So the whole step is captured as a CUDA graph, one for each length
of batch, after a few ordinary steps have compiled and allocated what it needs. Nothing in a step
waits for the device: losses and gradient norms add up there until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batches import Batch
from .execution import Execution

# (longest, inputs of a batch) -> scalar loss; see ``train``.
LossOf = Callable[..., Tensor]

_ORDINARY_STEPS = 3  # of each length before its graph


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]


class Step:
    """Takes steps; ``totals`` says what they came to."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        loss_of: LossOf,
        learning_rate: float,
        weight_decay: float,
        clip_norm: float,
        execution: Execution,
    ) -> None:
        self.parameters = parameters
        self.loss_of = loss_of
        self.clip_norm = clip_norm
        self.execution = execution
        device, on_gpu = execution.device, execution.on_gpu
        # A graph reads the rate from memory; as a number it would be frozen into the graph.
        self._rate = torch.tensor(learning_rate, device=device) if on_gpu else None
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=learning_rate if self._rate is None else self._rate,
            weight_decay=weight_decay,
            fused=True if on_gpu else None,
            capturable=on_gpu,
        )
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss x examples, norm
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._taken: dict[int, int] = {}
        self._captured: dict[int, _Captured] = {}

    def load_optimizer(self, state: dict) -> None:
        """The optimiser's state of an earlier training of the same parameters."""
        self.optimizer.load_state_dict(state)
        if self._rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate

    def begin_epoch(self) -> None:
        """Sets the totals to zero."""
        self._sums.zero_()

    def totals(self) -> tuple[float, float]:
        """Sum of loss x examples and sum of gradient norms since; waits for the device."""
        loss, norm = self._sums.tolist()
        return loss, norm

    def __call__(self, batch: Batch, inputs: tuple[Tensor, ...], learning_rate: float) -> None:
        """One step on ``inputs``, tensors on the device whose shapes ``batch.longest`` fixes."""
        self._count.fill_(batch.count)
        if self._stream is None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self._take(batch.longest, inputs)
            return
        assert self._rate is not None
        self._rate.fill_(learning_rate)
        current = torch.cuda.current_stream(self.execution.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._take_on_gpu(batch.longest, inputs)
        current.wait_stream(self._stream)

    def _take_on_gpu(self, longest: int, inputs: tuple[Tensor, ...]) -> None:
        taken = self._taken.get(longest, 0)
        self._taken[longest] = taken + 1
        if taken < _ORDINARY_STEPS:
            self._take(longest, inputs)
            return
        if longest not in self._captured:
            self._captured[longest] = self._capture(longest, inputs)
        captured = self._captured[longest]
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given)
        captured.graph.replay()

    def _capture(self, longest: int, inputs: tuple[Tensor, ...]) -> _Captured:
        own = tuple(given.clone() for given in inputs)
        # The gradients that the graph writes must be its own, not those of an ordinary step.
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            self._take(longest, own)
        return _Captured(graph, own)

    def _take(self, longest: int, inputs: tuple[Tensor, ...]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.execution.autocast():
            loss = self.loss_of(longest, *inputs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self._sums += torch.stack([loss.detach().double() * self._count, norm.double()])
