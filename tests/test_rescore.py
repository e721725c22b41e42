"""`rescore`: the callable's order of the student's items, and callables that answer nonsense."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_recommender import (
    CODES,
    TOKENS,
    assert_bits,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
)
from torch import Tensor

import sidmlp_kernels as sk

pytestmark = pytest.mark.usefixtures("cpu_only")

BEAMS = 20
HISTORIES = [[101, 102], [130], [], [150, 151, 152], [101, 140]]
EXCLUDE = [[101, 102, 999], None, [120, 121], [], list(range(100, 150))]


@pytest.fixture(scope="module")
def model(cpu_only: None) -> sk.Recommender:
    """With items of one semantic ID, and some out of stock."""
    codes = np.random.default_rng(0).integers(0, CODES, (60, 3))
    codes[40:50] = codes[10:20]
    catalogue = sk.Catalogue.from_codes(codes, np.arange(100, 160), CODES)
    made = sk.Recommender(
        make_student(), catalogue, make_encoder(), "cpu", "float32", tokens=TOKENS
    )
    made.set_available([103, 115, 142], [False] * 3)
    return made


def by_codes(grid: float = 0.0):
    """Scores that are a fixed random function of the codes; of a coarse grid, full of ties."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(CODES, generator=generator)
    if grid:
        values = (values / grid).round() * grid

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        first, second, third = codes.long().clamp(min=0).unbind(-1)
        return values[first, second, third]

    return score


def naive(proposed: sk.Recommendations, scores: Tensor, k: int) -> sk.Recommendations:
    """One request and one candidate after the other."""
    levels = len(CODES)
    batch = len(proposed)
    items = torch.full((batch, k), -1)
    best = torch.full((batch, k), -torch.inf)
    codes = torch.full((batch, k, levels), -1, dtype=torch.int32)
    counts = []
    for row in range(batch):
        real = range(int(proposed.counts[row]))
        order = sorted(real, key=lambda c: (-float(scores[row, c]), c))[:k]
        counts.append(len(order))
        for rank, candidate in enumerate(order):
            items[row, rank] = proposed.items[row, candidate]
            best[row, rank] = scores[row, candidate]
            codes[row, rank] = proposed.codes[row, candidate]
    return sk.Recommendations(items, best, codes, torch.tensor(counts, dtype=torch.int32), 0)


