"""k-means on faiss or torch, and the one rule by which a vector finds its centre."""

from __future__ import annotations

import logging

import numpy as np
import torch

from sidmlp.progress import bar

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "faiss", "torch")


def resolve_backend(backend: str) -> str:
    """The backend that "auto" stands for here; an explicit one must be there or is a ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return backend
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            raise ValueError(
                "backend='faiss' needs faiss, which is not installed; "
                "run `pip install faiss-cpu` or use backend='torch'"
            ) from None
        logger.info("k-means runs on torch (faiss is not installed)")
        return "torch"
    if backend == "auto":
        logger.info("k-means runs on faiss")
    return "faiss"


def kmeans(
    vectors: np.ndarray, count: int, *, iterations: int, seed: int, backend: str
) -> np.ndarray:
    """Centres float32 [count, d] of ``vectors`` float32 [N, d]; backend: "faiss" or "torch"."""
    run = {"faiss": _kmeans_faiss, "torch": _kmeans_torch}[backend]
    return run(np.ascontiguousarray(vectors, dtype=np.float32), count, iterations, seed)


def assign(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each vector, the lower one of equals: int64 [N].

    Distances are float64, so the answer depends on the centres alone, not on who trained them.
    """
    wide = torch.from_numpy(centres).double()
    blocks = torch.from_numpy(vectors).split(4096)
    return torch.cat([torch.cdist(b.double(), wide).argmin(dim=1) for b in blocks]).numpy()


def _kmeans_faiss(vectors: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    import faiss

    found = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-vectors.shape[0] // count)),
    )
    found.train(vectors)
    return np.ascontiguousarray(found.centroids, dtype=np.float32)


def _kmeans_torch(vectors: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007)."""
    points = torch.from_numpy(vectors)
    generator = torch.Generator().manual_seed(seed)
    centres = _plus_plus(points, count, generator)
    for _ in bar(range(iterations), "k-means"):
        nearest = torch.from_numpy(assign(vectors, centres.numpy()))
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = sums / sizes.clamp(min=1)[:, None]
        empty = torch.nonzero(sizes == 0).flatten()
        if empty.numel():
            # An empty cluster restarts at the points that are served worst.
            distance = (points - centres[nearest]).square().sum(1)
            moved[empty] = points[distance.topk(empty.numel()).indices]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.numpy()


def _plus_plus(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    first = torch.randint(points.shape[0], (1,), generator=generator)
    centres = points[first]
    distance = (points - centres).square().sum(1)
    for _ in bar(range(count - 1), "k-means++"):
        # With fewer distinct points than centres all distances reach zero; then any point will do.
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        chosen = points[torch.multinomial(weights, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        distance = torch.minimum(distance, (points - chosen).square().sum(1))
    return centres
