"""What every tokenizer returns, and what each asks of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Codebooks:
    """What a tokenizer learnt; a vector is the sum of its centres, one a level.

    codes: int64 [N, levels], 0-based; centres: one float32 [C_l, d] per level;
    residual: share of the vectors' squared deviation from their mean left after each level.
    """

    codes: np.ndarray
    centres: tuple[np.ndarray, ...]
    residual: tuple[float, ...]

    def reconstruct(self) -> np.ndarray:
        """The vectors that the codes stand for, float32 [N, d]."""
        levels = zip(self.centres, self.codes.T, strict=True)
        return np.stack([centres[chosen] for centres, chosen in levels]).sum(axis=0)

    def used(self) -> tuple[int, ...]:
        """How many codes of each level some item has."""
        return tuple(len(np.unique(chosen)) for chosen in self.codes.T)


def check_request(vectors: np.ndarray, codes_per_level: tuple[int, ...]) -> None:
    """ValueError unless ``vectors`` are finite, [N, d], and give each level its codes' worth."""
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"vectors must be [N, d] and not empty, got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ValueError(f"vectors must be finite, row {row} is not; mend or leave out that item")
    if not codes_per_level or min(codes_per_level) < 1:
        raise ValueError(f"codes_per_level must be positive counts, got {codes_per_level}")
    if max(codes_per_level) > vectors.shape[0]:
        raise ValueError(
            f"codes_per_level must not exceed the number of items ({vectors.shape[0]}), "
            f"got {codes_per_level}; use fewer codes"
        )


def deviation(vectors: np.ndarray) -> float:
    """Summed squared deviation of ``vectors`` [N, d] from their mean; 1 where there is none."""
    wide = vectors.astype(np.float64)
    return float(((wide - wide.mean(0)) ** 2).sum()) or 1.0
