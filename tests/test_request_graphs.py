"""RequestGraphs: the bits of Recommender.batch and decode from graphs of a few batch sizes.

What surrounds a graph is tested on the CPU, with a graph that only calls the operators. Streams,
captures and replays need a GPU: test_request_graphs_on_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from captured_graphs import (
    FakeGraph,
    assert_same,
    copied,
    fake_graphs,
    fields,
    make,
    make_model,
    other_catalogue,
    run_threads,
)
from request_models import ASK, MAX_ITEMS, capture, histories_of, make_fused

import sidmlp_kernels as sk
from sidmlp_kernels import Batch, Requests


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    """Every graph made, in order."""
    yield from fake_graphs(monkeypatch)


@pytest.fixture
def model() -> sk.Recommender:
    return make_fused()


def whole(model: sk.Recommender, histories: Any, **options: Any) -> sk.Recommendations:
    exclude = options.pop("exclude", None)
    return model.decode(model.batch(histories, **options), **ASK, exclude=exclude)


def test_models_that_have_no_graphs_of_requests(model: sk.Recommender, fake) -> None:
    with pytest.raises(ValueError, match="capture_requests: expected a model on a GPU, got one on"):
        model.capture_requests()
    with pytest.raises(ValueError, match="capture_requests: expected a model with an encoder"):
        capture(make_model(make()))
    with pytest.raises(ValueError, match=r"as an operator, got plain PyTorch \(as asked for\); "):
        capture(make_fused(encoder_form="torch"))
    assert not fake


@pytest.mark.parametrize("max_excluded", [0, 9])
def test_padding_changes_no_bit(fake, model: sk.Recommender, max_excluded: int) -> None:
    """In any order of batch sizes and lengths: what an earlier batch left must not be seen."""
    graphs = capture(model, max_excluded=max_excluded)
    random = np.random.default_rng(0)
    for turn in range(60):
        histories = histories_of(model, int(random.integers(0, 9)), turn)
        users = [None, 4, 2, 9, 0, None, 1, 8][: len(histories)] if turn % 3 else None
        exclude = None
        if max_excluded and turn % 4:
            exclude = [list(history) for history in histories]
        wanted = whole(model, histories, users=users, exclude=exclude)
        got = graphs.recommend(histories, users, exclude=exclude)
        assert_same(got, wanted, f"turn {turn}: {len(histories)} histories")
        lists = graphs.recommend_lists(tuple(histories) if turn % 2 else histories, users, "raise",
                                       exclude)  # fmt: skip
        assert lists == wanted.item_lists(), turn
        got = graphs.decode(model.batch(histories, users), exclude)
        assert_same(got, wanted, f"turn {turn}: {len(histories)} requests")
    assert [graph.size for graph in fake] == [3, 8]


def test_batches_of_ones_own_with_holes_and_few_tokens(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    for requests, tokens in ((8, 4), (2, 12), (8, 0), (5, 7), (0, 3)):
        ids = torch.randint(0, model.tokens.vocab_size, (requests, tokens))
        batch = Batch(ids, torch.rand(requests, tokens) < 0.6)
        assert_same(graphs.decode(batch), model.decode(batch, **ASK), f"{requests} x {tokens}")


def test_smallest_batch_size_that_holds_the_requests(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    for requests, size in ((0, 3), (3, 3), (4, 8), (8, 8)):
        runs = {graph.size: graph.runs for graph in fake}
        graphs.recommend(histories_of(model, requests))
        assert [graph.size for graph in fake if graph.runs > runs[graph.size]] == [size]


def test_results_own_their_memory(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    first = graphs.recommend(histories_of(model, 3))
    before = copied(first)
    second = graphs.recommend(histories_of(model, 3, 1))
    assert_same(first, before)
    for tensor in fields(second):
        tensor.zero_()
    assert_same(graphs.recommend(histories_of(model, 3)), before)


def test_host_memory_is_kept_and_not_returned_by_a_call_that_fails(
    fake, model: sk.Recommender
) -> None:
    graphs = capture(model)
    for turn in range(4):
        graphs.recommend(histories_of(model, 2, turn))
        graphs.recommend(histories_of(model, 7, turn))
    kept = {size: list(some) for size, some in graphs._staging.items()}
    assert {size: len(some) for size, some in kept.items()} == {3: 1, 8: 1}
    with pytest.raises(ValueError, match=r"histories\[1\]: expected items that"):
        graphs.recommend([[], [-5]])
    assert not graphs._staging[3], "taken by the call that failed"
    wanted = whole(model, histories_of(model, 2))
    assert_same(graphs.recommend(histories_of(model, 2)), wanted)
    assert len(graphs._staging[3]) == 1


def test_unknown_items(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    known = model.catalogue.item_ids[:3].tolist()
    got = graphs.recommend([[known[0], -7, known[1]], [-8]], unknown="drop")
    assert_same(got, whole(model, [known[:2], []]))
    short = capture(model, tokens=2 + 3 * len(model.tokens.code_offsets))
    many = [[-1] * 9 + known]  # only the three known ones need a place
    assert_same(short.recommend(many, unknown="drop"), whole(model, [known]))
    with pytest.raises(ValueError, match=r"histories\[0\]: expected items that the catalogue"):
        short.recommend(many)


def test_swaps_and_stock_capture_again(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    histories = histories_of(model, 4)
    model.swap(other_catalogue(make(), 1))
    assert_same(graphs.recommend(histories), whole(model, histories))  # their items stay known
    assert [graph.size for graph in fake] == [3, 8, 8]
    best = graphs.recommend(histories).items[:, 0].tolist()
    model.set_available(best, False)
    got = graphs.recommend(histories)
    assert_same(got, whole(model, histories))
    assert not set(best) & set(got.items.flatten().tolist())
    graphs.refresh()
    assert [graph.size for graph in fake] == [3, 8, 8, 8, 3]


def test_a_stream_of_batches(fake, model: sk.Recommender) -> None:
    graphs = capture(model, max_excluded=8)
    batches: list[Any] = [histories_of(model, n, n) for n in (3, 8, 0, 5)]
    wanted = [whole(model, batch) for batch in batches]
    exclude = [recs[:2] for recs in wanted[1].items.tolist()]
    batches += [Requests(batches[1], exclude=exclude), histories_of(model, 9), batches[0]]
    stream = graphs.decode_stream(batches, depth=3)
    for right in wanted:
        assert_same(next(stream), right)
    assert_same(next(stream), whole(model, batches[1], exclude=exclude))
    with pytest.raises(ValueError, match=r"^batches\[5\]: batch: expected at most 8 requests"):
        next(stream)
    assert_same(next(stream), wanted[0])
    with pytest.raises(ValueError, match="unknown: expected"):
        graphs.decode_stream([], unknown="keep")


def test_threads(fake, model: sk.Recommender) -> None:
    graphs = capture(model)
    every = [histories_of(model, 8, 1), histories_of(model, 2, 2), histories_of(model, 8, 3)]
    wanted = [whole(model, histories) for histories in every]

    def serve(n: int) -> None:
        for turn in range(40):
            assert_same(graphs.recommend(every[n]), wanted[n], f"thread {n}, turn {turn}")

    run_threads(*(lambda n=n: serve(n) for n in range(3)))
    assert len(graphs._staging[8]) <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, m: g.recommend([[]] * 9), "batch: expected at most 8 requests, .* got 9; split"),
        (lambda g, m: g.recommend(5), "histories: expected one sequence of item ids per request"),
        (lambda g, m: g.recommend([[]], [1, 2]), "users: expected one id per request, 1, got 2"),
        (lambda g, m: g.recommend([[]], unknown="ask"), "unknown: expected"),
        (lambda g, m: g.recommend_lists([[], [1.0]]), r"histories\[1\]: expected integers"),
        (lambda g, m: g.recommend_lists([m.catalogue.item_ids[:4].tolist()]), "at most 11 tokens"),
        (lambda g, m: g.recommend([[]], exclude=[[1]]), "at most max_excluded=0 item ids"),
        (lambda g, m: g.recommend([[]], exclude=[]), "exclude: expected one sequence of item ids"),
        (lambda g, m: g.decode([[1]]), "batch: expected a Batch, got list"),
        (lambda g, m: g.decode(m.batch([[]] * 9)), "batch: expected at most 8 requests"),
        (
            lambda g, m: g.decode(m.batch([m.catalogue.item_ids[:4]])),
            "at most 11 tokens a request, as captured, got 14; capture with tokens=14",
        ),
        (
            lambda g, m: g.decode(Batch(torch.full((1, 3), 10**6), torch.ones(1, 3).bool())),
            "batch: expected token ids",
        ),
        (
            lambda g, m: g.decode(m.batch([[]]).to("meta")),
            "batch: expected tensors on cpu, got meta",
        ),
    ],
)
def test_wrong_requests(fake, model: sk.Recommender, call: Any, message: str) -> None:
    graphs = capture(model, tokens=11)
    with pytest.raises(ValueError, match=message):
        call(graphs, model)
    assert not any(graph.runs for graph in fake)


def test_capture_hands_its_arguments_on(fake, model: sk.Recommender) -> None:
    model._need_gpu = lambda *_: None  # type: ignore[method-assign]
    levels = len(model.tokens.code_offsets)
    graphs = model.capture_requests()
    assert graphs.batch_sizes == (1, 8, 32, 128, 512)
    assert (graphs.tokens, graphs.max_excluded) == (2 + MAX_ITEMS * levels, 0)
    thirds = tuple(0.5 + level for level in range(levels))
    graphs = model.capture_requests((2,), 11, 3, 20, thirds, thirds[::-1], "codebook", 9)
    plan, inputs = fake[-1].plan, fake[-1].inputs
    assert (plan.k, plan.num_beams, plan.normalisation) == (3, 20, "codebook")
    assert (plan.temperatures, plan.level_weights) == (thirds, thirds[::-1])
    assert inputs.requests.ids.shape == (2, 11)
    assert inputs.exclusion.ids.shape == (2 * 9,)
    assert "batch_sizes=(2,), tokens=11" in repr(graphs)
