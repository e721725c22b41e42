"""Recommender while its catalogue is swapped and its stock changes: answers of one version each."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from small_recommender import (
    ITEMS,
    TOKENS,
    assert_bits,
    assert_same,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
    reference,
)

import sidmlp_kernels as sk

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture
def bare() -> sk.Recommender:
    """Without an encoder; a test's own."""
    return sk.Recommender(make_student(), make_catalogue())


def test_swap_replaces_items_and_keeps_what_histories_may_contain() -> None:
    old, new = make_catalogue(), make_catalogue(seed=5, first_id=140)
    model = sk.Recommender(make_student(), old, make_encoder(), tokens=TOKENS)
    before = model.batch([[100, 101], [150]])
    states, mask = make_states()
    model.swap(new)
    assert model.catalogue is new
    recs = model.decode_states(states, mask, k=10, num_beams=30)
    assert recs.catalogue_version == new.version > old.version
    assert_same(recs, reference(states, mask, new, 10, 30))
    # 100 is delisted and still counts, 150 has the new codes, 199 is new.
    tokens = model.batch([[100, 101], [150], [199]]).ids
    assert torch.equal(tokens[0], before.ids[0])
    offsets = np.array(TOKENS.code_offsets)
    assert tokens[1, 1:4].tolist() == (new.codes[10] + offsets).tolist()
    assert tokens[2, 1:4].tolist() == (new.codes[59] + offsets).tolist()
    assert len(model.known_items) == 100
    # A batch made before the swap is still a batch.
    assert model.decode(before, k=3).catalogue_version == new.version
    model.swap(old)
    assert model.decode(before, k=3).catalogue_version == old.version
    assert model.batch([[199]]).ids[0, 1:4].tolist() == tokens[2, 1:4].tolist()


def test_swap_to_a_catalogue_that_does_not_fit_changes_nothing(bare) -> None:
    version = bare.catalogue.version
    for codes, message in (
        ([[0, 1]], "expected 3 levels of at most .* got"),
        ([[6, 0, 0]], r"expected 3 levels of at most \[6, 5, 7\] codes as in the student"),
    ):
        with pytest.raises(ValueError, match=message):
            bare.swap(sk.Catalogue.from_codes(codes))
    with pytest.raises(ValueError, match="catalogue: expected a Catalogue, got list"):
        bare.swap([[0, 1, 2]])
    assert bare.catalogue.version == version


@pytest.mark.parametrize("through", ["model", "catalogue"])
def test_stock_changes_the_items_and_no_score(bare, through: str) -> None:
    states, mask = make_states()
    everything = bare.decode_states(states, mask, k=ITEMS, num_beams=5_000)
    best = everything.items[:, 0].tolist()
    (bare if through == "model" else bare.catalogue).set_available(best, False)
    recs = bare.decode_states(states, mask, k=ITEMS, num_beams=5_000)
    assert recs.catalogue_version == bare.catalogue.version > everything.catalogue_version
    score_of = [dict(zip(i, s, strict=True)) for i, s in pairs(everything)]
    for (items, scores), wanted in zip(pairs(recs), score_of, strict=True):
        assert not set(best) & set(items)
        assert sorted([*items, *set(best)]) == sorted(wanted)
        assert scores == [wanted[item] for item in items]
    bare.set_available(best, True)
    assert_bits(bare.decode_states(states, mask, k=ITEMS, num_beams=5_000), everything)
    with pytest.raises(ValueError, match="set_available: expected ids of this catalogue"):
        bare.set_available([100, 12345], False)


def pairs(recs: sk.Recommendations) -> list[tuple[list[int], list[float]]]:
    counts = recs.counts.tolist()
    return [(recs.items[b, :n].tolist(), recs.scores[b, :n].tolist()) for b, n in enumerate(counts)]


def test_answers_are_never_torn_while_others_swap_and_change_stock(bare) -> None:
    """Every answer must equal, bit for bit, that of its version; ids of catalogues are disjoint."""
    states, mask = make_states()
    catalogues = [make_catalogue(seed, 1000 * (seed + 1)) for seed in range(3)]
    wanted = {}
    for catalogue in catalogues:
        answer = sk.Recommender(make_student(), catalogue).decode_states(states, mask, k=8)
        wanted[catalogue.version] = answer
    bare.swap(catalogues[0])
    answers: list[list[sk.Recommendations]] = [[] for _ in range(3)]
    failures: list[BaseException] = []
    stop = threading.Event()

    def serve(mine: list[sk.Recommendations]) -> None:
        try:
            while not stop.is_set():
                mine.append(bare.decode_states(states, mask, k=8))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    stocked = make_catalogue(7, 9000)
    full = sk.Recommender(make_student(), stocked).decode_states(states, mask, k=8)
    deadline = time.monotonic() + 10
    round_ = 0
    while time.monotonic() < deadline:
        round_ += 1
        versions = [len({recs.catalogue_version for recs in mine[:]}) for mine in answers]
        if round_ > 60 and min(versions) >= 4:  # each thread was overtaken by swaps
            break
        time.sleep(0.0005)
        bare.swap(catalogues[round_ % 3])
        if round_ % 10 == 9:
            bare.swap(stocked)
            for _ in range(3):
                bare.set_available(range(9000, 9030), False)
                bare.set_available(range(9000, 9030), True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    seen = [recs for mine in answers for recs in mine]
    assert len({recs.catalogue_version for recs in seen}) >= 4
    for recs in seen:
        if recs.catalogue_version in wanted:
            assert_bits(recs, wanted[recs.catalogue_version])
        elif (recs.items < 9030).any():  # all 30 were in stock, or none
            assert_bits(recs, full)
        else:
            assert (recs.items < 9060).all()
    # One thread's own swap is visible to it at once.
    bare.swap(catalogues[1])
    assert bare.decode_states(states, mask, k=8).catalogue_version == catalogues[1].version
