"""RQ-VAE: training, codes, determinism, mistakes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from item_blobs import blobs, missed

import sidmlp.tokenizers.rqvae as module
from sidmlp.tokenizers import RqVaeOptions, count_collisions, deduplicate, train_rqvae
from sidmlp.tokenizers.residual_quantizer import UPDATES, ResidualQuantizer
from sidmlp.training import TrainingFailed

SMALL = RqVaeOptions(latent=6, hidden=(24,), epochs=30, batch_size=64, learning_rate=3e-3)


def options(**changes) -> RqVaeOptions:
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("update", UPDATES)
class TestTraining:
    def test_the_codes_tell_the_vectors(self, update):
        vectors = blobs(256, 12, 10, seed=1) + 5
        found = train_rqvae(vectors, (8, 6), options(update=update), backend="torch")
        assert found.codes.shape == (256, 2)
        assert found.codes.min() >= 0
        assert (found.codes.max(0) < [8, 6]).all()
        assert found.error == pytest.approx(missed(vectors, found.reconstruct()), rel=1e-4)
        other = np.random.default_rng(0).permutation(found.reconstruct())
        assert found.error < 0.4 * missed(vectors, other)
        # Training is worth something: one epoch leaves more than thirty do.
        short = train_rqvae(vectors, (8, 6), options(update=update, epochs=1), backend="torch")
        assert found.error < 0.7 * short.error

    def test_a_seed_repeats_and_another_differs(self, update):
        vectors = blobs(128, 12, 6, seed=2)
        few = options(update=update, epochs=4)
        state = torch.random.get_rng_state()
        one, two, other = (
            train_rqvae(vectors, (8, 6), few, seed=s, backend="torch") for s in (1, 1, 2)
        )
        assert torch.equal(state, torch.random.get_rng_state())  # the caller's numbers go on
        assert np.array_equal(one.codes, two.codes)
        assert np.array_equal(one.decoded, two.decoded)
        assert not np.array_equal(one.codes, other.codes)

    def test_the_unit_of_the_vectors_does_not_matter(self, update):
        vectors = blobs(96, 8, 6, seed=3)
        few = options(update=update, epochs=3)
        one = train_rqvae(vectors, (6, 4), few, backend="torch")
        # A power of two changes exponents only, so every bit of the codes must stay.
        two = train_rqvae(vectors * 1024, (6, 4), few, backend="torch")
        assert np.array_equal(one.codes, two.codes)
        assert np.array_equal(one.decoded * 1024, two.decoded)

    def test_dead_codes_are_restarted(self, update, monkeypatch):
        vectors = blobs(128, 16, 6, seed=4)

        def far_away(encoder, points, codes_per_level, chosen, *_):
            centres = [torch.full((count, chosen.latent), 50.0) for count in codes_per_level]
            for level in centres:
                level += torch.arange(len(level))[:, None]  # none is as near as the first
            return ResidualQuantizer(
                centres, update=chosen.update, commitment=0.25, decay=chosen.decay
            )

        monkeypatch.setattr(module, "_start", far_away)
        used, restarts = {}, {}
        for restart in (False, True):
            found = train_rqvae(vectors, (8, 8), options(update=update, restart=restart))
            used[restart], restarts[restart] = found.used(), found.restarts
        assert used[False][0] <= 2
        assert min(used[True]) >= 6
        assert restarts[False] == (0, 0)
        assert min(restarts[True]) >= 7

    def test_equal_vectors_share_a_code_and_collisions_are_resolved(self, update):
        vectors = np.repeat(blobs(20, 20, 5, seed=5), 4, axis=0)
        found = train_rqvae(vectors, (6, 6), options(update=update, epochs=3), backend="torch")
        grouped = found.codes.reshape(20, 4, 2)
        assert (grouped == grouped[:, :1]).all()
        assert count_collisions(found.codes).items == 80
        assert len(np.unique(deduplicate(found.codes)[0], axis=0)) == 80


class TestMistakes:
    def test_a_loss_that_is_not_finite(self):
        with pytest.raises(TrainingFailed, match="not finite; use a lower learning rate"):
            train_rqvae(blobs(64, 4, 4, seed=6), (4,), options(learning_rate=1e30))

    def test_vectors_and_sizes(self):
        vectors = blobs(10, 2, 4, seed=7)
        with pytest.raises(ValueError, match="number of items"):
            train_rqvae(vectors, (11,), SMALL)
        vectors[3] = np.nan
        with pytest.raises(ValueError, match="row 3"):
            train_rqvae(vectors, (2,), SMALL)

    def test_a_device_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"device: expected one that torch can use.*'cpu'"):
            train_rqvae(blobs(10, 2, 4, seed=8), (2,), options(device="abacus"))

    @pytest.mark.parametrize(
        "change",
        [
            {"update": "sgd"},
            {"latent": 0},
            {"epochs": 0},
            {"batch_size": 0},
            {"hidden": (8, 0)},
            {"learning_rate": 0.0},
            {"learning_rate": float("nan")},
            {"commitment": -1.0},
            {"decay": 1.0},
        ],
    )
    def test_options(self, change):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
            options(**change)