@pytest.mark.parametrize("grid", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("k", [1, 7, BEAMS])
@pytest.mark.parametrize("exclude", [None, EXCLUDE])
def test_the_order_is_the_callables(model, grid, k, exclude) -> None:
    batch, score = model.batch(HISTORIES), by_codes(grid)
    proposed = model.decode(batch, BEAMS, BEAMS, exclude)
    found = model.decode(batch, k, BEAMS, exclude, rescore=score)
    scores = score(torch.empty(0), torch.empty(0), proposed.codes, proposed.counts)
    assert_bits(found, naive(proposed, scores, k))
    assert found.catalogue_version == proposed.catalogue_version
    shown = set(found.items.flatten().tolist())
    assert not shown & {103, 115, 142}
    if exclude:
        assert min(found.counts.tolist()) < BEAMS
        assert not shown & {999}


def test_decode_states_rescores_alike(model) -> None:
    batch, score = model.batch(HISTORIES), by_codes()
    states = model._states(batch.ids, batch.mask)
    found = model.decode_states(states, batch.mask, 7, BEAMS, EXCLUDE, rescore=score)
    assert_bits(found, model.decode(batch, 7, BEAMS, EXCLUDE, rescore=score))


def test_equal_scores_leave_the_students_order(model) -> None:
    batch = model.batch(HISTORIES)
    same = model.decode(
        batch, 5, BEAMS, rescore=lambda s, m, codes, n: torch.zeros(codes.shape[:2])
    )
    plain = model.decode(batch, 5, BEAMS)
    assert torch.equal(same.items, plain.items)
    assert torch.equal(same.codes, plain.codes)
    assert same.scores.tolist() == [[0.0] * 5] * len(HISTORIES)


def test_options_of_the_decode_reach_the_student(model) -> None:
    batch, score = model.batch(HISTORIES), by_codes()
    options = {"temperatures": [0.5, 2.0, 1.0], "normalisation": "codebook"}
    proposed = model.decode(batch, 6, 6, **options)
    assert not torch.equal(proposed.items, model.decode(batch, 6, 6).items)
    found = model.decode(batch, 6, 6, rescore=score, **options)
    assert found.items.sort().values.tolist() == proposed.items.sort().values.tolist()


def test_padding_is_last_and_unread(model) -> None:
    """-inf is a score like any other: real items with it stand before padding, which may be NaN."""
    batch = model.batch(HISTORIES)

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        return torch.where(codes[..., 0] < 0, math.nan, -torch.inf)

    exclude = [list(range(100, 157))] * len(HISTORIES)
    found = model.decode(batch, 10, 64, exclude, rescore=score)  # 64 beams lose no prefix
    assert found.counts.tolist() == [3] * len(HISTORIES)
    for items in found.items.tolist():
        assert sorted(items[:3]) == [157, 158, 159]
        assert items[3:] == [-1] * 7
    assert (found.codes[:, 3:] == -1).all()
    assert (found.scores == -torch.inf).all()


def test_items_of_one_semantic_id_stay_together(model) -> None:
    """Even if the callable's arithmetic tells equal rows apart."""
    batch = model.batch(HISTORIES)

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        return torch.rand(codes.shape[:2], generator=torch.Generator().manual_seed(1))

    found = model.decode(batch, BEAMS, BEAMS, rescore=score)
    pairs = 0
    for items, codes, scores in zip(found.items, found.codes, found.scores, strict=True):
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, own in enumerate(codes.tolist()):
            groups.setdefault(tuple(own), []).append(rank)
        for ranks in groups.values():
            assert ranks == list(range(ranks[0], ranks[0] + len(ranks)))
            assert items[ranks].tolist() == sorted(items[ranks].tolist())
            assert len(set(scores[ranks].tolist())) == 1
            pairs += len(ranks) > 1
    assert pairs > 0


def test_the_order_is_that_of_the_callables_dtype(model) -> None:
    batch = model.batch(HISTORIES)

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        # Equal in float32.
        rank = torch.arange(codes.shape[1], dtype=torch.float64)
        return (1 + 1e-12 * rank).expand(codes.shape[:2])

    groups = model.decode(batch, BEAMS, BEAMS, rescore=score)
    plain = model.decode(batch, BEAMS, BEAMS)
    assert groups.scores.dtype == torch.float32
    assert not torch.equal(groups.items, plain.items)
    assert torch.equal(groups.codes[:, 0], plain.codes[:, -1])


def test_what_the_callable_gets(model) -> None:
    batch, calls = model.batch(HISTORIES), []

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        calls.append((states, mask, codes, counts, torch.is_grad_enabled()))
        return (codes[..., 0].float() + torch.ones(1, requires_grad=True)).requires_grad_()

    found = model.decode(batch, 5, BEAMS, EXCLUDE, rescore=score)
    assert not found.scores.requires_grad
    ((states, mask, codes, counts, grad),) = calls
    assert not grad
    assert torch.equal(states, model._states(batch.ids, batch.mask))
    assert torch.equal(mask, batch.mask)
    proposed = model.decode(batch, BEAMS, BEAMS, EXCLUDE)
    assert torch.equal(codes, proposed.codes)
    assert torch.equal(counts, proposed.counts)
    assert (codes.dtype, counts.dtype) == (torch.int32, torch.int32)


def test_an_empty_batch_asks_nobody(model) -> None:
    def score(*_: Tensor) -> Tensor:
        raise AssertionError("nothing to score")

    found = model.decode(model.batch([]), 5, BEAMS, rescore=score)
    assert found.items.shape == (0, 5)
    assert found.codes.shape == (0, 5, 3)


def test_a_dead_request_harms_nobody(model) -> None:
    """States that are not finite: no candidates, and a NaN score there is no mistake."""
    states, mask = make_states()
    mask[:, 0] = True
    states[2, 0] = math.nan

    def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        valid = torch.where(mask[..., None], states, 0.0)
        return codes[..., 1].float() + valid.sum((1, 2))[:, None]

    found = model.decode_states(states, mask, 5, BEAMS, rescore=score)
    assert found.counts.tolist() == [5, 5, 0, 5, 5]
    others = [0, 1, 3, 4]
    alone = model.decode_states(states[others], mask[others], 5, BEAMS, rescore=score)
    assert torch.equal(found.items[others], alone.items)


class TestMistakes:
    @pytest.mark.parametrize("wrong", ["teacher", 3, torch.ones(2)])
    def test_no_callable(self, model, wrong) -> None:
        with pytest.raises(ValueError, match="rescore: expected None or a callable"):
            model.decode(model.batch(HISTORIES), 5, BEAMS, rescore=wrong)
        with pytest.raises(ValueError, match="rescore: expected None or a callable"):
            model.decode_states(*make_states(), 5, BEAMS, rescore=wrong)

    @pytest.mark.parametrize(
        "answer",
        [
            lambda shape: None,
            lambda shape: np.zeros(shape),
            lambda shape: (torch.zeros(shape),),
            lambda shape: torch.zeros(shape, dtype=torch.int64),
            lambda shape: torch.zeros(shape[0], shape[1] - 1),
            lambda shape: torch.zeros(shape[1], shape[0]),
            lambda shape: torch.zeros(*shape, 1),
            lambda shape: torch.zeros(shape, device="meta"),
        ],
        ids=["none", "numpy", "tuple", "int", "short", "transposed", "3-D", "device"],
    )
    def test_scores_that_do_not_fit(self, model, answer) -> None:
        def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> object:
            return answer(tuple(codes.shape[:2]))

        with pytest.raises(ValueError, match=r"rescore's scores: expected .*\[5, 20\] on cpu, got"):
            model.decode(model.batch(HISTORIES), 5, BEAMS, rescore=score)

    def test_nan_names_the_request(self, model) -> None:
        def score(states: Tensor, mask: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
            scores = torch.zeros(codes.shape[:2])
            scores[3, 2], scores[3, 4], scores[4, 0] = math.nan, math.nan, math.nan
            return scores

        with pytest.raises(ValueError, match=r"request 3, candidate 2 .*3 NaN in 2 requests"):
            model.decode(model.batch(HISTORIES), 5, BEAMS, rescore=score)

    def test_what_the_callable_raises_passes(self, model) -> None:
        def score(*_: Tensor) -> Tensor:
            raise KeyError("of the caller's")

        with pytest.raises(KeyError, match="of the caller's"):
            model.decode(model.batch(HISTORIES), 5, BEAMS, rescore=score)

    def test_k_is_bounded_by_the_beams(self, model) -> None:
        with pytest.raises(ValueError, match="k: expected at most num_beams=20"):
            model.decode(model.batch(HISTORIES), 21, BEAMS, rescore=by_codes())


def test_swapped_and_one_item_catalogues(cpu_only: None) -> None:
    model = sk.Recommender(
        make_student(), make_catalogue(), make_encoder(), "cpu", "float32", tokens=TOKENS
    )
    batch = model.batch(HISTORIES)
    model.swap(sk.Catalogue.from_codes([[1, 2, 3]], [7], CODES))
    found = model.decode(batch, 3, BEAMS, rescore=by_codes())
    assert found.items.tolist() == [[7, -1, -1]] * len(HISTORIES)
    assert found.catalogue_version == model.decode(batch, 3, BEAMS).catalogue_version
