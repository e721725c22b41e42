"""What a caller in Python waits for: lists of item histories in, a list of items out.

A call is `batch` (lists to tensors, and to the device), `decode` and `.items.tolist()`, which waits
for the device and copies back; the host's clock around all three. `overlapped` calls read the items
of the batch before only after the next decode is enqueued, so the device has work meanwhile.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from decode_checks import VerificationError
from request_inputs import History
from request_options import RequestOptions

from sidmlp_kernels import Recommender
from sidmlp_kernels.testing import Timing

WARMUP = 10
MOST_SECONDS = 20.0


def host_times(
    model: Recommender, histories: list[History], options: RequestOptions, calls: int
) -> dict[str, Any]:
    """Medians and p99 of `calls` calls and the medians of their parts; VerificationError where a
    call's items are not those of encoder and decode."""
    ask = {"k": options.k, "num_beams": options.num_beams}
    check_items_of(model, histories, options)
    samples: list[tuple[float, ...]] = []
    end = time.perf_counter() + MOST_SECONDS
    for number in range(WARMUP + calls):
        marks = [time.perf_counter_ns()]
        batch = model.batch(histories)
        marks.append(time.perf_counter_ns())
        found = model.decode(batch, **ask)
        marks.append(time.perf_counter_ns())
        found.items.tolist()
        marks.append(time.perf_counter_ns())
        if number >= WARMUP:
            parts = [(b - a) / 1e3 for a, b in itertools.pairwise(marks)]
            samples.append((sum(parts), *parts))
        if samples and time.perf_counter() > end:
            break
    whole, *parts_of = (Timing.of(list(column)) for column in zip(*samples, strict=True))

    begin = time.perf_counter()
    before = model.decode(model.batch(histories), **ask)
    for _ in range(len(samples)):
        after = model.decode(model.batch(histories), **ask)
        before.items.tolist()
        before = after
    before.items.tolist()
    overlapped = (time.perf_counter() - begin) / (len(samples) + 1)
    return {
        "p50_us": whole.median,
        "p99_us": whole.p99,
        "samples": len(samples),
        "parts_p50_us": {
            name: part.median
            for name, part in zip(("batch", "decode", "items"), parts_of, strict=True)
        },
        "users_per_s": len(histories) / whole.median * 1e6,
        "overlapped_users_per_s": len(histories) / overlapped,
    }


def check_items_of(model: Recommender, histories: list[History], options: RequestOptions) -> None:
    """VerificationError unless two calls give what the model's encoder and decode_states do."""
    ask = {"k": options.k, "num_beams": options.num_beams}
    batch = model.batch(histories)
    states = model._need_encoder("decode")(batch.ids, batch.mask)
    wanted = model.decode_states(states, batch.mask, **ask)
    for _ in range(2):
        found = model.decode(model.batch(histories), **ask)
        same = torch.equal(found.items, wanted.items) and torch.equal(found.scores, wanted.scores)
        if not same:
            raise VerificationError(
                "Recommender.decode: expected the items of encoder and decode_states, got others; "
                "not timing it"
            )
