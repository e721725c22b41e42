"""An exponential moving average of weights: what a training has been near of late.

With a large learning rate weights wander around what they have found; their average stays there, so
it scores better before the rate has fallen, and overfitting shows at its own time rather than at
the schedule's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- d average + (1 - d) weights, after every step.

    d = min(decay, (1 + steps) / (10 + steps)), so that the random weights of the start are soon
    forgotten: an average over about the last tenth of all steps so far, or over the last
    1 / (1 - decay) where that is less, from step 9 / (1 - decay) on.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._weights = [parameter.detach() for parameter in parameters]
        self._average = [weight.clone() for weight in self._weights]

    def update(self) -> None:
        """Takes in the weights as they are now; does not wait for the device."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the average for its weights, in the memory of its weights."""
        kept = [weight.clone() for weight in self._weights]
        try:
            torch._foreach_copy_(self._weights, self._average)
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)

    def state(self) -> dict[str, Any]:
        """What ``load`` goes on from."""
        return {"steps": self.steps, "average": self._average}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state`` of an average of the same parameters said."""
        self.steps = state["steps"]
        values: list[Tensor] = state["average"]
        for own, given in zip(self._average, values, strict=True):
            own.copy_(given)
