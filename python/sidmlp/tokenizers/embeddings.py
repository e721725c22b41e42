"""Item vectors to tokenise: given ones, or ones made of co-occurrence in training sequences."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from sidmlp.data import Interactions, Split

from .array_files import read_array
from .svd import truncated_svd

logger = logging.getLogger(__name__)


def load_vectors(path: Path, num_items: int, name: str | None = None) -> np.ndarray:
    """Item vectors float32 [num_items, d] of a file, row i for dense item i.

    The file is ``.npy``, ``.npz`` or ``.safetensors``; of several arrays ``name`` says which.
    """
    vectors = read_array(path, name)
    if vectors.ndim != 2 or vectors.shape[0] != num_items:
        raise ValueError(
            f"{path} must have one row per item, [{num_items}, d], got shape {vectors.shape}; make "
            "the vectors of the same data, in the order of its items"
        )
    if not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(
            f"{path} must hold floating-point numbers, got {vectors.dtype}; convert them"
        )
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{path} must hold finite numbers of 32 bits, {bad.size} rows are not, the first is "
            f"row {bad[0]}; mend them, or leave those items out of the data"
        )
    return vectors


def cooccurrence_vectors(
    data: Interactions, split: Split, dim: int = 64, window: int = 5, seed: int = 0
) -> np.ndarray:
    """Item vectors float32 [num_items, dim] from who is near whom in the training sequences.

    X_ij = max(0, log(n_ij n / (n_i n_j))), the positive pointwise mutual information of items at
    most ``window`` apart; with X = U S V^T truncated to ``dim``, the vectors are U S^(1/2).
    Items that training never sees get zeros. Validation and test positions are not read.
    """
    num_items = data.num_items
    logger.info("item vectors: counting items chosen together, then an SVD of width %d", dim)
    keys, counts = _pairs(data, split, window)
    if not keys.size:
        return np.zeros((num_items, dim), dtype=np.float32)
    left, right = keys // num_items, keys % num_items
    alone = num_items - len(np.unique(keys // num_items))
    if alone:
        logger.info("%d items are near no other in training; their vectors are all alike", alone)
    marginal = np.bincount(left, weights=counts, minlength=num_items)
    information = np.log(counts * counts.sum() / (marginal[left] * marginal[right]))
    keep = information > 0
    indices = torch.from_numpy(np.stack([left[keep], right[keep]]))
    matrix = torch.sparse_coo_tensor(
        indices, torch.from_numpy(information[keep]), (num_items, num_items), check_invariants=True
    ).coalesce()
    u, s = truncated_svd(matrix, dim, seed)
    vectors = np.zeros((num_items, dim), dtype=np.float32)
    vectors[:, : s.numel()] = (u * s.sqrt()).numpy()
    return vectors


def _pairs(data: Interactions, split: Split, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Ordered pairs i * num_items + j of items 1..window apart in training, and their counts."""
    user = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    end = split.train_end[user]
    positions = np.arange(data.items.size)
    found = []
    for distance in range(1, window + 1):
        near = positions[positions + distance < end]
        a, b = data.items[near], data.items[near + distance]
        found += [a * data.num_items + b, b * data.num_items + a]
    keys, counts = np.unique(np.concatenate(found), return_counts=True)
    return keys, counts.astype(np.float64)
