"""Residual k-means: item vectors to semantic IDs.

Level 1 clusters the vectors; level l clusters what is left of them after subtracting the centres
chosen so far.
"""

from __future__ import annotations

import numpy as np

from sidmlp.progress import bar

from .codebooks import Codebooks, check_request, deviation
from .kmeans import assign, kmeans, resolve_backend


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
    check_request(vectors, codes_per_level)
    backend = resolve_backend(backend)
    rest = np.ascontiguousarray(vectors, dtype=np.float32)
    total = deviation(rest)
    codes, centres, residual = [], [], []
    for level, count in enumerate(bar(codes_per_level, "codes")):
        found = kmeans(rest, count, iterations=iterations, seed=seed + level, backend=backend)
        nearest = assign(rest, found)
        rest = rest - found[nearest]
        codes.append(nearest)
        centres.append(found)
        residual.append(float((rest**2).sum()) / total)
    return Codebooks(np.stack(codes, axis=1), tuple(centres), tuple(residual))
