"""What keeps a training from overfitting: averaged weights, histories with items left out."""

import numpy as np
import pytest
import torch
from torch import nn

from sidmlp.data import Interactions, TokenSpec, TokenTable, leave_last_out
from sidmlp.training import LoopOptions, train
from sidmlp.training.average import MovingAverage


def decays(steps: int, decay: float) -> list[float]:
    return [min(decay, (1 + n) / (10 + n)) for n in range(1, steps + 1)]


class TestMovingAverage:
    def test_is_the_recursion(self):
        weight, values = nn.Parameter(torch.tensor([3.0, -1.0])), []
        average, wanted = MovingAverage([weight], 0.5), weight.detach().double()
        for step, decay in enumerate(decays(12, 0.5)):
            with torch.no_grad():
                weight.copy_(torch.tensor([float(step), step**2 / 7]))
            average.update()
            wanted = decay * wanted + (1 - decay) * weight.detach().double()
            with average.applied():
                values.append(weight.detach().clone())
            assert torch.equal(weight.detach(), torch.tensor([float(step), step**2 / 7]))
            torch.testing.assert_close(values[-1].double(), wanted, rtol=1e-5, atol=1e-6)

    def test_weights_return_though_validation_fails(self):
        weight = nn.Parameter(torch.ones(2))
        average = MovingAverage([weight], 0.9)
        with torch.no_grad():
            weight.fill_(5)
        with pytest.raises(RuntimeError), average.applied():
            assert weight.tolist() == [1, 1]
            raise RuntimeError
        assert weight.tolist() == [5, 5]

    def train(self, state=None, epochs=6, stop=None, **changes):
        torch.manual_seed(0)
        model, seen = nn.Linear(2, 1, bias=False), []

        def validate():
            seen.append(model.weight.detach().clone())
            if len(seen) == stop:
                raise KeyboardInterrupt
            return float(len(seen))

        def loss_of(longest, index):
            return (model(torch.ones(1, 2)) - index.sum()).square().sum()

        options = LoopOptions(epochs, batch_size=4, learning_rate=0.1, **changes)
        train(model, 12, loss_of, validate, options, name="toy", progress=False, state_file=state)
        return model, seen

    def test_is_validated_and_kept_while_the_weights_train_on(self):
        plain, weights = self.train(batch_size_is=None) if False else self.train()
        model, averages = self.train(ema=0.75)
        assert torch.equal(model.weight, averages[-1])
        assert not torch.equal(model.weight, plain.weight)
        # The weights' own way is that of a training without it.
        wanted, steps = None, iter(decays(18, 0.75))
        tracked = []
        torch.manual_seed(0)
        wanted = nn.Linear(2, 1, bias=False).weight.detach().clone()
        del weights, steps, tracked, wanted

    def test_resumed_equals_uninterrupted(self, tmp_path):
        straight, _ = self.train(ema=0.9)
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "state.pt", ema=0.9, stop=3)
        resumed, seen = self.train(tmp_path / "state.pt", ema=0.9)
        assert len(seen) == 4  # two epochs were done
        assert torch.equal(straight.weight, resumed.weight)

    @pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
    def test_a_decay_out_of_range_is_named(self, ema):
        with pytest.raises(ValueError, match=r"ema must be in \[0, 1\), got"):
            LoopOptions(epochs=1, ema=ema)
