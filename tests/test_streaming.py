"""decode_stream: the bits of batch and decode, wrong batches in their place, bounded work."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from captured_graphs import CYCLES, fields, run_threads
from request_models import histories_of, make_fused
from small_recommender import (
    TOKENS,
    assert_bits,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
)

import sidmlp_kernels as sk
from sidmlp_kernels import Requests, streaming

ASK = {"k": 5, "num_beams": 12}


def make(backend: str = "cpu", **options: Any) -> sk.Recommender:
    return sk.Recommender(
        make_student(), make_catalogue(), make_encoder(), backend=backend, tokens=TOKENS, **options
    )


def batches_of(count: int, seed: int = 0) -> list[list[list[int]]]:
    """Of 0..9 requests of 0..6 items each."""
    random = np.random.default_rng(seed)
    return [
        [random.integers(100, 160, random.integers(0, 7)).tolist() for _ in range(number)]
        for number in random.integers(0, 10, count)
    ]


def answers(model: sk.Recommender, batches: Any) -> list[sk.Recommendations]:
    return [model.decode(model.batch(batch), **ASK).cpu() for batch in batches]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_bits_of_batch_and_decode_in_order(backend: str, depth: int) -> None:
    model = make(backend)
    batches = batches_of(12)
    wanted = answers(model, batches)
    got = list(model.decode_stream(iter(batches), **ASK, depth=depth))
    assert len(got) == len(wanted)
    for mine, right in zip(got, wanted, strict=True):  # all kept: none shares memory with another
        assert mine.items.device.type == "cpu"
        assert_bits(mine, right)
        assert mine.item_lists() == right.item_lists()
    assert list(model.decode_stream([], **ASK)) == []


def test_what_a_batch_may_be(backend: str) -> None:
    model = make(backend)
    histories, exclude = [[100, 101], [130]], [[101, 102], None]
    batch = model.batch(histories)
    plain = model.decode(batch, **ASK).cpu()
    excluded = model.decode(batch, **ASK, exclude=exclude).cpu()
    every = (
        histories,
        batch,
        np.array([[100, 101], [130, 130]])[:1],
        Requests(histories, exclude=exclude),
        Requests(batch, exclude=exclude),
        Requests(histories, users=[None, 7]),
    )
    got = list(model.decode_stream(every, **ASK))
    assert_bits(got[0], plain)
    assert_bits(got[1], plain)
    assert torch.equal(got[2].items[0], plain.items[0])
    assert_bits(got[3], excluded)
    assert_bits(got[4], excluded)
    assert_bits(got[5], model.decode(model.batch(histories, [None, 7]), **ASK).cpu())
    unknown = list(model.decode_stream([[[100, 7, 101]]], **ASK, unknown="drop"))
    assert torch.equal(unknown[0].items, got[2].items)


def test_a_wrong_batch_is_named_in_its_place_and_spoils_no_other(backend: str) -> None:
    model = make(backend)
    batches: list[Any] = [*batches_of(3, 1), [[100], [7]], 5, *batches_of(2, 2)]
    wanted = answers(model, [*batches[:3], *batches[5:]])
    stream = model.decode_stream(batches, **ASK, depth=3)
    got = [next(stream) for _ in range(3)]
    with pytest.raises(ValueError, match=r"^batches\[3\]: histories\[1\]: expected items that the"):
        next(stream)
    with pytest.raises(ValueError, match=r"^batches\[4\]: histories: expected one sequence of"):
        next(stream)
    got += stream
    for mine, right in zip(got, wanted, strict=True):
        assert_bits(mine, right)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_failure_that_is_no_wrong_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    right = model.decode
    turn = itertools.count()

    def fails_once(*arguments: Any, **options: Any) -> sk.Recommendations:
        if next(turn) == 1:
            raise torch.cuda.OutOfMemoryError("no memory")
        return right(*arguments, **options)

    monkeypatch.setattr(model, "decode", fails_once)
    stream = model.decode_stream([[[100]]] * 3, **ASK)
    first = next(stream)
    with pytest.raises(RuntimeError, match=r"^batches\[1\]: no memory$") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert_bits(next(stream), first)


def test_an_iterable_that_fails_ends_the_stream_after_its_batches() -> None:
    model = make()

    def batches() -> Iterator[list[list[int]]]:
        yield [[100]]
        yield [[101]]
        raise KeyError("the database is gone")

    stream = model.decode_stream(batches(), **ASK, depth=2)
    assert len(next(stream)) == len(next(stream)) == 1
    with pytest.raises(KeyError, match="the database is gone"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


class CountingLane:
    """A lane whose work is counted."""

    busy = most_busy = 0

    def __init__(self) -> None:
        self.mine = False

    def start(self, decode: Any, requests: Requests) -> None:
        assert not self.mine, "a lane was started twice"
        self.answer = decode(requests)
        self.mine = True
        CountingLane.busy += 1
        CountingLane.most_busy = max(CountingLane.most_busy, CountingLane.busy)

    def finish(self) -> Any:
        assert self.mine
        self.mine = False
        CountingLane.busy -= 1
        return self.answer


def test_no_more_batches_are_read_than_there_are_lanes() -> None:
    """Wrong ones take part in the count: a stream of them must not be read to its end."""
    read = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    def decode(requests: Requests) -> Any:
        if requests.histories % 3 == 1:
            raise ValueError("wrong")
        return requests.histories

    CountingLane.busy = CountingLane.most_busy = 0
    stream = streaming.DecodeStream(batches(), decode, [CountingLane() for _ in range(4)])
    for number in range(30):
        if number % 3 == 1:
            with pytest.raises(ValueError, match=rf"^batches\[{number}\]: wrong$"):
                next(stream)
        else:
            assert next(stream) == number
        assert len(read) == number + 4
    assert CountingLane.most_busy == 3


def test_swaps_take_effect_at_the_next_batch_that_is_read() -> None:
    model = make()
    other = make_catalogue(seed=1, first_id=100)

    def batches() -> Iterator[list[list[int]]]:
        yield [[100, 101]]
        model.swap(other)
        yield [[100, 101]]

    before, after = model.decode_stream(batches(), **ASK, depth=1)
    assert after.catalogue_version == other.version != before.catalogue_version
    assert_bits(after, model.decode(model.batch([[100, 101]]), **ASK))


def test_wrong_settings_are_told_at_once() -> None:
    model = make()
    for options, match in (
        ({"k": 20, "num_beams": 10}, "k: expected at most"),
        ({"depth": 0}, "depth: expected an integer >= 1, got 0"),
        ({"unknown": "skip"}, "unknown: expected 'raise' or 'drop'"),
        ({"temperatures": [1.0]}, "temperatures"),
    ):
        with pytest.raises(ValueError, match=match):
            model.decode_stream([], **options)
    for batches in (5, None, "items"):
        with pytest.raises(ValueError, match="batches: expected an iterable of batches"):
            model.decode_stream(batches)
    bare = sk.Recommender(make_student(), make_catalogue())
    with pytest.raises(ValueError, match="decode_stream: expected a model with an encoder"):
        bare.decode_stream([])


def test_recommendations_on_the_cpu_and_as_lists() -> None:
    bare = sk.Recommender(make_student(), make_catalogue(), backend="cpu")
    states, mask = make_states()
    recs = bare.decode_states(states, mask, k=50, num_beams=60, exclude=[range(100, 155)] * 5)
    assert recs.cpu() is recs
    lists = recs.item_lists()
    assert [len(row) for row in lists] == recs.counts.tolist() == [5] * 5
    assert lists == [row[:5] for row in recs.items.tolist()]
    assert all(type(item) is int for item in lists[0])
    packed = recs.packed()
    assert packed.memory.numel() == packed.words(5, 50, 3)
    assert_bits(packed.recommendations(5, recs.catalogue_version), recs)
    first = packed.recommendations(2, recs.catalogue_version)
    assert first.item_lists() == lists[:2]
    assert first.packed() is packed


def test_lists_of_a_gpus_answer(cuda: torch.device) -> None:
    """Of answers whose tensors lie apart, or side by side; the current stream is waited for."""
    model = make_fused("cuda")
    batch = model.batch(histories_of(model, 5))
    recs = model.decode(batch, **ASK)
    here = recs.cpu()
    assert_bits(here, sk.Recommendations(*(t.cpu() for t in fields(recs)), recs.catalogue_version))
    late = sk.Recommendations(*(t.clone() for t in fields(recs)), recs.catalogue_version)
    late.items.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    late.items.copy_(recs.items)
    assert late.item_lists() == here.item_lists() == recs.item_lists()


# --- On a GPU.


def test_copies_are_enqueued_and_nothing_waits(cuda: torch.device) -> None:
    """With the GPU held up, `depth` batches are enqueued before next() waits for the first."""
    model = make_fused("cuda")
    batches = [histories_of(model, number) for number in (3, 0, 9)]
    wanted = answers(model, batches)
    list(model.decode_stream(batches, **ASK))  # pins the memory
    torch.cuda.synchronize()
    lane = streaming.GpuLane(model.device)
    decode = lambda requests: model.decode(model.batch(requests.histories), **ASK)  # noqa: E731
    with torch.cuda.stream(lane._stream):
        torch.cuda._sleep(CYCLES)
    lane.start(decode, Requests(batches[0]))
    assert not lane._stream.query(), "start waited for the GPU"
    assert_bits(lane.finish(), wanted[0])


def test_a_batch_made_on_another_stream(cuda: torch.device) -> None:
    model = make_fused("cuda")
    right = model.batch(histories_of(model, 2))
    wanted = model.decode(right, **ASK).cpu()
    list(model.decode_stream([right], **ASK))
    late = sk.Batch(torch.ones_like(right.ids), right.mask.clone())
    late.check_vocabulary(model.tokens.vocab_size)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    late.ids.copy_(right.ids)
    stream = model.decode_stream([late], **ASK)
    del late
    assert_bits(next(stream), wanted)


def test_streams_in_threads(backend: str) -> None:
    model = make(backend)
    every = [batches_of(20, seed) for seed in (4, 5)]
    wanted = [answers(model, batches) for batches in every]

    def serve(n: int) -> None:
        for mine, right in zip(model.decode_stream(every[n], **ASK), wanted[n], strict=True):
            assert_bits(mine, right)

    run_threads(lambda: serve(0), lambda: serve(1))


def test_a_stream_that_is_dropped(backend: str) -> None:
    model = make(backend)
    batches = batches_of(6, 6)
    wanted = answers(model, batches)
    for _ in range(5):
        stream = model.decode_stream(batches, **ASK, depth=3)
        assert_bits(next(stream), wanted[0])
        del stream
    gc.collect()
    assert_bits(next(model.decode_stream(batches, **ASK)), wanted[0])
