"""Recall and NDCG against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sidmlp.metrics import ndcg_at_k, recall_at_k, target_ranks, users_that_differ

ITEMS = torch.tensor([[7, 3, 9, 1], [4, 5, -1, -1], [8, 2, 6, 0], [-1, -1, -1, -1]])
TARGETS = torch.tensor([7, 5, 0, 3])


def test_recall_by_hand() -> None:
    assert recall_at_k(ITEMS, TARGETS, 1).per_user.tolist() == [1, 0, 0, 0]
    assert recall_at_k(ITEMS, TARGETS, 3).per_user.tolist() == [1, 1, 0, 0]
    assert recall_at_k(ITEMS, TARGETS, 4).per_user.tolist() == [1, 1, 1, 0]
    assert recall_at_k(ITEMS, TARGETS, 4).mean == 0.75


def test_ndcg_by_hand() -> None:
    got = ndcg_at_k(ITEMS, TARGETS, 4)
    expected = [1.0, 1 / math.log2(3), 1 / math.log2(5), 0.0]
    assert got.per_user.tolist() == pytest.approx(expected, abs=1e-15)
    assert got.mean == pytest.approx(sum(expected) / 4, abs=1e-15)
    assert ndcg_at_k(ITEMS, TARGETS, 3).per_user.tolist()[2] == 0.0


def test_ranks_and_a_repeated_item() -> None:
    assert target_ranks(ITEMS, TARGETS, 4).tolist() == [0, 1, 3, 4]
    assert target_ranks(torch.tensor([[5, 2, 2]]), torch.tensor([2]), 3).tolist() == [1]


def test_users_that_differ_sees_what_the_mean_hides() -> None:
    left = recall_at_k(torch.tensor([[1], [2]]), torch.tensor([1, 3]), 1)
    right = recall_at_k(torch.tensor([[9], [3]]), torch.tensor([1, 3]), 1)
    assert left.mean == right.mean
    assert users_that_differ(left, right) == 2
    assert users_that_differ(left, left) == 0


def test_no_users_have_no_mean() -> None:
    got = recall_at_k(ITEMS[:0], TARGETS[:0], 2)
    assert math.isnan(got.mean)
    assert got.per_user.shape == (0,)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k: expected 1\.\.4"):
        recall_at_k(ITEMS, TARGETS, 5)
    with pytest.raises(ValueError, match=r"k: expected 1\.\.4"):
        ndcg_at_k(ITEMS, TARGETS, 0)
    with pytest.raises(ValueError, match="targets: expected one id"):
        recall_at_k(ITEMS, TARGETS[:2], 1)
    with pytest.raises(ValueError, match="targets: expected ids >= 0, got -1"):
        recall_at_k(ITEMS, torch.tensor([7, 5, -1, 3]), 4)
    with pytest.raises(ValueError, match="right: expected 4 users"):
        users_that_differ(recall_at_k(ITEMS, TARGETS, 1), recall_at_k(ITEMS[:1], TARGETS[:1], 1))
