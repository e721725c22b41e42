"""Whole requests as replays of CUDA graphs, one for each of a few batch sizes: encoder and decode.

    histories --place--> host memory --copy--> static ids, mask --replay--> static results
              --copy--> host memory --> Recommendations on the CPU, or lists  (`recommend`)
    Batch on the GPU --copy--> static ids, mask --replay--> static results
              --clone--> Recommendations on the GPU                         (`decode`)

Made by Recommender.capture_requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batching import UNKNOWN, Batch, Histories, RequestMemory, place_lists
from .captured_graph import StaticExclusion
from .decode_arguments import Exclusion, check_device, check_type
from .graphs_by_size import GraphsBySize
from .host_memory import Mark, host_memory
from .ops.library import Results
from .plan import DecodePlan
from .recommendations import PackedResults, Recommendations, lists_of
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

    def __init__(self, size: int, tokens: int, k: int, levels: int, device: torch.device) -> None:
        self.size = self.batch = size
        self.requests = RequestMemory.on_host(size, tokens, device)
        self._ids, self._mask = self.requests.ids.numpy(), self.requests.mask.numpy()
        self._ids.fill(0)
        self._mask.fill(False)
        words = PackedResults.words(size, k, levels)
        self.results = host_memory((words,), torch.int32, device)
        # Made once: a view costs as much as its copy.
        self._views = PackedResults(self.results, size, k, levels).first(size)
        self._items, self._counts = self._views[0].numpy(), self._views[3].numpy()
        self.arrived = Mark(device)

    def rows(self, batch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """ids and mask of `batch` rows to fill; the others are masked from now on."""
        self._mask[batch : self.batch] = False
        self.batch = batch
        return self._ids[:batch], self._mask[:batch]

    def recommendations(self, catalogue_version: int) -> Recommendations:
        """What has arrived, in memory of its own."""
        batch = self.batch
        own = [view.clone() if batch == self.size else view[:batch].clone() for view in self._views]
        return Recommendations(own[0], own[1], own[2], own[3], catalogue_version)

    def item_lists(self) -> list[list[int]]:
        """The items of what has arrived."""
        return lists_of(self._items[: self.batch], self._counts[: self.batch])


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
        One copy in, one replay, one copy out and one wait, on the current stream of the model's
        device. Raises ValueError for wrong arguments.
        """
        staging, version = self._replayed(histories, users, unknown, exclude)
        answer = staging.recommendations(version)
        self._staging[staging.size].append(staging)
        return answer

    @traced("graphs.recommend_lists")
    def recommend_lists(
        self,
        histories: object,
        users: Sequence[int | None] | None = None,
        unknown: str = "raise",
        exclude: object = None,
    ) -> list[list[int]]:
        """`recommend(..).item_lists()` without the tensors: the least that a request can wait."""
        staging, _ = self._replayed(histories, users, unknown, exclude)
        lists = staging.item_lists()
        self._staging[staging.size].append(staging)
        return lists

    def _replayed(
        self, histories: object, users: Sequence[int | None] | None, unknown: str, exclude: object
    ) -> tuple[_Staging, int]:
        """The host memory that the results have come to, and the catalogue's version.

        The caller gives the memory back. Where something was raised nobody does: a copy may be
        under way, and torch waits for it before it gives the memory to others.
        """
        check_choice(unknown, "unknown", UNKNOWN)
        staging = self._placed(histories, users, unknown)
        excluded = None if exclude is None else self._exclusion(exclude, staging.batch)
        with self._lock:
            graph = self._graph(staging.size)
            graph.run(
                lambda inputs: inputs.load_from_host(staging.requests, excluded), staging.results
            )
            staging.arrived.record()
        staging.arrived.wait()
        return staging, graph.plan.snapshot.version

    def _placed(
        self, histories: object, users: Sequence[int | None] | None, unknown: str
    ) -> _Staging:
        model = self._model
        known = model.known_items
        if isinstance(histories, list) and len(histories) <= self.batch_sizes[-1] and users is None:
            staging = self._take_staging(len(histories))
            rows = staging.rows(len(histories))
            if place_lists(histories, known, model.tokens, *rows):
                return staging
            self._staging[staging.size].append(staging)
        read = Histories.read(histories, model.tokens, users, unknown)
        tokens = read.longest(model.tokens)
        if tokens > self.tokens:
            read.drop_unknown(known)
            tokens = read.longest(model.tokens)
        self._check_size(len(read), tokens)
        staging = self._take_staging(len(read))
        rows = staging.rows(len(read))
        while not read.place(known, model.tokens, *rows):
            pass  # unknown items are dropped now
        return staging

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

    def _take_staging(self, batch: int) -> _Staging:
        size = self._size_for(batch)
        try:
            return self._staging[size].pop()
        except IndexError:  # all of them are in use
            levels = len(self._model.tokens.code_offsets)
            return _Staging(size, self.tokens, self._settings.k, levels, self._model.device)

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
