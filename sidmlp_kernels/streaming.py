"""A stream of batches, from item histories to items on the host, that keeps a GPU busy.

Of `depth` batches under way each has a lane: a CUDA stream and host memory for its results. While
the GPU works on one batch, the host prepares the next, its ids are copied in, and the results of
the one before are copied out:

    host     place n+1 | enqueue n+1 |          answer n | place n+2 | ..
    lane 0   ids n -> decode n -> results n            | ids n+2 -> decode n+2 ..
    lane 1                 ids n+1 ........ -> decode n+1 -> results n+1 ..

Memory is bounded by the depth: nothing is read from the caller's batches before a lane is free.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batching import Batch
from .host_memory import Mark, host_memory
from .recommendations import PackedResults, Recommendations
from .spec import check_int


@dataclass(frozen=True)
class Requests:
    """One batch of a stream.

    histories  item ids, oldest first, one sequence per request; or a Batch
    users      as Recommender.batch takes them; None with a Batch
    exclude    as Recommender.decode takes it
    """

    histories: object
    users: Sequence[int | None] | None = None
    exclude: object = None


Decode = Callable[[Requests], Recommendations]


class CpuLane:
    """Decodes at once, in the caller's thread."""

    def start(self, decode: Decode, requests: Requests) -> None:
        """Begins with one batch; `finish` comes before the next `start`."""
        self._answer = decode(requests)

    def finish(self) -> Recommendations:
        """The answer, on the CPU, in memory of its own."""
        return self._answer


class GpuLane:
    """Decodes on a stream of its own, and copies the results to host memory that it keeps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._mark = Mark(device)
        self._memory = torch.empty(0, dtype=torch.int32)

    def start(self, decode: Decode, requests: Requests) -> None:
        """As CpuLane.start; only enqueues."""
        given = requests.histories
        if isinstance(given, Batch) and given.ids.device == self._device:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in (given.ids, given.mask):
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            answer = decode(requests)
            packed = answer.packed()
            words = packed.memory.numel()
            if words > self._memory.numel():
                self._memory = host_memory((words,), torch.int32, self._device)
            self._memory[:words].copy_(packed.memory, non_blocking=True)
            self._mark.record()
        self._batch, self._version = len(answer), answer.catalogue_version
        self._layout: PackedResults = packed.in_(self._memory[:words])

    def wait(self) -> None:
        """Until the GPU has finished the batch."""
        self._mark.wait()

    def finish(self) -> Recommendations:
        """As CpuLane.finish; waits for the GPU."""
        self.wait()
        own: Tensor = self._layout.memory.clone()
        return self._layout.in_(own).recommendations(self._batch, self._version)


Lane = CpuLane | GpuLane


def lanes(device: torch.device, depth: int) -> list[Lane]:
    """As many as there may be batches under way; one on the CPU, which does one after the other.

    Raises ValueError for a depth that is no integer >= 1.
    """
    depth = check_int(depth, "depth", low=1)
    return [CpuLane()] if device.type != "cuda" else [GpuLane(device) for _ in range(depth)]


class DecodeStream(Iterator[Recommendations]):
    """The answers to a stream of batches, in order, on the CPU; see Recommender.decode_stream.

    What a batch raises is raised in its place, as "batches[n]: ..": a ValueError stays one,
    anything else becomes a RuntimeError with its cause. The other batches are answered all the
    same, by further calls of next(). What `batches` itself raises ends the stream, after the
    answers to the batches before.

    An iterator, for one thread at a time. It reads as many batches ahead as it has lanes, less one.
    Waits for what is under way when it goes.
    """

    def __init__(self, batches: Iterable[object], decode: Decode, lanes: Sequence[Lane]) -> None:
        if isinstance(batches, (str, bytes)) or not hasattr(batches, "__iter__"):
            raise ValueError(
                "batches: expected an iterable of batches (histories, Requests or Batch), got "
                f"{type(batches).__name__}; pass a list or a generator"
            )
        self._batches, self._decode = iter(batches), decode
        self._free, self._depth = deque(lanes), len(lanes)
        self._numbers = itertools.count()
        # Batches that were read and not yet answered: a lane at work, or what went wrong.
        self._under_way: deque[tuple[int, Lane | Exception]] = deque()
        self._ended = False
        self._failure: BaseException | None = None  # of `batches` itself

    def __del__(self) -> None:
        # The allocator would hand out again what decodes under way still read.
        for _, found in getattr(self, "_under_way", ()):
            if isinstance(found, GpuLane):
                found.wait()

    def __next__(self) -> Recommendations:
        while len(self._under_way) < self._depth and not self._ended:
            self._start_next()
        if not self._under_way:
            failure, self._failure = self._failure, None
            raise failure if failure is not None else StopIteration
        number, found = self._under_way.popleft()
        if isinstance(found, Exception):
            raise _named(number, found) from found
        try:
            return found.finish()
        except Exception as error:
            raise _named(number, error) from error
        finally:
            self._free.append(found)

    def _start_next(self) -> None:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._ended = True
            return
        except Exception as error:
            self._ended, self._failure = True, error
            return
        number, lane = next(self._numbers), self._free[0]
        requests = batch if isinstance(batch, Requests) else Requests(batch)
        try:
            lane.start(self._decode, requests)
        except Exception as error:
            self._under_way.append((number, error))
            return
        self._under_way.append((number, self._free.popleft()))


def _named(number: int, error: Exception) -> Exception:
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"batches[{number}]: {error}")
