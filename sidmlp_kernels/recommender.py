"""Serve a student: `load` a checkpoint, `batch` histories, `decode` them into items.

    histories --batch--> ids, mask --encoder--> states --decode_states--> items, scores, codes

A call checks its own arguments and runs one operator, or two; served_model.py has what is fixed
beforehand. `decode_stream` does so for one batch after the other, from lists to lists, and
`capture_requests` and `capture` as CUDA graphs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint, recommender_files
from .batching import UNKNOWN, Batch, make_batch
from .decode_arguments import (
    Exclusion,
    check_device,
    check_states,
    check_tensor,
    check_type,
    exclusion_tensors,
)
from .encoder_plan import Encoder, EncoderPlan
from .ops.library import Results
from .plan import DecodePlan
from .recommendations import Recommendations
from .rescoring import Rescore, check_rescore, rescored
from .served_model import ServedModel
from .serving_state import settings_of
from .spec import check_choice
from .streaming import DecodeStream, Requests, lanes
from .tracing import traced

if TYPE_CHECKING:
    from .graphs import GraphDecoder
    from .request_graphs import RequestGraphs


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    backend: str = "auto",
    encoder_form: str = "auto",
    launches: int = 1,
    encoder: Encoder | None = None,
) -> Recommender:
    """A Recommender from a checkpoint directory or a Hugging Face hub id.

    device, dtype ("float32", "bfloat16", "float16" or a torch.dtype), backend and encoder_form
    ("throughput", "torch", ..: see sidmlp_kernels.encoder_plan) may be "auto". launches: see
    Recommender. encoder: one of your own in place of the checkpoint's, which may have none.
    Raises ValueError for a damaged checkpoint and for what cannot run here (see
    sidmlp_kernels.checkpoint and sidmlp_kernels.backends).
    """
    found = checkpoint.load(path)
    return Recommender(
        found.student,
        found.catalogue,
        found.encoder if encoder is None else encoder,
        device,
        dtype,
        backend,
        tokens=found.tokens,
        decode=found.decode,
        encoder_form=encoder_form,
        launches=launches,
    )


class Recommender(ServedModel):
    """A student, the catalogue that it recommends from and, usually, an encoder.

    encoder  None (then only `decode_states` and `beam_decode` work), a T5Encoder or MLPEncoder
             (copied, converted to `dtype`, saved with the model) or any callable (ids int64 [B, T],
             mask bool [B, T]) -> states [B, T, D] on the model's device
    backend  "auto" chooses for each combination of settings, on one device; `backend` afterwards is
             its choice for the defaults
    tokens   how histories become ids; None: TokenSpec.for_codes(codes_per_level)
    decode   defaults of a call; None: DecodeSpec.for_levels(L)
    encoder_form  how the encoder runs, see sidmlp_kernels.encoder_plan
    launches  2: decodes in two launches instead of one, with the same results; a large batch may
             gain (docs/kernels.md). On the cuda backend's tensor cores alone, and never chosen by
             itself; memory of 4 (L H + C_1) bytes a request

    Any number of threads may use one Recommender. Raises ValueError where the parts do not fit each
    other, where a weight overflows in `dtype`, and where nothing here can run them.
    """

    # -- requests

    def batch(
        self,
        histories: object,
        users: Sequence[int | None] | None = None,
        unknown: str = "raise",
    ) -> Batch:
        """Item id histories, oldest first, one sequence per request -> Batch on the model's device.

        users    one id >= 0 (or None) per request, for encoders trained with user tokens
        unknown  "raise", or "drop" to skip items that are not known
        An empty history is a request too; of a long one the newest `tokens.max_items` items count.

        Raises ValueError for unknown items (named with their request), wrong types and lengths, and
        for a model without an encoder.
        """
        self._need_encoder("batch")
        return make_batch(
            histories,
            self.known_items,
            self.tokens,
            users=users,
            unknown=unknown,
            device=self.device,
        )

    @traced("decode")
    def decode(
        self,
        batch: Batch,
        k: int = 10,
        num_beams: int | None = None,
        exclude: object = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
        rescore: Rescore | None = None,
    ) -> Recommendations:
        """The k best items for each request of `batch`.

        k              results per request, 1..num_beams
        num_beams      candidates that survive each level (default: the checkpoint's)
        exclude        item ids never to recommend, one sequence (or None) per request; unknown ids
                       are ignored
        temperatures   t_l > 0 per level, level_weights w_l, normalisation "children" or "codebook":
                       see DecodeSpec; None: the checkpoint's
        rescore        scores the num_beams best items, in place of the student, to choose and order
                       the k by; see sidmlp_kernels.rescoring. Ties: the student's order

        Score = sum over levels of w_l * log softmax(logits_l / t_l). Ties: higher score first, then
        the lower parent rank, then the lower code; items on one semantic ID in catalogue order.
        Fewer than k results are padded, see Recommendations. Raises ValueError for wrong arguments,
        and for scores of `rescore` that do not fit or are NaN, for which it waits for the device.
        """
        encoder = self._need_encoder("decode")
        check_type(batch, "batch", Batch)
        check_device(batch.ids, self.device)
        if self._module is not None:
            batch.check_vocabulary(self._module.spec.vocab_size)
            encoder.check_tokens(batch.ids)
        settings = (k, num_beams, temperatures, level_weights, normalisation)
        if rescore is not None:
            check_rescore(rescore)
            plan = self._plan(*settings, propose=True)
            excluded = exclusion_tensors(exclude, len(batch), self.device)
            states = self._states(batch.ids, batch.mask)
            return self._rescored(plan, k, rescore, states, batch.mask.contiguous(), excluded)
        plan = self._plan(*settings)
        excluded = exclusion_tensors(exclude, len(batch), self.device)
        results = self._decode_ids(plan, batch.ids, batch.mask, excluded)
        return Recommendations(*results, plan.snapshot.version)

    @traced("decode_states")
    def decode_states(
        self,
        encoder_states: Tensor,
        mask: Tensor,
        k: int = 10,
        num_beams: int | None = None,
        exclude: object = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
        rescore: Rescore | None = None,
    ) -> Recommendations:
        """Like `decode`, from encoder states.

        encoder_states  [B, T, D] float32, bfloat16 or float16 on the model's device
        mask            bool [B, T], True = valid; other states are never read. A request without
                        any valid state gets an answer, one with states that are not finite none
        """
        settings = (k, num_beams, temperatures, level_weights, normalisation)
        if rescore is not None:
            check_rescore(rescore)
        plan = self._plan(*settings, propose=rescore is not None)
        check_states(encoder_states, mask, self.student.spec.dim, self.device)
        excluded = exclusion_tensors(exclude, encoder_states.shape[0], self.device)
        states, mask = encoder_states.detach().contiguous(), mask.contiguous()
        if rescore is not None:
            return self._rescored(plan, k, rescore, states, mask, excluded)
        results = plan.decode_states(states, mask, *excluded)
        return Recommendations(*results, plan.snapshot.version)

    @traced("beam_decode")
    def beam_decode(
        self,
        context: Tensor,
        k: int = 10,
        num_beams: int | None = None,
        exclude: object = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
    ) -> Recommendations:
        """Like `decode`, from context vectors float32 [B, D] on the model's device."""
        plan = self._plan(k, num_beams, temperatures, level_weights, normalisation)
        shape = ("batch", self.student.spec.dim)
        check_tensor(context, "context", (torch.float32,), shape, self.device)
        excluded = exclusion_tensors(exclude, context.shape[0], self.device)
        results = plan.beam_decode(context.detach().contiguous(), *excluded)
        return Recommendations(*results, plan.snapshot.version)

    def decode_stream(
        self,
        batches: Iterable[object],
        k: int = 10,
        num_beams: int | None = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
        *,
        unknown: str = "raise",
        depth: int = 2,
    ) -> DecodeStream:
        """The answers to one batch after the other, in order, on the CPU.

        batches  each of them histories as `batch` takes them, a Batch, or Requests, which may have
                 users and exclusions
        unknown  as in `batch`
        depth    of batches under way on a GPU: while one is decoded the next is prepared and copied
        The other arguments are those of `decode`. A batch is read when its turn comes, and answered
        from the catalogue of that moment. See DecodeStream for what happens to a wrong one; raises
        ValueError for wrong settings.
        """
        self._need_encoder("decode_stream")
        check_choice(unknown, "unknown", UNKNOWN)
        settings = (k, num_beams, temperatures, level_weights, normalisation)
        settings_of(self.defaults, *settings)

        def decode(requests: Requests) -> Recommendations:
            batch = self._batch_of(requests, unknown)
            return self.decode(batch, k, num_beams, requests.exclude, *settings[2:])

        return DecodeStream(batches, decode, lanes(self.device, depth))

    def _batch_of(self, requests: Requests, unknown: str) -> Batch:
        if isinstance(requests.histories, Batch):
            return requests.histories
        return self.batch(requests.histories, requests.users, unknown)

    # -- graphs

    def capture_requests(
        self,
        batch_sizes: Sequence[int] = (1, 8, 32, 128, 512),
        tokens: int | None = None,
        k: int = 10,
        num_beams: int | None = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
        max_excluded: int = 0,
    ) -> RequestGraphs:
        """Captures whole requests, encoder and decode, as CUDA graphs; see RequestGraphs.

        Arguments as in `capture`. Raises ValueError for wrong arguments, for a model that is not on
        a GPU, and for an encoder that runs as PyTorch (see sidmlp_kernels.encoder_plan).
        """
        from .request_graphs import RequestGraphs

        self._need_gpu("capture_requests", "decode")
        settings = settings_of(
            self.defaults, k, num_beams, temperatures, level_weights, normalisation
        )
        return RequestGraphs(self, settings, batch_sizes, tokens, max_excluded)

    def capture(
        self,
        batch_sizes: Sequence[int] = (1, 8, 32, 128),
        tokens: int | None = None,
        k: int = 10,
        num_beams: int | None = None,
        temperatures: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        normalisation: str | None = None,
        states_dtype: torch.dtype | str | None = None,
        max_excluded: int = 0,
    ) -> GraphDecoder:
        """Captures `decode_states` as CUDA graphs with these settings, see GraphDecoder.

        batch_sizes   of the graphs; a batch runs in the smallest that holds it
        tokens        the longest request, T (None: that of `batch`)
        states_dtype  of the states (None: the model's dtype)
        max_excluded  item ids that a request may exclude

        Raises ValueError for wrong arguments and for a model that is not on a GPU.
        """
        from .graphs import GraphDecoder

        self._need_gpu("capture", "decode_states")
        settings = settings_of(
            self.defaults, k, num_beams, temperatures, level_weights, normalisation
        )
        return GraphDecoder(self, settings, batch_sizes, tokens, states_dtype, max_excluded)

    def _need_gpu(self, method: str, instead: str) -> None:
        if self.device.type != "cuda":
            raise ValueError(
                f"{method}: expected a model on a GPU, got one on {self.device}; load it with "
                f'device="cuda", or call {instead}, which needs no graph'
            )

    # -- files

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, include_encoder: bool = True
    ) -> None:
        """Writes a checkpoint that `load` reads, fp32, in place of one that is there.

        Raises ValueError for an encoder that is a callable of your own, which a checkpoint cannot
        hold, unless `include_encoder` is False.
        """
        recommender_files.save(self, directory, include_encoder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, include_encoder: bool = True
    ) -> str:
        """Uploads the checkpoint to the Hugging Face hub as one commit; returns the commit's URL.

        The repository is made if it does not exist. Uses the token of `hf auth login`.
        """
        return recommender_files.push(self, repo_id, private, include_encoder)

    # -- operators

    def _decode_ids(
        self, plan: DecodePlan, ids: Tensor, mask: Tensor, excluded: Exclusion
    ) -> Results:
        """Token ids to results in as few operators as there are."""
        if plan.joins_encoder:
            return plan.recommend(ids.contiguous(), mask.contiguous(), *excluded)
        return plan.decode_states(self._states(ids, mask), mask.contiguous(), *excluded)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoder makes of token ids, checked, contiguous."""
        states = self._encode(self._need_encoder("decode"), ids, mask)
        check_states(states, mask, self.student.spec.dim, self.device)
        return states.detach().contiguous()

    def _rescored(
        self,
        plan: DecodePlan,
        k: int,
        rescore: Rescore,
        states: Tensor,
        mask: Tensor,
        excluded: Exclusion,
    ) -> Recommendations:
        proposed = plan.decode_states(states, mask, *excluded)
        results = rescored(proposed, k, rescore, states, mask)
        return Recommendations(*results, plan.snapshot.version)

    @traced("encoder")
    def _encode(self, encoder: EncoderPlan, ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(ids, mask)
