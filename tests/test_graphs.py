"""GraphDecoder: the bits of Recommender.decode_states from graphs of a few batch sizes.

What surrounds a graph (padding, exclusions, which graph answers, when an old one goes) is tested on
the CPU, with a graph that only calls the operator. Streams, captures and replays need a
GPU: test_graphs_on_gpu.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captured_graphs import (
    TOKENS,
    FakeGraph,
    assert_same,
    capture,
    copied,
    fake_graphs,
    fields,
    first_rows,
    make,
    make_model,
    other_catalogue,
    serve_while_swapping,
)

from sidmlp_kernels import captured_graph, graphs_by_size
from sidmlp_kernels.recommendations import PackedResults


@pytest.fixture
def fake(monkeypatch) -> Iterator[list[FakeGraph]]:
    """Every graph made, in order."""
    yield from fake_graphs(monkeypatch)


def test_models_on_the_cpu_have_no_graphs() -> None:
    with pytest.raises(ValueError, match="capture: expected a model on a GPU, got one on cpu; "):
        make_model(make()).capture()


def test_smallest_batch_size_that_holds_the_requests(fake) -> None:
    decoder = capture(make_model(make()), batch_sizes=[8, 3, 3, np.int64(5)])
    assert decoder.batch_sizes == (3, 5, 8)
    assert [graph.size for graph in fake] == [3, 5, 8], "captured ahead"
    problem = make()
    for batch, size in ((0, 3), (1, 3), (3, 3), (4, 5), (5, 5), (6, 8), (8, 8)):
        runs = {graph.size: graph.runs for graph in fake}
        decoder.decode_states(problem.states[:batch], problem.mask[:batch])
        assert [graph.size for graph in fake if graph.runs > runs[graph.size]] == [size]
    assert len(fake) == 3


@pytest.mark.parametrize("states_dtype", [None, "bfloat16", torch.float16])
@pytest.mark.parametrize("max_excluded", [0, 30])
def test_padding_changes_no_bit(fake, max_excluded: int, states_dtype) -> None:
    """In any order of batch sizes and lengths: what an earlier batch left must not be seen."""
    problem = make(1)
    model = make_model(problem)
    decoder = capture(model, max_excluded=max_excluded, states_dtype=states_dtype)
    states = problem.states.to(decoder.states_dtype)
    random = np.random.default_rng(0)
    for turn in range(120):
        batch, tokens = int(random.integers(0, 9)), int(random.choice([0, 1, 7, TOKENS]))
        rows = torch.from_numpy(random.permutation(8)[:batch])
        exclude = [problem.exclude[b] for b in rows] if max_excluded and turn % 3 else None
        arguments = states[rows][:, :tokens], problem.mask[rows][:, :tokens]
        wanted = model.decode_states(*arguments, k=10, num_beams=10, exclude=exclude)
        got = decoder.decode_states(*arguments, exclude=exclude)
        assert_same(got, wanted, f"turn {turn}: {batch} requests of {tokens} tokens")


def test_results_own_their_memory(fake) -> None:
    problem = make(2)
    decoder = capture(make_model(problem))
    first = decoder.decode_states(problem.states[:2], problem.mask[:2])
    before = copied(first)
    second = decoder.decode_states(problem.states[2:4], problem.mask[2:4])
    assert_same(first, before)
    for tensor in fields(second):
        tensor.zero_()
    assert_same(first, before)
    assert_same(decoder.decode_states(problem.states[:2], problem.mask[:2]), before)


def test_states_with_gradients_and_inference_mode(fake) -> None:
    problem = make(3)
    model = make_model(problem)
    arguments = problem.states.clone().requires_grad_(), problem.mask
    wanted = model.decode_states(*arguments, num_beams=10)
    with torch.inference_mode():
        decoder = capture(model)
        assert_same(decoder.decode_states(*arguments), wanted)
    decoder = capture(model)
    assert_same(decoder.decode_states(*arguments), wanted)
    with torch.inference_mode():
        assert_same(decoder.decode_states(*(t[:5] for t in arguments)), first_rows(wanted, 5))
    got = decoder.decode_states(*(t[:4] for t in arguments))
    assert_same(got, first_rows(wanted, 4))
    assert not got.scores.requires_grad
    assert not fake[-1].inputs.states.requires_grad


def test_exclusions_are_ascending_and_filled_up_below_every_id() -> None:
    flat = np.array([7, -3, 7, 5, 2**62])
    cpu = torch.device("cpu")
    table = captured_graph.exclusion_table(flat, np.array([3, 0, 2]), 3, cpu)
    none = captured_graph.NO_ITEM
    assert table.tolist() == [[-3, 7, 7], [none] * 3, [none, 5, 2**62]]
    assert captured_graph.exclusion_table(flat[:0], np.array([0, 0]), 0, cpu).shape == (2, 0)
    assert none == np.iinfo(np.int64).min


STATES, MASK = torch.zeros(4, TOKENS, 64), torch.ones(4, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("states", "mask", "exclude", "message"),
    [
        (STATES.repeat(3, 1, 1), MASK.repeat(3, 1), None, "at most 8 requests, .* got 12; split"),
        (STATES.repeat(1, 2, 1), MASK.repeat(1, 2), None, "at most 12 tokens .* got 24; capture"),
        (STATES.half(), MASK, None, "expected torch.float32, as captured, got torch.float16; cap"),
        (STATES.double(), MASK, None, "encoder_states: expected a torch.float32 or .*float64"),
        (STATES[0], MASK[0], None, "encoder_states: expected .* got"),
        (STATES, MASK[:3], None, "mask: expected"),
        (STATES, MASK.int(), None, "mask: expected"),
        (STATES.to("meta"), MASK, None, "encoder_states: expected .* on cpu, got .* on meta"),
        (STATES, MASK, [[1]], "exclude: expected one sequence .* per request, 4, got 1"),
        (STATES, MASK, [[1], [1, 2, 3], [], []], r"exclude\[1\]: expected at most max_excluded=2"),
        (STATES, MASK, [[1], ["2"], [], []], r"exclude\[1\]: expected integers"),
        (STATES, MASK, 5, "exclude: expected one sequence of item ids per request"),
    ],
)
def test_wrong_requests(fake, states, mask, exclude, message: str) -> None:
    decoder = capture(make_model(make()), max_excluded=2)
    with pytest.raises(ValueError, match=message):
        decoder.decode_states(states, mask, exclude=exclude)
    assert not any(graph.runs for graph in fake)


def test_without_room_nothing_may_be_excluded(fake) -> None:
    decoder = capture(make_model(make()))
    with pytest.raises(ValueError, match=r"max_excluded=0 item ids, as captured, got 1; capture"):
        decoder.decode_states(STATES, MASK, exclude=[[], [1], None, []])
    decoder.decode_states(STATES, MASK, exclude=[[], None, None, []])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, r"batch_sizes: expected a sequence of at least one .* got \(\)"),
        ({"batch_sizes": 8}, "batch_sizes: expected a sequence of .* got 8; pass"),
        ({"batch_sizes": "8"}, "batch_sizes: expected a sequence of .* got '8'; pass"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes\[1\]: expected an integer >= 1, got 0"),
        ({"batch_sizes": (1, 2.0)}, r"batch_sizes\[1\]: expected an integer >= 1, got 2.0"),
        ({"tokens": -1}, "tokens: expected an integer >= 0, got -1"),
        ({"tokens": "82"}, "tokens: expected an integer"),
        ({"states_dtype": "float64"}, "states_dtype: expected one of float32, .* got 'float64'"),
        ({"states_dtype": torch.int32}, "states_dtype: expected one of float32, .*torch.int32"),
        ({"max_excluded": -1}, "max_excluded: expected an integer >= 0, got -1"),
        ({"k": 11}, "k: expected at most num_beams=10, got 11"),
    ],
)
def test_wrong_captures(fake, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture(make_model(make()), **options)
    assert not fake


def test_capture_hands_its_arguments_on(fake) -> None:
    model = make_model(make())
    model.device = torch.device("cuda", 0)  # which only capture looks at here
    decoder = model.capture()
    assert decoder.batch_sizes == (1, 8, 32, 128)
    assert decoder.tokens == 2 + 20 * 3  # the longest request of its TokenSpec
    assert (decoder.states_dtype, decoder.max_excluded) == (torch.float32, 0)
    assert (fake[0].plan.k, fake[0].plan.num_beams) == (10, 50)
    thirds = (0.5, 1.0, 2.0)
    decoder = model.capture((2,), 5, 3, 20, thirds, thirds[::-1], "codebook", "float16", 9)
    plan, inputs = fake[-1].plan, fake[-1].inputs
    assert (plan.k, plan.num_beams, plan.normalisation) == (3, 20, "codebook")
    assert (plan.temperatures, plan.level_weights) == (thirds, thirds[::-1])
    assert (inputs.states.shape, inputs.states.dtype) == ((2, 5, 64), torch.float16)
    assert inputs.exclusion.ids.shape == (2 * 9,)
    assert "batch_sizes=(2,), tokens=5" in repr(decoder)


def test_swaps_and_stock_capture_again_and_old_graphs_stay_until_their_last_replay_ended(
    fake,
) -> None:
    problem = make(4)
    model = make_model(problem)
    decoder = capture(model)
    arguments = problem.states, problem.mask
    small = tuple(tensor[:2] for tensor in arguments)

    def check(*made: int) -> None:
        """Both batch sizes answer rightly, and then these sizes had been captured, ever."""
        for inputs in (arguments, small):
            assert_same(decoder.decode_states(*inputs), model.decode_states(*inputs, num_beams=10))
        assert [graph.size for graph in fake] == list(made)

    check(3, 8)
    before = fake[:]
    for graph in before:
        graph.done.ended = False
    model.swap(other_catalogue(problem, 1))
    check(3, 8, 8, 3)  # each at its own next call
    assert decoder._retired == before
    before[0].done.ended = True
    check(3, 8, 8, 3)
    assert decoder._retired == before[1:]
    best = decoder.decode_states(*small).items[:, 0].tolist()
    model.set_available(best, False)
    decoder.refresh()
    assert len(fake) == 6
    assert decoder._retired == before[1:]
    check(3, 8, 8, 3, 3, 8)
    assert not set(best) & set(decoder.decode_states(*small).items.flatten().tolist())
    model.catalogue.set_available(best, True)  # behind the model's back
    before[1].done.ended = True
    check(3, 8, 8, 3, 3, 8, 8, 3)
    decoder.refresh()
    assert decoder._retired == []
    assert len(fake) == 8
    assert all(graph.done.waited == 0 for graph in fake)


def test_a_capture_that_fails_is_tried_again(fake, monkeypatch) -> None:
    problem = make(5)
    model = make_model(problem)
    decoder = capture(model)
    model.swap(other_catalogue(problem, 1))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphs_by_size, "CapturedGraph", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder.decode_states(problem.states, problem.mask)
    got = decoder.decode_states(problem.states, problem.mask)
    assert_same(got, model.decode_states(problem.states, problem.mask, num_beams=10))


def test_a_decoder_that_goes_waits_for_its_replays(fake) -> None:
    problem = make()
    model = make_model(problem)
    decoder = capture(model)
    fake[0].done.ended = False
    model.swap(other_catalogue(problem, 1))
    decoder.refresh()
    del decoder
    gc.collect()
    assert [graph.done.waited for graph in fake] == [1, 0, 1, 1]  # the second was dropped


def test_a_sequence_ends_with_the_event_even_when_it_fails() -> None:
    steps: list[str] = []

    class Step:
        def __init__(self, fails: str = "") -> None:
            self.fails = fails

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **_: Any) -> None:
                steps.append(name)
                if name == self.fails:
                    raise RuntimeError(name)

            return call

    for last in ("clone", "copy_"):
        whole = ["wait_event", "load", "replay", last, "record"]
        for fails in ("", last, "replay", "load"):
            graph: Any = object.__new__(captured_graph.CapturedGraph)
            graph._current, graph.done = SimpleNamespace(get=Step), Step()
            graph._inputs, graph._graph = Step(fails), Step(fails)
            graph._results = PackedResults(Step(fails), 1, 1, 1)
            out: Any = Step(fails) if last == "copy_" else None
            steps.clear()
            if fails:
                with pytest.raises(RuntimeError, match=fails):
                    graph.run(lambda inputs: inputs.load(), out)
                assert steps == [*whole[: whole.index(fails) + 1], "record"]
            else:
                graph.run(lambda inputs: inputs.load(), out)
                assert steps == whole


def test_answers_are_of_the_version_they_carry(fake) -> None:
    problem = make(6)
    serve_while_swapping(make_model(problem), problem, [None, None])
