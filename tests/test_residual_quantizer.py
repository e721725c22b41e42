"""The quantiser inside RQ-VAE: values, gradients, running means, restarts."""

from __future__ import annotations

import pytest
import torch

from sidmlp.tokenizers.residual_quantizer import ResidualQuantizer


def make(update: str = "gradient", decay: float = 0.5) -> ResidualQuantizer:
    generator = torch.Generator().manual_seed(1)
    centres = [torch.randn(count, 3, generator=generator) for count in (6, 4)]
    return ResidualQuantizer(centres, update=update, commitment=0.25, decay=decay)


def latent(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(2))


def by_hand(quantizer: ResidualQuantizer, z: torch.Tensor) -> tuple[list, list]:
    """Residuals before each level and the centres chosen, one vector at a time."""
    rests, chosen = [], []
    rest = z.clone()
    for centres in quantizer.centres:
        best = [min(range(len(centres)), key=lambda c: (r - centres[c]).norm()) for r in rest]
        rests.append(rest)
        chosen.append(centres[best].detach())
        rest = rest - chosen[-1]
    return rests, chosen


@pytest.mark.parametrize(("update", "weight"), [("gradient", 1.25), ("ema", 0.25)])
def test_values_and_loss(update, weight):
    quantizer, z = make(update).eval(), latent()
    quantised, loss = quantizer(z)
    rests, chosen = by_hand(quantizer, z)
    assert torch.allclose(quantised, chosen[0] + chosen[1], atol=1e-6)
    errors = [(r - c).square().sum(1).mean() for r, c in zip(rests, chosen, strict=True)]
    assert float(loss.detach()) == pytest.approx(weight * float(sum(errors)), rel=1e-5)


def test_gradients_pass_straight_through():
    quantizer, z = make(), latent().requires_grad_()
    weights = torch.arange(3.0)
    (quantizer(z)[0] * weights).sum().backward()
    assert torch.equal(z.grad, weights.expand_as(z))
    assert all(c.grad is None for c in quantizer.centres)  # they learn by their own loss alone


def test_gradient_of_the_centres_points_to_what_chose_them():
    quantizer, z = make(), latent()
    quantizer(z)[1].backward()
    rests, chosen = by_hand(quantizer, z)
    for level, centres in enumerate(quantizer.centres):
        expected = torch.zeros_like(centres)
        for code in range(len(centres)):
            mine = (chosen[level] == centres[code]).all(1)
            expected[code] = 2 * (chosen[level] - rests[level])[mine].sum(0) / len(z)
        assert torch.allclose(centres.grad, expected, atol=1e-6)


def test_running_means_settle_on_the_means_of_what_chose_them():
    quantizer, z = make("ema"), latent()
    for _ in range(200):
        quantizer(z)
    assert not any(c.requires_grad for c in quantizer.centres)
    rests, chosen = by_hand(quantizer, z)
    for level, centres in enumerate(quantizer.centres):
        for code in range(len(centres)):
            mine = (chosen[level] == centres[code]).all(1)
            if mine.any():
                assert torch.allclose(centres[code], rests[level][mine].mean(0), atol=1e-4)


def test_evaluation_learns_nothing():
    quantizer = make("ema").eval()
    before = [c.clone() for c in quantizer.centres]
    quantizer(latent())
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.centres, strict=True))


@pytest.mark.parametrize("update", ["gradient", "ema"])
class TestRestart:
    def test_the_dead_move_to_residuals_and_the_living_stay(self, update):
        quantizer, z = make(update, decay=0.0), latent()
        with torch.no_grad():
            quantizer.centres[0][2] = 1e3
            quantizer.centres[1][3] = -1e3
        quantizer(z)
        before = [c.clone() for c in quantizer.centres]
        dead = quantizer.restart_dead(z, torch.Generator().manual_seed(3))
        assert 2 in dead[0].tolist()
        assert 3 in dead[1].tolist()
        for level, centres in enumerate(quantizer.centres):
            alive = [c for c in range(len(centres)) if c not in dead[level].tolist()]
            assert torch.equal(centres[alive], before[level][alive])
        assert (quantizer.centres[0][2] == z).all(1).any()
        quantizer(z)
        later = quantizer.restart_dead(z, torch.Generator().manual_seed(3))
        assert 2 not in later[0].tolist()  # it stands on a vector, which chooses it

    def test_nothing_is_left_to_move_to(self, update):
        z = torch.eye(3)[[0, 1, 0, 1]]
        centres = [torch.stack([*torch.eye(3)[:2], torch.full((3,), 9.0)])]
        quantizer = ResidualQuantizer(centres, update=update, commitment=0.25, decay=0.5)
        assert quantizer.restart_dead(z, torch.Generator().manual_seed(4))[0].numel() == 0
        assert torch.equal(quantizer.centres[0][2], torch.full((3,), 9.0))

    def test_uses_are_counted_since_the_last_call(self, update):
        quantizer, z = make(update), latent(400)
        quantizer(z)
        quantizer.restart_dead(z, torch.Generator().manual_seed(5))
        everything = quantizer.restart_dead(z, torch.Generator().manual_seed(5))
        assert [d.numel() for d in everything] == [6, 4]


def test_unknown_update():
    with pytest.raises(ValueError, match="update: expected one of gradient, ema, got 'sgd'"):
        make("sgd")
