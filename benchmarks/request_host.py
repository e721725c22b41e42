"""What a caller in Python waits for: lists of item histories in, lists of items out.

    calls   `batch` (lists to tensors, and to the device), `decode` and `item_lists`, which waits
            for the device and copies back; the host's clock around all three
    graphs  on a GPU: `RequestGraphs.recommend_lists`, one replay of a graph of this batch size
    stream  `decode_stream` of the same batch again and again, and `item_lists` of each answer
            while the device works on the next; of the model, and on a GPU of its graphs

Answers are held against those of encoder and decode_states.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from decode_checks import VerificationError
from request_inputs import History
from request_options import RequestOptions

from sidmlp_kernels import DecodeStream, Recommendations, Recommender, RequestGraphs
from sidmlp_kernels.testing import Timing

WARMUP = 10
MOST_SECONDS = 10.0
PARTS = ("batch", "decode", "items")


def host_times(
    model: Recommender, histories: list[History], options: RequestOptions, calls: int
) -> dict[str, Any]:
    """Medians and p99 of `calls` calls of each kind and rates of streams; VerificationError where
    an answer is not that of encoder and decode."""
    ask = {"k": options.k, "num_beams": options.num_beams}
    wanted = right_answer(model, histories, options)
    size = len(histories)
    check_answer(model.decode(model.batch(histories), **ask), wanted)

    def whole() -> tuple[list[list[int]], list[int]]:
        marks = [time.perf_counter_ns()]
        batch = model.batch(histories)
        marks.append(time.perf_counter_ns())
        found = model.decode(batch, **ask)
        marks.append(time.perf_counter_ns())
        lists = found.item_lists()
        marks.append(time.perf_counter_ns())
        return lists, marks

    result = timed(whole, wanted, calls, size, PARTS)
    result["stream_users_per_s"] = stream_rate(
        lambda batches: model.decode_stream(batches, **ask), histories, wanted, calls
    )
    if device_of(model).type == "cuda":
        try:
            graphs = captured(model, size, options)
        except ValueError as error:  # no operator for this encoder
            return {**result, "graphs_left_out": str(error)}

        def replayed() -> tuple[list[list[int]], list[int]]:
            begin = time.perf_counter_ns()
            found = graphs.recommend_lists(histories)
            return found, [begin, time.perf_counter_ns()]

        check_answer(graphs.recommend(histories), wanted)
        result["graphs"] = timed(replayed, wanted, calls, size, ())
        result["graphs"]["stream_users_per_s"] = stream_rate(
            graphs.decode_stream, histories, wanted, calls
        )
    return result


def device_of(model: Recommender) -> torch.device:
    """Where it runs: graphs are a GPU's."""
    return model.device


def captured(model: Recommender, size: int, options: RequestOptions) -> RequestGraphs:
    """A graph of this batch size."""
    return model.capture_requests((size,), options.tokens, k=options.k, num_beams=options.num_beams)


def timed(
    call: Callable[[], tuple[list[list[int]], list[int]]],
    wanted: Recommendations,
    calls: int,
    users: int,
    parts: tuple[str, ...],
) -> dict[str, Any]:
    """Times of a call that returns its items and the clock before, between and after its parts."""
    items = wanted.item_lists()
    samples: list[tuple[float, ...]] = []
    end = time.perf_counter() + MOST_SECONDS
    for number in range(WARMUP + calls):
        found, marks = call()
        if found != items:
            raise wrong_answer()
        if number >= WARMUP:
            spans = [(b - a) / 1e3 for a, b in itertools.pairwise(marks)]
            samples.append((sum(spans), *spans))
        if samples and time.perf_counter() > end:
            break
    whole, *others = (Timing.of(list(column)) for column in zip(*samples, strict=True))
    result: dict[str, Any] = {
        "p50_us": whole.median,
        "p99_us": whole.p99,
        "samples": len(samples),
        "users_per_s": users / whole.median * 1e6,
    }
    if parts:
        of_parts = zip(parts, others, strict=True)
        result["parts_p50_us"] = {name: part.median for name, part in of_parts}
    return result


def stream_rate(
    stream: Callable[[Any], DecodeStream],
    histories: list[History],
    wanted: Recommendations,
    calls: int,
) -> float:
    """Users a second of a stream of `calls` batches from its first answer on, the items of each
    taken as lists. Two more batches have run before, which pin memory. The first and the last
    answers are judged."""
    for found in stream([histories] * 2):
        check_answer(found, wanted)
    answers = stream(itertools.repeat(histories, 1 + calls))
    next(answers)
    begin, count = time.perf_counter(), 0
    for found in answers:
        found.item_lists()
        count += 1
        if time.perf_counter() - begin > MOST_SECONDS:
            break
    seconds = time.perf_counter() - begin
    check_answer(found, wanted)
    return count * len(histories) / seconds


def right_answer(
    model: Recommender, histories: list[History], options: RequestOptions
) -> Recommendations:
    """What the model's encoder and decode_states do, on the CPU."""
    batch = model.batch(histories)
    states = model._need_encoder("decode")(batch.ids, batch.mask)
    ask = {"k": options.k, "num_beams": options.num_beams}
    return model.decode_states(states, batch.mask, **ask).cpu()


def check_answer(found: Recommendations, wanted: Recommendations) -> None:
    """VerificationError unless items and scores are the right ones."""
    here = found.cpu()
    if not (torch.equal(here.items, wanted.items) and torch.equal(here.scores, wanted.scores)):
        raise wrong_answer()


def wrong_answer() -> VerificationError:
    """What ends the benchmark."""
    return VerificationError(
        "lists to lists: expected the items of encoder and decode_states, got others; not timing it"
    )


def host_line(host: dict[str, Any]) -> str:
    """For the log of a run."""
    graphs = host.get("graphs")
    shown = [
        f"p50 {host['p50_us']:.1f}, p99 {host['p99_us']:.1f} us, stream "
        f"{host['stream_users_per_s']:,.0f} users/s"
    ]
    if graphs is not None:
        shown.append(
            f"graphs p50 {graphs['p50_us']:.1f}, p99 {graphs['p99_us']:.1f} us, stream "
            f"{graphs['stream_users_per_s']:,.0f} users/s"
        )
    return "; ".join(shown)
