"""`decode_states` as replays of CUDA graphs, one for each of a few batch sizes.

    states, mask --copy--> static inputs --replay--> static results --clone--> Recommendations

A replay costs the host one launch where the operator costs its checks, its allocations and its
launches. A graph holds addresses, so everything it reads and writes stays where it was at capture:
inputs are copied in, results are copied out, and a change of the catalogue asks for new graphs.
Made by Recommender.capture.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .backends import DTYPES
from .batching import flatten_ids
from .ops.library import Results
from .plan import DecodePlan
from .recommender import Recommendations, Recommender
from .serving_state import ServingState, Settings
from .spec import check_int
from .tracing import traced

NO_ITEM = -(2**63)  # below every item id: fills exclusions up, and keeps them ascending

# One capture at a time in this process: it begins by waiting for a device and by emptying the cache
# of all of them, both illegal during another.
_capturing = threading.Lock()
# All decoders of one GPU share a lock: some versions of torch refuse to replay a graph while
# another thread captures one on that GPU, since both advance its random number generator.
_locks: dict[torch.device, threading.Lock] = {}


class GraphDecoder:
    """`Recommender.decode_states` with fixed settings, for batches of up to batch_sizes[-1].

    A batch is padded to the next captured size, and shorter requests to `tokens`; the answer has
    the bits of `model.decode_states`, owns its memory, and the padding is computed like requests.

    Any number of threads and streams may use one GraphDecoder. A lock makes [wait for the event of
    the last user, copy in, replay, clone, record the event] one uninterrupted sequence on the
    caller's stream, and so the sequences of one batch size, whose static buffers nobody else
    touches, run on the GPU one after the other in the order of the lock. Each batch size has
    buffers, scratch and an event of its own, hence different sizes on different streams may
    overlap.

    After `swap`, `set_available` or a change of the catalogue's stock, the next call of each batch
    size captures again, unless `refresh` did so ahead. Replaced graphs, and the catalogue that they
    read, are dropped by a later call that finds their last replay ended; nothing waits for that.

    A capture waits for the GPU, empties torch's cache of free memory, and lets the calls of other
    decoders on that GPU wait. Other threads may use the GPU meanwhile, but for random numbers,
    graphs of their own and torch.cuda.synchronize (synchronising a stream or an event is fine).
    """

    def __init__(
        self,
        model: Recommender,
        settings: Settings,
        batch_sizes: Sequence[int],
        tokens: int | None,
        states_dtype: torch.dtype | str | None,
        max_excluded: int,
    ) -> None:
        self._graphs: dict[int, _Graph] = {}  # by batch size, all of self._state
        self._retired: list[_Graph] = []
        self._state: ServingState | None = None
        # Of the three above, and of everything that is enqueued.
        self._lock = _locks.setdefault(model.device, threading.Lock())
        self._model, self._settings = model, settings
        self.batch_sizes = _checked_batch_sizes(batch_sizes)
        if tokens is None:
            tokens = 2 + model.tokens.max_items * len(model.tokens.code_offsets)
        self.tokens = check_int(tokens, "tokens", low=0)
        self.states_dtype = _checked_dtype(states_dtype, model.dtype)
        self.max_excluded = check_int(max_excluded, "max_excluded", low=0)
        self.refresh()

    def __repr__(self) -> str:
        return (
            f"GraphDecoder({self._model!r}, batch_sizes={self.batch_sizes}, tokens={self.tokens}, "
            f"{self._settings}, states_dtype={self.states_dtype}, max_excluded={self.max_excluded})"
        )

    def __del__(self) -> None:
        # The allocator would hand out again what replays under way still read and write.
        for graph in (*self._graphs.values(), *self._retired):
            graph.done.synchronize()

    def refresh(self) -> None:
        """Captures what the present catalogue lacks; requests may come in between."""
        for size in self.batch_sizes:
            with self._lock:
                self._graph(size)

    @traced("graphs.decode_states")
    def decode_states(
        self, encoder_states: Tensor, mask: Tensor, exclude: object = None
    ) -> Recommendations:
        """As Recommender.decode_states, on the current stream of the model's device.

        encoder_states  [B, T, D] of `states_dtype`, B <= batch_sizes[-1], T <= tokens
        mask            bool [B, T], True = valid
        exclude         item ids never to recommend, at most max_excluded for each request

        Raises ValueError for other arguments.
        """
        self._model._check_states(encoder_states, mask)
        batch, tokens = mask.shape
        if (
            batch > self.batch_sizes[-1]
            or tokens > self.tokens
            or encoder_states.dtype != self.states_dtype
        ):
            self._refuse(encoder_states)
        excluded = None if exclude is None else self._exclusion(exclude, batch)
        size = self.batch_sizes[bisect.bisect_left(self.batch_sizes, batch)]
        with self._lock:
            graph = self._graph(size)
            results = graph.run(encoder_states.detach(), mask, excluded)
        plan = graph.plan
        return Recommendations(*unpack_results(results, plan, size, batch), plan.snapshot.version)

    def _graph(self, size: int) -> _Graph:
        """The graph for this batch size and the model's present state; the caller holds the lock.

        The state is read under the lock: whoever read an older one and came later would capture
        that again.
        """
        state = self._model._current()
        if state is not self._state:
            self._retired += self._graphs.values()
            self._graphs, self._state = {}, state
        if self._retired:
            self._retired = [old for old in self._retired if not old.done.query()]
        graph = self._graphs.get(size)
        if graph is None:
            plan = state.plans.get(self._settings)
            graph = _Graph(plan, size, self.tokens, self.states_dtype, self.max_excluded)
            self._graphs[size] = graph
        return graph

    def _refuse(self, states: Tensor) -> NoReturn:
        batch, tokens, _ = states.shape
        instead = "or call decode_states of the model"
        if batch > self.batch_sizes[-1]:
            raise ValueError(
                f"encoder_states: expected at most {self.batch_sizes[-1]} requests, the largest "
                f"captured batch, got {batch}; split them, capture a larger batch size, {instead}"
            )
        if tokens > self.tokens:
            raise ValueError(
                f"encoder_states: expected at most {self.tokens} tokens a request, as captured, "
                f"got {tokens}; capture with tokens={tokens}, {instead}"
            )
        raise ValueError(
            f"encoder_states: expected {self.states_dtype}, as captured, got {states.dtype}; "
            f"capture with states_dtype={states.dtype}, {instead}"
        )

    def _exclusion(self, exclude: object, batch: int) -> Tensor | None:
        """Ids ascending inside each request int64 [B, max_excluded] on the CPU; None: nothing."""
        flat, lengths = flatten_ids(exclude, "exclude", none_is_empty=True)
        if len(lengths) != batch:
            raise ValueError(
                f"exclude: expected one sequence of item ids (or None) per request, {batch}, got "
                f"{len(lengths)}; pass [[], ..] for requests that exclude nothing"
            )
        if flat.size == 0:
            return None
        longest = int(lengths.argmax())
        if lengths[longest] > self.max_excluded:
            raise ValueError(
                f"exclude[{longest}]: expected at most max_excluded={self.max_excluded} item ids, "
                f"as captured, got {lengths[longest]}; capture with a larger max_excluded, or call "
                "decode_states of the model"
            )
        return torch.from_numpy(exclusion_table(flat, lengths, self.max_excluded))


class StaticInputs:
    """What a graph reads, at addresses that stay, and how a smaller batch is put there.

    states [size, tokens, D], mask bool [size, tokens], excluded int64 [size, max_excluded] or None
    """

    def __init__(
        self, plan: DecodePlan, size: int, tokens: int, dtype: torch.dtype, max_excluded: int
    ) -> None:
        device = plan.packed.device
        self.states = torch.zeros(size, tokens, plan.packed.spec.dim, dtype=dtype, device=device)
        self.mask = torch.zeros(size, tokens, dtype=torch.bool, device=device)
        self.excluded = self.offsets = None
        if max_excluded:
            shape = (size, max_excluded)
            self.excluded = torch.full(shape, NO_ITEM, dtype=torch.int64, device=device)
            self.offsets = max_excluded * torch.arange(size + 1, device=device)
        self._excludes = False
        # Where the last batch went; the mask is False everywhere else.
        self._states, self._mask = self.states, self.mask

    def load(self, states: Tensor, mask: Tensor, excluded: Tensor | None) -> None:
        """Puts in states [B, T, D], mask [B, T], excluded [B, max_excluded]; B and T may be less.

        Further rows and tokens are masked; what they exclude does not matter.
        """
        if mask.shape != self._mask.shape:
            batch, tokens = mask.shape
            if batch < self._mask.shape[0] or tokens < self._mask.shape[1]:
                self.mask.zero_()
            self._states, self._mask = self.states[:batch, :tokens], self.mask[:batch, :tokens]
        self._states.copy_(states)
        self._mask.copy_(mask)
        if self.excluded is None:
            return
        if excluded is not None:
            self._excludes = True
            self.excluded[: len(excluded)].copy_(excluded, non_blocking=True)
        elif self._excludes:
            self.excluded.fill_(NO_ITEM)
            self._excludes = False

    def decode(self, plan: DecodePlan) -> Tensor:
        """One decode of all rows; its results packed (see pack_results)."""
        excluded = None if self.excluded is None else self.excluded.view(-1)
        return pack_results(plan.decode_states(self.states, self.mask, excluded, self.offsets))


class _Graph:
    """One captured batch size of one ServingState.

    plan  keeps weights and catalogue, whose addresses the graph holds
    done  an event after the last use of the static memory
    """

    @traced("graphs.capture")
    def __init__(
        self, plan: DecodePlan, size: int, tokens: int, dtype: torch.dtype, max_excluded: int
    ) -> None:
        self.plan = plan
        self.device = plan.packed.device
        # Tensors made in a caller's inference mode could not be written to outside of it.
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            self.done = torch.cuda.Event()
            self._graph = torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), _capturing:
                self._inputs = StaticInputs(plan, size, tokens, dtype, max_excluded)
                self._inputs.decode(plan)  # loads and sets up kernels, which a capture must not
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._results = self._inputs.decode(plan)
                self._graph.replay()  # so that no request pays for the upload to the GPU
                self.done.record(side)

    @traced("graphs.replay")
    def run(self, states: Tensor, mask: Tensor, excluded: Tensor | None) -> Tensor:
        """Packed results in memory of their own; one thread at a time.

        Every step names its device itself, whichever is current.
        """
        if excluded is not None:  # else the host would wait for the stream
            excluded = excluded.pin_memory()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        try:
            self._inputs.load(states, mask, excluded)
            self._graph.replay()
            return self._results.clone()
        finally:
            self.done.record(stream)  # even if the last step failed, the others may be under way


def pack_results(results: Results) -> Tensor:
    """items, scores, codes, counts one after the other in one int32 [N]: one clone copies all."""
    return torch.cat([tensor.view(-1).view(torch.int32) for tensor in results])


def unpack_results(packed: Tensor, plan: DecodePlan, size: int, batch: int) -> Results:
    """The first `batch` of `size` requests, as views of `packed`."""
    k, levels = plan.k, len(plan.levels)
    scores_at = 2 * size * k
    codes_at = scores_at + size * k
    counts_at = codes_at + size * k * levels
    return (
        packed[: 2 * batch * k].view(torch.int64).view(batch, k),
        packed.view(torch.float32).as_strided((batch, k), (k, 1), scores_at),
        packed.as_strided((batch, k, levels), (k * levels, levels, 1), codes_at),
        packed.as_strided((batch,), (1,), counts_at),
    )


def exclusion_table(
    flat: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """Ragged ids -> int64 [B, width], ascending, filled up with NO_ITEM; no length above width."""
    table = np.full((len(lengths), width), NO_ITEM, np.int64)
    table[np.arange(width) < lengths[:, None]] = flat
    table.sort(axis=1)
    return table


def _checked_batch_sizes(batch_sizes: object) -> tuple[int, ...]:
    """Ascending, each once; ValueError unless they are positive integers, at least one."""
    sizes = list(batch_sizes) if isinstance(batch_sizes, (Sequence, np.ndarray, Tensor)) else []
    if not sizes or isinstance(batch_sizes, (str, bytes)):
        raise ValueError(
            f"batch_sizes: expected a sequence of at least one batch size, got {batch_sizes!r}; "
            "pass the sizes to capture, such as (1, 8, 32)"
        )
    checked = [check_int(size, f"batch_sizes[{i}]", low=1) for i, size in enumerate(sizes)]
    return tuple(sorted(set(checked)))


def _checked_dtype(dtype: object, default: torch.dtype) -> torch.dtype:
    if dtype is None:
        return default
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise ValueError(
            f"states_dtype: expected one of {', '.join(DTYPES)}, a torch.dtype of these or None, "
            f"got {dtype!r}; pass the dtype of the states to decode"
        )
    return found
