"""Whole requests as replays of CUDA graphs, one for each of a few batch sizes: encoder and decode.

    histories --place--> host memory --copy--> static ids, mask --replay--> static results
              --copy--> host memory --> Recommendations on the CPU          (`recommend`)
    Batch on the GPU --copy--> static ids, mask --replay--> static results
              --clone--> Recommendations on the GPU                         (`decode`)

Made by Recommender.capture_requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batching import UNKNOWN, Batch, Histories, RequestMemory
from .captured_graph import StaticExclusion
from .decode_arguments import Exclusion, check_device, check_type
from .graphs_by_size import GraphsBySize
from .host_memory import Mark, host_memory
from .ops.library import Results
from .plan import DecodePlan
from .recommendations import PackedResults, Recommendations
from .serving_state import Settings
from .spec import check_choice
from .streaming import DecodeStream, Requests, lanes
from .tracing import traced

if TYPE_CHECKING:
    from .recommender import Recommender


class StaticRequests:
    """What a graph of whole requests reads: ids and mask [size, tokens], exclusion."""

    def __init__(
        self,
        decode: Callable[[DecodePlan, Tensor, Tensor, Exclusion], Results],
        size: int,
        tokens: int,
        max_excluded: int,
        device: torch.device,
    ) -> None:
        self._decode = decode
        memory = torch.zeros(RequestMemory.words(size, tokens), dtype=torch.int64, device=device)
        self.requests = RequestMemory(memory, size, tokens)
        self.exclusion = StaticExclusion(size, max_excluded, device)

    def load(self, ids: Tensor, mask: Tensor, excluded: Tensor | None) -> None:
        """Puts in ids, mask [B, T] and excluded [B, max_excluded]; further rows and tokens are
        masked."""
        batch, tokens = mask.shape
        if mask.shape != self.requests.mask.shape:
            self.requests.mask.zero_()
        self.requests.ids[:batch, :tokens].copy_(ids)
        self.requests.mask[:batch, :tokens].copy_(mask)
        self.exclusion.load(excluded)

    def load_from_host(self, requests: RequestMemory, excluded: Tensor | None) -> None:
        """Puts in `requests` [size, tokens] by one copy."""
        self.requests.memory.copy_(requests.memory, non_blocking=True)
        self.exclusion.load(excluded)

    def decode(self, plan: DecodePlan) -> PackedResults:
        """One decode of all rows."""
        excluded = self.exclusion.ids, self.exclusion.offsets
        results = self._decode(plan, self.requests.ids, self.requests.mask, excluded)
        return PackedResults.of(results)


class _Staging:
    """Host memory of one call: requests on their way in, results on their way out."""

    def __init__(self, size: int, tokens: int, words: int, device: torch.device) -> None:
        self.requests = RequestMemory.on_host(size, tokens, device)
        self.ids, self.mask = self.requests.ids.numpy(), self.requests.mask.numpy()
        self.ids.fill(0)
        self.mask.fill(False)
        self._used = 0  # rows that are not masked
        self.results = host_memory((words,), torch.int32, device)
        self.arrived = Mark(device)

    def rows(self, batch: int) -> None:
        """From now on `batch` rows are in use, and the others are masked."""
        self.mask[batch : self._used] = False
        self._used = batch


class RequestGraphs(GraphsBySize[StaticRequests]):
    """`Recommender.batch` and `decode` with fixed settings; see GraphsBySize for threads and swaps.

    A batch is padded to the next captured size, and shorter requests to `tokens`. The answer has
    the bits of `model.decode` for a batch of that size: of any, where the encoder has one form (see
    sidmlp_kernels.encoder_plan; "auto" picks it by the batch).

    Host memory is kept for as many calls of `recommend` as have been under way at a time.
    """

    def __init__(
        self,
        model: Recommender,
        settings: Settings,
        batch_sizes: Sequence[int],
        tokens: int | None,
        max_excluded: int,
    ) -> None:
        super().__init__(model, settings, batch_sizes, tokens, max_excluded)
        self._recommender = model
        encoder = model._need_encoder("capture_requests")
        if encoder.packed is None:
            raise ValueError(
                "capture_requests: expected an encoder that the backend runs as an operator, got "
                f"{encoder.reason}; call decode, or encode yourself and use capture"
            )
        self._vocab_size = encoder.packed.spec.vocab_size
        encoder.check_tokens(torch.empty(0, self.tokens))
        self._staging: dict[int, deque[_Staging]] = {size: deque() for size in self.batch_sizes}
        self.refresh()

    def __repr__(self) -> str:
        return (
            f"RequestGraphs({self._model!r}, batch_sizes={self.batch_sizes}, tokens={self.tokens}, "
            f"{self._settings}, max_excluded={self.max_excluded})"
        )

    @traced("graphs.decode")
    def decode(self, batch: Batch, exclude: object = None) -> Recommendations:
        """As Recommender.decode, on the current stream of the model's device.

        batch    at most batch_sizes[-1] requests of at most `tokens` tokens
        exclude  item ids never to recommend, at most max_excluded for each request

        Raises ValueError for other arguments.
        """
        check_type(batch, "batch", Batch)
        check_device(batch.ids, self._model.device)
        batch.check_vocabulary(self._vocab_size)
        requests, tokens = batch.ids.shape
        self._check_size(requests, tokens)
        excluded = None if exclude is None else self._exclusion(exclude, requests)
        with self._lock:
            graph = self._graph(self._size_for(requests))
            results = graph.run(lambda inputs: inputs.load(batch.ids, batch.mask, excluded))
        return results.recommendations(requests, graph.plan.snapshot.version)

    @traced("graphs.recommend")
    def recommend(
        self,
        histories: object,
        users: Sequence[int | None] | None = None,
        unknown: str = "raise",
        exclude: object = None,
    ) -> Recommendations:
        """Item id histories -> Recommendations on the CPU; waits for them.

        histories, users, unknown  as Recommender.batch takes them; at most batch_sizes[-1] requests
        exclude                    as in `decode`
        The least that a request can wait: one copy in, one replay, one copy out, and one wait, on
        the current stream of the model's device. Raises ValueError for wrong arguments.
        """
        model = self._model
        read = Histories.read(histories, model.tokens, users, unknown)
        batch = len(read)
        known = model.known_items
        tokens = read.longest(model.tokens)
        if tokens > self.tokens:
            read.drop_unknown(known)
            tokens = read.longest(model.tokens)
        self._check_size(batch, tokens)
        excluded = None if exclude is None else self._exclusion(exclude, batch)
        size = self._size_for(batch)
        staging = self._take_staging(size)
        staging.rows(batch)
        while not read.place(known, model.tokens, staging.ids[:batch], staging.mask[:batch]):
            pass  # unknown items are dropped now
        with self._lock:
            graph = self._graph(size)
            results = graph.run(
                lambda inputs: inputs.load_from_host(staging.requests, excluded), staging.results
            )
        staging.arrived.record()
        staging.arrived.wait()
        own = results.in_(staging.results.clone())
        # Not where something was raised: a copy may be under way, torch waits for it before it
        # gives the memory to others.
        self._staging[size].append(staging)
        return own.recommendations(batch, graph.plan.snapshot.version)

    def decode_stream(
        self, batches: Iterable[object], *, unknown: str = "raise", depth: int = 2
    ) -> DecodeStream:
        """As Recommender.decode_stream, from these graphs."""
        check_choice(unknown, "unknown", UNKNOWN)

        def decode(requests: Requests) -> Recommendations:
            return self.decode(self._recommender._batch_of(requests, unknown), requests.exclude)

        return DecodeStream(batches, decode, lanes(self._model.device, depth))

    def _make_inputs(self, plan: DecodePlan, size: int) -> StaticRequests:
        decode, device = self._recommender._decode_ids, plan.packed.device
        return StaticRequests(decode, size, self.tokens, self.max_excluded, device)

    def _take_staging(self, size: int) -> _Staging:
        try:
            return self._staging[size].pop()
        except IndexError:  # all of them are in use
            levels = len(self._model.tokens.code_offsets)
            words = PackedResults.words(size, self._settings.k, levels)
            return _Staging(size, self.tokens, words, self._model.device)

    def _check_size(self, requests: int, tokens: int) -> None:
        instead = "or use decode of the model"
        if requests > self.batch_sizes[-1]:
            raise ValueError(
                f"batch: expected at most {self.batch_sizes[-1]} requests, the largest captured "
                f"batch, got {requests}; split them, capture a larger batch size, {instead}"
            )
        if tokens > self.tokens:
            raise ValueError(
                f"batch: expected at most {self.tokens} tokens a request, as captured, got "
                f"{tokens}; capture with tokens={tokens}, {instead}"
            )
