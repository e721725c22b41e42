"""Residual k-means: item vectors to semantic IDs, and the level that tells equal ones apart.

Level 1 clusters the vectors; level l clusters what is left of them after subtracting the centres
chosen so far. Items with all codes equal get one more code, a counter, as TIGER does (Rajput et
al. 2023, section 3.1).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from sidmlp.progress import bar

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "faiss", "torch")


@dataclass(frozen=True)
class Codebooks:
    """What residual k-means learnt.

    codes: int64 [N, levels], 0-based; centres: one float32 [C_l, d] per level;
    residual: share of the vectors' squared deviation from their mean left after each level.
    """

    codes: np.ndarray
    centres: tuple[np.ndarray, ...]
    residual: tuple[float, ...]


@dataclass(frozen=True)
class Collisions:
    """How many items share codes before de-duplication: items in groups, groups, the largest."""

    items: int
    groups: int
    largest: int

    def __str__(self) -> str:
        return f"{self.items} items in {self.groups} groups share an id (largest {self.largest})"


def residual_kmeans(
    vectors: np.ndarray,
    codes_per_level: tuple[int, ...],
    *,
    seed: int = 0,
    iterations: int = 50,
    backend: str = "auto",
) -> Codebooks:
    """Codes of ``vectors`` float32 [N, d] by k-means on residuals, level by level.

    backend: "faiss", "torch", or "auto" (faiss where it is installed; the choice is logged).
    Raises ValueError when a level asks for more codes than there are items.
    """
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"vectors must be [N, d] and not empty, got shape {vectors.shape}")
    if not codes_per_level or min(codes_per_level) < 1:
        raise ValueError(f"codes_per_level must be positive counts, got {codes_per_level}")
    if max(codes_per_level) > vectors.shape[0]:
        raise ValueError(
            f"codes_per_level must not exceed the number of items ({vectors.shape[0]}), "
            f"got {codes_per_level}; use fewer codes"
        )
    kmeans = {"faiss": _kmeans_faiss, "torch": _kmeans_torch}[resolve_backend(backend)]
    rest = np.ascontiguousarray(vectors, dtype=np.float32)
    total = float(((rest - rest.mean(0)) ** 2).sum()) or 1.0
    codes, centres, residual = [], [], []
    for level, count in enumerate(bar(codes_per_level, "codes")):
        found = kmeans(rest, count, iterations, seed + level)
        nearest = assign(rest, found)
        rest = rest - found[nearest]
        codes.append(nearest)
        centres.append(found)
        residual.append(float((rest**2).sum()) / total)
    return Codebooks(np.stack(codes, axis=1), tuple(centres), tuple(residual))


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


def assign(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each vector, the lower one of equals: int64 [N].

    Distances are float64, so the answer depends on the centres alone, not on who trained them.
    """
    wide = torch.from_numpy(centres).double()
    blocks = torch.from_numpy(vectors).split(4096)
    return torch.cat([torch.cdist(b.double(), wide).argmin(dim=1) for b in blocks]).numpy()


def deduplicate(codes: np.ndarray, max_codes: int = 256) -> tuple[np.ndarray, Collisions]:
    """Appends the level that makes every row unique: a counter over equal rows, in item order.

    codes: int64 [N, l]. Returns ([N, l + 1], what collided). Raises ValueError when a group is
    larger than ``max_codes``.
    """
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)  # numpy 2.0 alone returns it two-dimensional
    shared = sizes[sizes > 1]
    collisions = Collisions(int(shared.sum()), int(shared.size), int(sizes.max(initial=0)))
    if collisions.largest > max_codes:
        raise ValueError(
            f"{collisions.largest} items share all codes but the extra level has room for "
            f"{max_codes}; use more codes or levels, or better item vectors"
        )
    order = np.argsort(group, kind="stable")
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    counter = np.empty(len(codes), dtype=np.int64)
    counter[order] = np.arange(len(codes)) - first[group[order]]
    return np.concatenate([codes, counter[:, None]], axis=1), collisions


def _kmeans_faiss(vectors: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    import faiss

    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-vectors.shape[0] // count)),
    )
    kmeans.train(vectors)
    return np.ascontiguousarray(kmeans.centroids, dtype=np.float32)


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
