"""Product quantisation with and without a learnt rotation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from item_blobs import backends, blobs, missed

from sidmlp.tokenizers import deduplicate, product_quantisation, residual_kmeans

needs_faiss = pytest.mark.skipif(backends() == ["torch"], reason="faiss is not installed")


def uneven(count: int, dim: int, seed: int) -> np.ndarray:
    """Vectors whose first coordinates hold nearly all of the deviation, as an SVD's do."""
    noise = np.random.default_rng(seed).normal(size=(count, dim))
    return (noise * 0.7 ** np.arange(dim)).astype(np.float32)


class TestProductQuantisation:
    @pytest.mark.parametrize("backend", backends())
    def test_codes_are_the_nearest_centres_of_the_shares(self, backend):
        vectors = blobs(200, 9, 7, seed=1)  # shares of 3, 2, 2 coordinates
        books = product_quantisation(vectors, (8, 5, 3), backend=backend, iterations=10)
        assert [c.shape for c in books.centres] == [(8, 3), (5, 2), (3, 2)]
        bounds = ((0, 3), (3, 5), (5, 7))
        for level, (begin, end) in enumerate(bounds):
            share = vectors[:, begin:end].astype(np.float64)
            distance = ((share[:, None] - books.centres[level][None]) ** 2).sum(-1)
            taken = distance[np.arange(200), books.codes[:, level]]
            assert np.allclose(taken, distance.min(1), rtol=1e-4)
        assert books.codes.min(0).tolist() == [0, 0, 0]
        assert books.codes.max(0).tolist() == [7, 4, 2]

    @pytest.mark.parametrize("rotate", [False, pytest.param(True, marks=needs_faiss)])
    @pytest.mark.parametrize("dim", [8, 10])
    def test_residual_is_what_the_reconstruction_misses(self, dim, rotate):
        vectors = uneven(300, dim, seed=2) + 3  # the mean is no part of the deviation
        books = product_quantisation(vectors, (8, 8, 8, 8), rotate=rotate)
        assert books.residual[-1] == pytest.approx(missed(vectors, books.reconstruct()), rel=1e-3)
        assert list(books.residual) == sorted(books.residual, reverse=True)
        mixed = np.random.default_rng(0).permutation(books.codes)
        random = missed(vectors, dataclasses.replace(books, codes=mixed).reconstruct())
        assert books.residual[-1] < 0.5 * random

    def test_one_level_is_k_means(self):
        vectors = blobs(120, 6, 5, seed=3)
        one = product_quantisation(vectors, (6,), backend="torch")
        other = residual_kmeans(vectors, (6,), backend="torch")
        assert np.array_equal(one.codes, other.codes)
        assert one.residual == pytest.approx(other.residual, rel=1e-4)

    @pytest.mark.parametrize("rotate", [False, pytest.param(True, marks=needs_faiss)])
    def test_a_seed_repeats_and_another_differs(self, rotate):
        vectors = blobs(200, 10, 8, seed=4)
        one, two, other = (
            product_quantisation(vectors, (8, 8), rotate=rotate, seed=s).codes for s in (1, 1, 2)
        )
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_collisions_are_resolved(self):
        vectors = np.repeat(blobs(40, 40, 4, seed=5), 3, axis=0)
        codes = product_quantisation(vectors, (8, 8)).codes
        assert (codes.reshape(40, 3, 2) == codes.reshape(40, 3, 2)[:, :1]).all()
        unique, collisions = deduplicate(codes)
        assert len(np.unique(unique, axis=0)) == 120
        assert collisions.items == 120

    def test_bad_input(self):
        vectors = blobs(10, 2, 2, seed=6)
        with pytest.raises(ValueError, match=r"as many coordinates as levels \(3\).*width 2"):
            product_quantisation(vectors, (2, 2, 2))
        with pytest.raises(ValueError, match="number of items"):
            product_quantisation(vectors, (11,))
        with pytest.raises(ValueError, match="needs faiss"):
            product_quantisation(vectors, (2,), rotate=True, backend="torch")
        vectors[4, 1] = np.inf
        with pytest.raises(ValueError, match="row 4"):
            product_quantisation(vectors, (2,))


@needs_faiss
class TestRotation:
    def test_balances_shares_of_uneven_coordinates(self):
        vectors = uneven(600, 16, seed=7)
        plain = product_quantisation(vectors, (16,) * 4)
        turned = product_quantisation(vectors, (16,) * 4, rotate=True)
        assert turned.residual[-1] < 0.8 * plain.residual[-1]

    @pytest.mark.parametrize(("dim", "padded"), [(8, 8), (10, 12)])
    def test_keeps_distances(self, dim, padded):
        vectors = uneven(100, dim, seed=8)
        rotation = product_quantisation(vectors, (4,) * 4, rotate=True).rotation
        assert rotation.shape == (padded, dim)
        assert np.allclose(rotation.T @ rotation, np.eye(dim), atol=1e-4)
