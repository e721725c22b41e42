"""GraphDecoder on a GPU: the same bits, streams, threads, and swaps while graphs replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captured_graphs import (
    CYCLES,
    SIZES,
    TOKENS,
    assert_same,
    make,
    make_model,
    other_catalogue,
    run_threads,
    serve_while_swapping,
)
from parity import PUBLISHED

import sidmlp_kernels as sk
from sidmlp_kernels import backends

on_gpus = pytest.mark.parametrize(
    "backend", [b.name for b in backends.BACKENDS if b.device_type == "cuda"], indirect=True
)


@on_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["small", "published"])
def test_every_batch_has_the_bits_of_decode_states(backend, device, case: str, dtype: str) -> None:
    problem = make(10, **(PUBLISHED if case == "published" else {}))
    model = sk.Recommender(
        problem.student, problem.catalogue, device=device, dtype=dtype, backend=backend
    )
    longest = problem.states.shape[1]
    settings = {"k": 7, "num_beams": 20, "temperatures": [0.7] * len(problem.spec.codes_per_level)}
    decoder = model.capture(
        (1, 4, 8), longest, **settings, states_dtype="bfloat16", max_excluded=30
    )
    states, mask = problem.states.to(device, torch.bfloat16), problem.mask.to(device)
    for batch in (8, 0, 1, 2, 7, 3, 4, 5, 6, 8):
        for tokens in (longest, longest // 2, 0, longest):
            for exclude in (problem.exclude[:batch], None):
                arguments = states[:batch, :tokens], mask[:batch, :tokens]
                got = decoder.decode_states(*arguments, exclude=exclude)
                wanted = model.decode_states(*arguments, **settings, exclude=exclude)
                assert_same(got, wanted, f"{batch} requests of {tokens} tokens")
                assert got.items.device == states.device


@on_gpus
def test_replays_leave_earlier_results_alone(backend, device) -> None:
    problem = make(11)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, TOKENS, num_beams=10)
    kept = []
    for turn in range(10):
        rows = torch.roll(torch.arange(8), turn)
        inputs = problem.states[rows].to(device), problem.mask[rows].to(device)
        recs = decoder.decode_states(*inputs)
        kept.append((recs, model.decode_states(*inputs, num_beams=10)))
        for tensor in inputs:
            tensor.zero_()  # after the call they are the caller's again
    for turn, (recs, wanted) in enumerate(kept):
        assert_same(recs, wanted, f"turn {turn}")


@on_gpus
def test_swaps_and_stock_between_replays(backend, device) -> None:
    problem = make(12)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, TOKENS, num_beams=10)
    inputs = problem.states.to(device), problem.mask.to(device)
    for turn in range(6):
        recs = decoder.decode_states(*inputs)
        assert_same(recs, model.decode_states(*inputs, num_beams=10), f"turn {turn}")
        if turn % 2:
            model.swap(other_catalogue(problem, turn))
        else:
            best = recs.items[:, 0].unique().cpu().numpy()
            model.set_available(best, False)
            after = decoder.decode_states(*inputs)
            assert not np.isin(after.items.cpu(), best).any()
            assert_same(after, model.decode_states(*inputs, num_beams=10), f"stock, turn {turn}")
        if turn % 3 == 0:
            decoder.refresh()


@on_gpus
def test_swaps_during_replays(backend, device) -> None:
    problem = make(13)
    model = make_model(problem, backend, device)
    serve_while_swapping(model, problem, [torch.cuda.Stream(device) for _ in range(2)])


@on_gpus
def test_the_current_stream_is_used_and_nothing_waits(backend, device) -> None:
    problem = make(14)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, TOKENS, num_beams=10, max_excluded=30)
    real, mask = problem.states.to(device), problem.mask.to(device)
    wanted = model.decode_states(real, mask, num_beams=10, exclude=problem.exclude)
    states = torch.zeros_like(real)
    decoder.decode_states(states, mask, exclude=problem.exclude)  # pins its first memory
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        states.copy_(real)
        got = decoder.decode_states(states, mask, exclude=problem.exclude)
        assert not side.query(), "the decoder waited for the device"
    side.synchronize()
    assert_same(got, wanted)


@on_gpus
def test_a_second_stream_waits_for_the_first(backend, device) -> None:
    """The first is held up, so a second that did not wait would use the buffers before it."""
    problem = make(15)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, TOKENS, num_beams=10)
    inputs = [
        (problem.states.roll(n, 0).to(device), problem.mask.roll(n, 0).to(device)) for n in (0, 3)
    ]
    wanted = [model.decode_states(*mine, num_beams=10) for mine in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = []
    for stream, mine in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            if not got:
                torch.cuda._sleep(CYCLES)
            got.append(decoder.decode_states(*mine))
    assert not streams[1].query()
    torch.cuda.synchronize()
    for recs, right in zip(got, wanted, strict=True):
        assert_same(recs, right)


@on_gpus
def test_two_threads_on_two_streams(backend, device) -> None:
    problem = make(16, **PUBLISHED)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, 82, num_beams=10, max_excluded=30)
    requests = [problem.rows(range(8)), problem.rows([5, 2, 7, 0, 1])]  # in one graph
    inputs = [(p.states.to(device), p.mask.to(device), p.exclude) for p in requests]
    wanted = [model.decode_states(*mine[:2], num_beams=10, exclude=mine[2]) for mine in inputs]
    torch.cuda.synchronize()

    def serve(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            answers = [decoder.decode_states(*inputs[n]) for _ in range(300)]
            for number, recs in enumerate(answers):
                assert_same(recs, wanted[n], f"thread {n}, answer {number}")

    run_threads(lambda: serve(0), lambda: serve(1))


@on_gpus
def test_old_graphs_stay_until_their_last_replay_ended(backend, device) -> None:
    problem = make(17)
    model = make_model(problem, backend, device)
    decoder = model.capture(SIZES, TOKENS, num_beams=10)
    inputs = problem.states.to(device), problem.mask.to(device)
    wanted = model.decode_states(*inputs, num_beams=10)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        late = decoder.decode_states(*inputs)
    model.swap(other_catalogue(problem, 1))
    assert_same(decoder.decode_states(*inputs), model.decode_states(*inputs, num_beams=10))
    assert [len(graph._inputs.mask) for graph in decoder._retired] == [8], "still to be replayed"
    side.synchronize()
    decoder.decode_states(*inputs)
    assert decoder._retired == []
    assert_same(late, wanted)


@on_gpus
def test_two_decoders_of_one_gpu(backend, device) -> None:
    """One captures again and again while the other replays."""
    problem = make(18)
    inputs = problem.states.to(device), problem.mask.to(device)
    models = [make_model(make(18), backend, device) for _ in range(2)]
    decoders = [model.capture(SIZES, TOKENS, num_beams=10) for model in models]
    right = models[0].decode_states(*inputs, num_beams=10)
    torch.cuda.synchronize()

    def replay() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(300):
                assert_same(decoders[0].decode_states(*inputs), right)

    def capture_again() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                models[1].swap(other_catalogue(problem, turn + 1))
                decoders[1].refresh()
                got = decoders[1].decode_states(*inputs)
                assert_same(got, models[1].decode_states(*inputs, num_beams=10))

    run_threads(replay, capture_again)


@on_gpus
def test_inference_mode_on_a_gpu(backend, device) -> None:
    problem = make(19)
    model = make_model(problem, backend, device)
    inputs = problem.states.to(device), problem.mask.to(device)
    wanted = model.decode_states(*inputs, num_beams=10)
    with torch.inference_mode():
        decoder = model.capture(SIZES, TOKENS, num_beams=10)
        assert_same(decoder.decode_states(*inputs), wanted)
    assert_same(decoder.decode_states(*inputs), wanted)


@on_gpus
def test_a_decoder_that_goes_while_it_works(backend, device) -> None:
    problem = make(20)
    model = make_model(problem, backend, device)
    inputs = problem.states.to(device), problem.mask.to(device)
    wanted = model.decode_states(*inputs, num_beams=10)
    decoder = model.capture(SIZES, TOKENS, num_beams=10)
    torch.cuda._sleep(CYCLES)
    got = decoder.decode_states(*inputs)
    del decoder
    assert_same(got, wanted)


@on_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend) -> None:
    problem = make(21)
    models = [make_model(problem, backend, f"cuda:{i}") for i in (0, 1)]
    decoders = [model.capture(SIZES, TOKENS, num_beams=10, max_excluded=30) for model in models]
    for batch in (8, 2, 5):
        for current in (0, 1):
            with torch.cuda.device(current):
                for model, decoder in zip(models, decoders, strict=True):
                    inputs = [t[:batch].to(model.device) for t in (problem.states, problem.mask)]
                    exclude = problem.exclude[:batch]
                    got = decoder.decode_states(*inputs, exclude=exclude)
                    assert got.items.device == model.device
                    wanted = model.decode_states(*inputs, num_beams=10, exclude=exclude)
                    assert_same(got, wanted, f"{model.device}, current cuda:{current}")
                    assert torch.cuda.current_device() == current
    models[1].swap(other_catalogue(problem, 1))
    inputs = [tensor.to("cuda:1") for tensor in (problem.states, problem.mask)]
    assert_same(decoders[1].decode_states(*inputs), models[1].decode_states(*inputs, num_beams=10))
    assert torch.cuda.current_device() == 0
