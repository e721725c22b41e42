"""`decode_states` as replays of CUDA graphs, one for each of a few batch sizes.

    states, mask --copy--> static inputs --replay--> static results --clone--> Recommendations

A replay costs the host one launch where the operator costs its checks, its allocations and its
launches. Made by Recommender.capture; request_graphs.py has the same from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from .backends import DTYPES
from .captured_graph import StaticExclusion
from .decode_arguments import check_states
from .graphs_by_size import GraphsBySize
from .plan import DecodePlan
from .recommendations import PackedResults, Recommendations
from .serving_state import Settings
from .tracing import traced

if TYPE_CHECKING:
    from .served_model import ServedModel


class StaticStates:
    """What a graph of `decode_states` reads, and how a smaller batch is put there.

    states [size, tokens, D], mask bool [size, tokens], exclusion of max_excluded ids a request
    """

    def __init__(
        self, plan: DecodePlan, size: int, tokens: int, dtype: torch.dtype, max_excluded: int
    ) -> None:
        device = plan.packed.device
        self.states = torch.zeros(size, tokens, plan.packed.spec.dim, dtype=dtype, device=device)
        self.mask = torch.zeros(size, tokens, dtype=torch.bool, device=device)
        self.exclusion = StaticExclusion(size, max_excluded, device)
        # Where the last batch went; the mask is False everywhere else.
        self._states, self._mask = self.states, self.mask

    def load(self, states: Tensor, mask: Tensor, excluded: Tensor | None) -> None:
        """Puts in states [B, T, D], mask [B, T], excluded [B, max_excluded]; B and T may be less.

        Further rows and tokens are masked.
        """
        if mask.shape != self._mask.shape:
            batch, tokens = mask.shape
            if batch < self._mask.shape[0] or tokens < self._mask.shape[1]:
                self.mask.zero_()
            self._states, self._mask = self.states[:batch, :tokens], self.mask[:batch, :tokens]
        self._states.copy_(states)
        self._mask.copy_(mask)
        self.exclusion.load(excluded)

    def decode(self, plan: DecodePlan) -> PackedResults:
        """One decode of all rows."""
        excluded = self.exclusion.ids, self.exclusion.offsets
        return PackedResults.of(plan.decode_states(self.states, self.mask, *excluded))


class GraphDecoder(GraphsBySize[StaticStates]):
    """`Recommender.decode_states` with fixed settings; see GraphsBySize for threads and swaps.

    A batch is padded to the next captured size, and shorter requests to `tokens`; the answer has
    the bits of `model.decode_states`, owns its memory, and the padding is computed like requests.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: Settings,
        batch_sizes: Sequence[int],
        tokens: int | None,
        states_dtype: torch.dtype | str | None,
        max_excluded: int,
    ) -> None:
        super().__init__(model, settings, batch_sizes, tokens, max_excluded)
        self.states_dtype = _checked_dtype(states_dtype, model.dtype)
        self.refresh()

    def __repr__(self) -> str:
        return (
            f"GraphDecoder({self._model!r}, batch_sizes={self.batch_sizes}, tokens={self.tokens}, "
            f"{self._settings}, states_dtype={self.states_dtype}, max_excluded={self.max_excluded})"
        )

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
        check_states(encoder_states, mask, self._model.student.spec.dim, self._model.device)
        batch, tokens = mask.shape
        if (
            batch > self.batch_sizes[-1]
            or tokens > self.tokens
            or encoder_states.dtype != self.states_dtype
        ):
            self._refuse(encoder_states)
        excluded = None if exclude is None else self._exclusion(exclude, batch)
        states = encoder_states.detach()
        with self._lock:
            graph = self._graph(self._size_for(batch))
            results = graph.run(lambda inputs: inputs.load(states, mask, excluded))
        return results.recommendations(batch, graph.plan.snapshot.version)

    def _make_inputs(self, plan: DecodePlan, size: int) -> StaticStates:
        return StaticStates(plan, size, self.tokens, self.states_dtype, self.max_excluded)

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
