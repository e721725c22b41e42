"""Small item vectors for the tests of tokenizers, and which k-means backends there are."""

from __future__ import annotations

import importlib.util

import numpy as np


def blobs(count: int, centres: int, dim: int, seed: int) -> np.ndarray:
    """Vectors float32 [count, dim] around ``centres`` places."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(centres, dim)) * 4
    return (places[rng.integers(centres, size=count)] + rng.normal(size=(count, dim))).astype(
        np.float32
    )


def backends() -> list[str]:
    """The explicit k-means backends that are installed."""
    return ["faiss", "torch"] if importlib.util.find_spec("faiss") else ["torch"]


def missed(vectors: np.ndarray, reconstruction: np.ndarray) -> float:
    """Share of the vectors' squared deviation from their mean that a reconstruction misses."""
    wide = vectors.astype(np.float64)
    return float(((wide - reconstruction) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum())
