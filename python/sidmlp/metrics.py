"""Recall@k and NDCG@k of recommendations with one relevant item per user, user by user.

    Recall@k = 1 if the target stands among the first k items, else 0
    NDCG@k   = 1 / log2(1 + r) for a target at rank r = 1..k, else 0 (the ideal DCG is 1)

The per-user values come along with the mean, so that two decodes can be compared by the number of
users who differ and not by a mean that hides them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """The mean over users (NaN without users) and every user's own value."""

    mean: float
    per_user: Tensor  # float64 [B]


def _metric(per_user: Tensor) -> Metric:
    return Metric(float(per_user.mean()), per_user)


def target_ranks(items: Tensor, targets: Tensor, k: int) -> Tensor:
    """The 0-based rank of each user's target among the first k items, k where it is absent.

    items int64 [B, >= k], best first, -1 = no item; targets int64 [B], >= 0 -> int64 [B].
    Raises ValueError for shapes that do not fit, k out of range and negative targets.
    """
    if items.ndim != 2 or targets.shape != items.shape[:1]:
        raise ValueError(
            f"targets: expected one id for each row of items {list(items.shape)}, got "
            f"{list(targets.shape)}; pass items [users, ranks] and targets [users]"
        )
    if not 1 <= k <= items.shape[1]:
        raise ValueError(
            f"k: expected 1..{items.shape[1]}, as many ranks as items has, got {k}; "
            f"decode with a larger k"
        )
    if bool((targets < 0).any()):
        raise ValueError(
            f"targets: expected ids >= 0, got {int(targets.min())}; "
            f"-1 pads results, so it can be no target"
        )
    hits = items[:, :k] == targets[:, None]
    # argmax gives the first of equal values, so a repeated item counts at its best rank.
    return torch.where(hits.any(dim=1), hits.long().argmax(dim=1), k)


def recall_at_k(items: Tensor, targets: Tensor, k: int) -> Metric:
    """Recall@k of items int64 [B, >= k] for targets int64 [B]; raises as `target_ranks` does."""
    return _metric((target_ranks(items, targets, k) < k).double())


def ndcg_at_k(items: Tensor, targets: Tensor, k: int) -> Metric:
    """NDCG@k of items int64 [B, >= k] for targets int64 [B]; raises as `target_ranks` does."""
    rank = target_ranks(items, targets, k)
    return _metric(torch.where(rank < k, 1 / torch.log2(rank.double() + 2), 0.0))


def users_that_differ(left: Metric, right: Metric) -> int:
    """How many users have another value in `right` than in `left`; ValueError if lengths differ."""
    if left.per_user.shape != right.per_user.shape:
        raise ValueError(
            f"right: expected {len(left.per_user)} users as in left, got {len(right.per_user)}; "
            f"compare metrics of the same users"
        )
    return int((left.per_user != right.per_user).sum())
