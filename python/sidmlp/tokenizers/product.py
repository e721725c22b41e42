"""Product quantisation: each level clusters its own share of a vector's coordinates.

Jegou et al. 2011. ``rotate`` first turns the space so that the shares are about equally hard, OPQ
(Ge et al. 2013), learnt by faiss. The levels do not refine each other: unlike with residual
k-means, items with an equal first code are alike in a part of their coordinates only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .codebooks import Codebooks, check_request, deviation
from .kmeans import assign, kmeans, resolve_backend


@dataclass(frozen=True)
class ProductCodebooks(Codebooks):
    """As `Codebooks`, but level l's centres are float32 [C_l, d_l], its share of the coordinates.

    rotation: float32 [d', d], orthonormal columns, d' = sum of d_l >= d; the shares are those of
    rotation @ vector.
    """

    rotation: np.ndarray

    def reconstruct(self) -> np.ndarray:
        """The vectors that the codes stand for, float32 [N, d]."""
        levels = zip(self.centres, self.codes.T, strict=True)
        return np.concatenate([c[chosen] for c, chosen in levels], axis=1) @ self.rotation


def product_quantisation(
    vectors: np.ndarray,
    codes_per_level: tuple[int, ...],
    *,
    rotate: bool = False,
    seed: int = 0,
    iterations: int = 50,
    backend: str = "auto",
) -> ProductCodebooks:
    """Codes of ``vectors`` float32 [N, d] by k-means on each level's share of the coordinates.

    Shares differ by at most one coordinate; with ``rotate`` all have ceil(d / levels).
    ``residual`` counts what no level has coded yet as its deviation from the mean.
    Raises ValueError when a level asks for more codes than there are items, when there are more
    levels than coordinates, and for ``rotate`` where faiss is not installed or not wanted.
    """
    check_request(vectors, codes_per_level)
    levels = len(codes_per_level)
    if levels > vectors.shape[1]:
        raise ValueError(
            f"expected at least as many coordinates as levels ({levels}), got vectors of width "
            f"{vectors.shape[1]}; use fewer levels or wider vectors"
        )
    backend = rotation_backend(backend) if rotate else resolve_backend(backend)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    rotation = (
        _learn_rotation(vectors, codes_per_level, seed)
        if rotate
        else np.eye(vectors.shape[1], dtype=np.float32)
    )
    total, rest = deviation(vectors), 1.0
    codes, centres, residual = [], [], []
    for level, share in enumerate(np.array_split(vectors @ rotation.T, levels, axis=1)):
        share = np.ascontiguousarray(share)
        count = codes_per_level[level]
        found = kmeans(share, count, iterations=iterations, seed=seed + level, backend=backend)
        nearest = assign(share, found)
        left = float(((share - found[nearest]) ** 2).sum())
        spread = float(((share - share.mean(0, dtype=np.float64)) ** 2).sum())
        rest -= (spread - left) / total
        codes.append(nearest)
        centres.append(found)
        residual.append(rest)
    return ProductCodebooks(np.stack(codes, axis=1), tuple(centres), tuple(residual), rotation)


def rotation_backend(backend: str) -> str:
    """The k-means backend of OPQ, "faiss"; ValueError where it is not installed or not wanted."""
    if resolve_backend(backend) != "faiss":
        raise ValueError(
            "OPQ needs faiss; run `pip install faiss-cpu` and use backend='faiss', or leave the "
            "rotation out (PQ)"
        )
    return "faiss"


def _learn_rotation(vectors: np.ndarray, codes_per_level: tuple[int, ...], seed: int) -> np.ndarray:
    """faiss's OPQ rotation, float32 [d', d] with d' the next multiple of the levels."""
    import faiss

    levels, dim = len(codes_per_level), vectors.shape[1]
    padded = -(-dim // levels) * levels
    wide = np.zeros((vectors.shape[0], padded), dtype=np.float32)
    # About the origin a rotation would spend itself on the mean, which k-means finds anyhow.
    wide[:, :dim] = vectors - vectors.mean(0)
    # faiss rotates for codebooks of equal sizes, powers of two; ours are learnt afterwards.
    bits = max(1, min(codes_per_level).bit_length() - 1)
    quantizer = faiss.ProductQuantizer(padded, levels, bits)
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    opq = faiss.OPQMatrix(padded, levels)
    opq.pq = quantizer
    opq.train(wide)
    matrix = faiss.vector_to_array(opq.A).reshape(padded, padded)
    return np.ascontiguousarray(matrix[:, :dim])
