"""Residual k-means and the de-duplication level."""

from __future__ import annotations

import numpy as np
import pytest
from item_blobs import backends, blobs

from sidmlp.data import Interactions, leave_last_out
from sidmlp.tokenizers import (
    assign,
    cooccurrence_vectors,
    deduplicate,
    load_vectors,
    residual_kmeans,
)


class TestResidualKmeans:
    def test_backends_are_equally_good(self):
        if backends() == ["torch"]:
            pytest.skip("faiss is not installed")
        # Without clear clusters no single lucky seed decides, so the objectives must be close.
        vectors = np.random.default_rng(1).normal(size=(800, 8)).astype(np.float32)
        left = {
            backend: np.mean(
                [
                    residual_kmeans(vectors, (16, 16), backend=backend, seed=seed).residual
                    for seed in range(3)
                ],
                axis=0,
            )
            for backend in backends()
        }
        assert left["torch"] == pytest.approx(left["faiss"], rel=0.05)

    @pytest.mark.parametrize("backend", backends())
    def test_codes_are_the_nearest_centres_of_the_residuals(self, backend):
        vectors = blobs(300, 10, 8, seed=2)
        books = residual_kmeans(vectors, (8, 5), backend=backend, iterations=10)
        rest = vectors.astype(np.float64)
        for level, centres in enumerate(books.centres):
            distance = ((rest[:, None] - centres[None].astype(np.float64)) ** 2).sum(-1)
            taken = distance[np.arange(len(rest)), books.codes[:, level]]
            assert np.allclose(taken, distance.min(1), rtol=1e-4)
            rest = rest - centres[books.codes[:, level]]
        assert books.residual[1] < books.residual[0] < 0.5
        assert books.codes.max(0).tolist() == [7, 4]

    @pytest.mark.parametrize("backend", backends())
    def test_a_seed_repeats_and_another_differs(self, backend):
        vectors = blobs(200, 10, 8, seed=3)
        one, two, other = (
            residual_kmeans(vectors, (8, 8), backend=backend, seed=s).codes for s in (1, 1, 2)
        )
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)

    @pytest.mark.parametrize("backend", backends())
    def test_equal_vectors_share_a_code(self, backend):
        vectors = np.repeat(blobs(4, 4, 8, seed=4), 5, axis=0)
        codes = residual_kmeans(vectors, (6, 3), backend=backend).codes
        assert (codes.reshape(4, 5, 2) == codes.reshape(4, 5, 2)[:, :1]).all()

    def test_torch_reaches_the_best_clustering_of_separate_blobs(self):
        rng = np.random.default_rng(5)
        places = np.eye(6, dtype=np.float32) * 100
        vectors = np.repeat(places, 20, axis=0) + rng.normal(size=(120, 6)).astype(np.float32)
        codes = residual_kmeans(vectors, (6,), backend="torch").codes.reshape(6, 20)
        assert (codes == codes[:, :1]).all()
        assert len(set(codes[:, 0].tolist())) == 6

    def test_assign_takes_the_lower_of_equals(self):
        assert assign(np.zeros((2, 3), np.float32), np.ones((4, 3), np.float32)).tolist() == [0, 0]

    def test_bad_input(self):
        vectors = blobs(10, 2, 4, seed=6)
        with pytest.raises(ValueError, match="number of items"):
            residual_kmeans(vectors, (11,))
        with pytest.raises(ValueError, match="backend must be one of"):
            residual_kmeans(vectors, (2,), backend="gpu")
        with pytest.raises(ValueError, match="codes_per_level"):
            residual_kmeans(vectors, ())

    def test_an_explicit_backend_never_falls_back(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "faiss", None)
        vectors = blobs(10, 2, 4, seed=6)
        with pytest.raises(ValueError, match="not installed"):
            residual_kmeans(vectors, (2,), backend="faiss")
        assert residual_kmeans(vectors, (2,), backend="auto").codes.shape == (10, 1)


class TestDeduplicate:
    def test_counts_in_item_order(self):
        codes = np.asarray([[1, 2], [0, 0], [1, 2], [1, 1], [1, 2], [0, 0]])
        unique, collisions = deduplicate(codes)
        assert unique[:, 2].tolist() == [0, 0, 1, 0, 2, 1]
        assert (collisions.items, collisions.groups, collisions.largest) == (5, 2, 3)
        assert "5 items in 2 groups" in str(collisions)

    def test_every_row_is_unique(self):
        codes = np.random.default_rng(7).integers(0, 4, size=(500, 3))
        unique, collisions = deduplicate(codes)
        assert len(np.unique(unique, axis=0)) == 500
        assert np.array_equal(unique[:, :3], codes)
        assert unique[:, 3].max() == collisions.largest - 1

    def test_too_many_on_one_id(self):
        with pytest.raises(ValueError, match="room for 4"):
            deduplicate(np.zeros((5, 2), dtype=np.int64), max_codes=4)


class TestVectors:
    def test_items_of_one_crowd_are_close(self):
        rng = np.random.default_rng(8)
        lists = [rng.integers(0, 10, size=12) + 10 * (user % 2) for user in range(60)]
        data = Interactions(
            np.concatenate(lists), np.cumsum([0] + [12] * 60), np.arange(21, dtype=np.int64)
        )
        vectors = cooccurrence_vectors(data, leave_last_out(data), dim=4)
        assert vectors.shape == (21, 4)
        assert not vectors[20].any()
        unit = vectors[:20] / np.linalg.norm(vectors[:20], axis=1, keepdims=True)
        near = unit @ unit.T
        assert near[:10, :10].mean() > near[:10, 10:].mean() + 0.3

    def test_held_out_positions_are_not_read(self):
        def vectors(last: int) -> np.ndarray:
            lists = [np.asarray([0, 1, 2, 3, last, last + 1]) for _ in range(5)]
            data = Interactions(np.concatenate(lists), np.arange(0, 31, 6), np.arange(9))
            return cooccurrence_vectors(data, leave_last_out(data), dim=3)

        assert np.array_equal(vectors(4), vectors(6))

    def test_given_vectors_are_checked(self, tmp_path):
        path = tmp_path / "v.npy"
        np.save(path, np.ones((3, 2), np.float64))
        assert load_vectors(path, 3).dtype == np.float32
        with pytest.raises(ValueError, match="one row per item"):
            load_vectors(path, 4)
        np.save(path, np.asarray([[0.0, 1], [1, np.nan], [1e39, 0]]))
        with pytest.raises(ValueError, match=r"finite numbers of 32 bits, 2 rows .* row 1"):
            load_vectors(path, 3)
        np.save(path, np.ones((3, 2), np.int64))
        with pytest.raises(ValueError, match="floating-point numbers, got int64"):
            load_vectors(path, 3)
        with pytest.raises(ValueError, match="does not exist"):
            load_vectors(tmp_path / "none.npy", 3)
