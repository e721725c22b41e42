"""Truncated SVD of a sparse matrix, by a seeded randomised sketch (Halko et al. 2011)."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """U [n, r] and S [r] of a sparse float64 matrix [n, m], r = min(rank, n, m), S descending."""
    largest = min(matrix.shape)
    rank = min(rank, largest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The sketch is wider than the answer: a randomised SVD is poor in its last directions.
        u, s, _ = torch.svd_lowrank(matrix, q=min(rank + 16, largest), niter=4)
    return u[:, :rank], s[:rank]
