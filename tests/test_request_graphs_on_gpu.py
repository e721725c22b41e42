"""RequestGraphs on a GPU: the same bits, streams, threads, and swaps while graphs replay."""

from __future__ import annotations

import threading

import pytest
import torch
from captured_graphs import CYCLES, assert_same, make, other_catalogue, run_threads
from request_models import ASK, capture, histories_of, make_fused

import sidmlp_kernels as sk
from sidmlp_kernels import backends

on_gpus = pytest.mark.parametrize(
    "backend", [b.name for b in backends.BACKENDS if b.device_type == "cuda"], indirect=True
)


def here(recs: sk.Recommendations) -> sk.Recommendations:
    """On the CPU, where `recommend` answers."""
    return recs.cpu()


@on_gpus
@pytest.mark.parametrize("form", ["throughput", "cluster2", "cluster8"])
def test_every_batch_has_the_bits_of_decode(backend: str, form: str) -> None:
    model = make_fused(backend, encoder_form=form)
    graphs = model.capture_requests((1, 4, 8), **ASK, max_excluded=9)
    for requests in (8, 0, 1, 2, 7, 3, 4, 5, 6, 8):
        histories = histories_of(model, requests, requests)
        batch = model.batch(histories)
        for exclude in (histories, None):
            wanted = model.decode(batch, **ASK, exclude=exclude)
            got = graphs.decode(batch, exclude)
            assert got.items.device == model.device
            assert_same(got, wanted, f"{requests} requests")
            got = graphs.recommend(histories, exclude=exclude)
            assert got.items.device.type == "cpu"
            assert_same(got, here(wanted), f"{requests} histories")


@on_gpus
def test_the_form_is_that_of_the_captured_size(backend: str) -> None:
    """ "auto" picks it by the batch: the bits are those of a batch padded with empty requests."""
    model = make_fused(backend)
    graphs = model.capture_requests((3, 200), **ASK)
    for requests, size in ((2, 3), (70, 200), (3, 3)):
        histories = histories_of(model, requests)
        padded = model.decode(model.batch([*histories, *[[]] * (size - requests)]), **ASK)
        got = graphs.recommend(histories)
        for name in ("items", "scores", "codes", "counts"):
            assert torch.equal(getattr(got, name), getattr(padded, name)[:requests].cpu()), name


@on_gpus
def test_earlier_answers_stay(backend: str) -> None:
    model = make_fused(backend, encoder_form="throughput")
    graphs = capture(model)
    kept = []
    for turn in range(12):
        histories = histories_of(model, 1 + turn % 8, turn)
        wanted = model.decode(model.batch(histories), **ASK)
        kept.append((graphs.recommend(histories), here(wanted)))
        kept.append((graphs.decode(model.batch(histories)), wanted))
    for turn, (got, wanted) in enumerate(kept):
        assert_same(got, wanted, f"answer {turn}")


@on_gpus
def test_decode_uses_the_current_stream_and_nothing_waits(backend: str) -> None:
    model = make_fused(backend, encoder_form="throughput")
    graphs = capture(model, max_excluded=8)
    histories = histories_of(model, 7)
    real = model.batch(histories)
    wanted = model.decode(real, **ASK, exclude=histories)
    late = sk.Batch(torch.ones_like(real.ids), real.mask)
    late.check_vocabulary(model.tokens.vocab_size)
    graphs.decode(late, histories)  # pins its first memory
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        late.ids.copy_(real.ids)
        got = graphs.decode(late, histories)
        assert not side.query(), "the graphs waited for the device"
    side.synchronize()
    assert_same(got, wanted)


@on_gpus
def test_threads_streams_and_both_ways_in(backend: str) -> None:
    model = make_fused(backend, encoder_form="throughput")
    graphs = capture(model)
    every = [histories_of(model, 8, 1), histories_of(model, 2, 2), histories_of(model, 5, 3)]
    wanted = [model.decode(model.batch(histories), **ASK).cpu() for histories in every]
    torch.cuda.synchronize()

    def recommend(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(200):
                assert_same(graphs.recommend(every[n]), wanted[n], f"thread {n}, turn {turn}")

    def stream() -> None:
        for turn, got in enumerate(graphs.decode_stream(every * 70, depth=3)):
            assert_same(got, wanted[turn % 3], f"batch {turn}")

    run_threads(lambda: recommend(0), lambda: recommend(1), stream)


@on_gpus
def test_swaps_during_replays(backend: str) -> None:
    """Every answer is that of the version that it carries."""
    model = make_fused(backend, encoder_form="throughput")
    histories = histories_of(model, 6)  # of the first catalogue: those items stay known
    catalogues = [other_catalogue(make(), number) for number in (1, 2, 3)]
    wanted = {}
    for catalogue in catalogues:
        model.swap(catalogue)
        wanted[catalogue.version] = model.decode(model.batch(histories), **ASK).cpu()
    graphs = capture(model)
    stop, seen = threading.Event(), set()

    def serve() -> None:
        while not stop.is_set():
            got = graphs.recommend(histories)
            assert_same(got, wanted[got.catalogue_version])
            seen.add(got.catalogue_version)

    def swap() -> None:
        try:
            for turn in range(30):
                model.swap(catalogues[turn % 3])
                if turn % 3 == 0:
                    graphs.refresh()
                stop.wait(0.01)
        finally:
            stop.set()

    run_threads(serve, swap)
    assert seen == set(wanted)


@on_gpus
def test_graphs_that_go_while_they_work(backend: str) -> None:
    model = make_fused(backend, encoder_form="throughput")
    histories = histories_of(model, 8)
    wanted = model.decode(model.batch(histories), **ASK)
    graphs = capture(model)
    batch = model.batch(histories)
    torch.cuda._sleep(CYCLES)
    got = graphs.decode(batch)
    del graphs
    assert_same(got, wanted)
