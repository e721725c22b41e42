"""Serve a student: `load` a checkpoint, `batch` histories, `decode` them into items.

    histories --batch--> ids, mask --encoder--> states --decode_states--> items, scores, codes

What a decode needs is fixed beforehand: weights are packed when the Recommender is made, and each
combination of settings gets a DecodePlan the first time that it is used. A call then checks its own
arguments and runs one operator.

Threads: everything that `swap` and `set_available` change is one immutable ServingState. A call
reads it once, so codes, items and version of an answer always come from one catalogue.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import checkpoint
from .backends import check_launches, encoder_others, resolve, why_not
from .batching import Batch, describe, flatten_ids, make_batch
from .catalogue import Catalogue, CatalogueSnapshot
from .encoder import T5Encoder
from .encoder_plan import FORMS, Encoder, EncoderModule, EncoderPlan, plan_encoder
from .known_items import Integers, KnownItems
from .mlp_encoder import MLPEncoder
from .packing import pack
from .plan import DecodePlan, make_plan
from .serving_state import ServingState, Settings, settings_of
from .spec import DecodeSpec, TokenSpec, check_choice
from .student import Student, check_cast
from .tracing import traced

if TYPE_CHECKING:
    from .graphs import GraphDecoder

_Exclusion = tuple[Tensor | None, Tensor | None]
_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Recommendations:
    """What a decode found, best first, for each of B requests.

    items              int64 [B, k] item ids, -1 past counts
    scores             float32 [B, k] weighted log-probabilities, -inf past counts
    codes              int32 [B, k, L] semantic IDs, -1 past counts
    counts             int32 [B] how many of the k are real
    catalogue_version  of the catalogue that all of these come from
    """

    items: Tensor
    scores: Tensor
    codes: Tensor
    counts: Tensor
    catalogue_version: int


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    backend: str = "auto",
    encoder_form: str = "auto",
    launches: int = 1,
) -> Recommender:
    """A Recommender from a checkpoint directory or a Hugging Face hub id.

    device, dtype ("float32", "bfloat16", "float16" or a torch.dtype), backend and encoder_form
    ("throughput", "torch", ..: see sidmlp_kernels.encoder_plan) may be "auto". launches: see
    Recommender.
    Raises ValueError for a damaged checkpoint and for what cannot run here (see
    sidmlp_kernels.checkpoint and sidmlp_kernels.backends).
    """
    found = checkpoint.load(path)
    return Recommender(
        found.student,
        found.catalogue,
        found.encoder,
        device,
        dtype,
        backend,
        tokens=found.tokens,
        decode=found.decode,
        encoder_form=encoder_form,
        launches=launches,
    )


class Recommender:
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

    def __init__(
        self,
        student: Student,
        catalogue: Catalogue,
        encoder: Encoder | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        backend: str = "auto",
        *,
        tokens: TokenSpec | None = None,
        decode: DecodeSpec | None = None,
        encoder_form: str = "auto",
        launches: int = 1,
    ) -> None:
        _check_type(student, "student", Student)
        _check_type(catalogue, "catalogue", Catalogue)
        codes = student.spec.codes_per_level
        self.student = student
        self.tokens = tokens if tokens is not None else TokenSpec.for_codes(codes)
        self.defaults = decode if decode is not None else DecodeSpec.for_levels(len(codes))
        _check_type(self.tokens, "tokens", TokenSpec)
        _check_type(self.defaults, "decode", DecodeSpec)

        # A copy whose values are checked, fp32, which is what save_pretrained writes.
        self._module: EncoderModule | None = None
        if isinstance(encoder, T5Encoder):
            self._module = T5Encoder.from_weights(encoder.spec, encoder.state_dict())
        elif isinstance(encoder, MLPEncoder):
            self._module = MLPEncoder.from_weights(encoder.spec, encoder.state_dict())
        elif encoder is not None and not callable(encoder):
            raise ValueError(
                "encoder: expected None, a T5Encoder, an MLPEncoder or a callable (ids, mask) -> "
                f"states, got {type(encoder).__name__}; pass one of these"
            )
        # Checks that the parts fit each other.
        checkpoint.Checkpoint(student, self.tokens, self.defaults, catalogue, self._module)

        beams = self.defaults.num_beams
        choice = resolve(backend, device, dtype, spec=student.spec, num_beams=beams)
        self._asked = backend
        self._launches = launches
        check_launches(launches, choice.backend.name, student.spec, choice.dtype, beams)
        self.backend, self.device, self.dtype = choice.backend.name, choice.device, choice.dtype
        student.check_cast(self.dtype)
        if self._module is not None:
            check_cast(self._module.state_dict(), self.dtype, "encoder weights")
            encoder = self._module
        self._encoder: EncoderPlan | None = None
        if encoder is not None:
            self._encoder = plan_encoder(
                encoder,
                self.backend,
                self.device,
                self.dtype,
                encoder_form,
                self.tokens.max_length,
                encoder_others(self.backend, self.dtype) if backend == "auto" else (),
            )
        else:
            check_choice(encoder_form, "encoder_form", FORMS)
        self._packed = pack(student, self.dtype).to(self.device)
        self._write_lock = threading.Lock()
        self._state = ServingState.first(catalogue, codes, self._make_plan)

    def __repr__(self) -> str:
        return (
            f"Recommender({self._state.catalogue!r}, backend={self.backend!r}, "
            f"device={str(self.device)!r}, dtype={self.dtype})"
        )

    # -- the catalogue

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue that is recommended from now."""
        return self._state.catalogue

    @property
    def known_items(self) -> KnownItems:
        """Every item that a history may contain: this catalogue's and those of the ones before."""
        return self._current().snapshot.known

    @traced("swap")
    def swap(self, catalogue: Catalogue) -> None:
        """Recommends from `catalogue` from now on; decodes under way finish with the old one.

        Items of the old catalogue stay known to histories; where both know an item, the new codes
        hold. A CUDA graph that you captured yourself goes on reading the old catalogue: keep it, or
        use `capture`, which captures again. Raises ValueError, and changes nothing, if the
        catalogue does not fit the student.
        """
        _check_type(catalogue, "catalogue", Catalogue)
        checkpoint.check_catalogue(catalogue, self.student.spec.codes_per_level)
        with self._write_lock:
            self._state = self._state.replaced_by(catalogue, self._make_plan)

    @traced("set_available")
    def set_available(self, ids: Integers, available: Integers) -> None:
        """Takes items out of stock (False) or back (True); see Catalogue.set_available."""
        with self._write_lock:  # so that no swap comes in between
            self._state.catalogue.set_available(ids, available)
            self._refresh()

    def _current(self) -> ServingState:
        """The state to work with; a new one if somebody changed the catalogue's stock."""
        state = self._state
        if state.is_current():
            return state
        with self._write_lock:
            self._refresh()
            return self._state

    def _refresh(self) -> None:
        """Catches up with the catalogue's stock; the caller holds the write lock."""
        if not self._state.is_current():
            self._state = self._state.replaced_by(self._state.catalogue, self._make_plan)

    def _make_plan(self, snapshot: CatalogueSnapshot, settings: Settings) -> DecodePlan:
        spec, beams = self.student.spec, settings.num_beams
        if self._asked == "auto":  # chooses for these settings, on the model's device
            choice = resolve("auto", self.device, self.dtype, spec=spec, num_beams=beams)
            backend, chosen = choice.backend.name, choice.reason
        else:
            backend, chosen = self.backend, "asked for"
            reason = why_not(backend, spec, dtype=self.dtype, num_beams=beams)
            if reason:
                raise ValueError(
                    f"backend: expected {backend} to run these settings, got {reason}; "
                    "change them or load the model with another backend"
                )
        plan = make_plan(
            self._packed,
            snapshot,
            backend,
            **settings._asdict(),
            launches=self._launches,
            chosen=chosen,
            encoder=self._encoder,
        )
        plan.prepare()
        return plan

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
        known = self._current().snapshot.known
        made = make_batch(histories, known, self.tokens, users=users, unknown=unknown)
        return made if self.device.type == "cpu" else made.to(self.device)

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
    ) -> Recommendations:
        """The k best items for each request of `batch`.

        k              results per request, 1..num_beams
        num_beams      candidates that survive each level (default: the checkpoint's)
        exclude        item ids never to recommend, one sequence (or None) per request; unknown ids
                       are ignored
        temperatures   t_l > 0 per level, level_weights w_l, normalisation "children" or "codebook":
                       see DecodeSpec; None: the checkpoint's

        Score = sum over levels of w_l * log softmax(logits_l / t_l). Ties: higher score first, then
        the lower parent rank, then the lower code; items on one semantic ID in catalogue order.
        Fewer than k results are padded, see Recommendations. Raises ValueError for wrong arguments.
        """
        encoder = self._need_encoder("decode")
        _check_type(batch, "batch", Batch)
        if batch.ids.device != self.device:
            raise ValueError(
                f"batch: expected tensors on {self.device}, got {batch.ids.device}; "
                "use batch.to(model.device)"
            )
        if self._module is not None:
            batch.check_vocabulary(self._module.spec.vocab_size)
            encoder.check_tokens(batch.ids)
        plan = self._plan(k, num_beams, temperatures, level_weights, normalisation)
        excluded = self._exclusion(exclude, len(batch))
        if encoder.joins_decode:
            results = plan.recommend(batch.ids.contiguous(), batch.mask.contiguous(), *excluded)
            return Recommendations(*results, plan.snapshot.version)
        states = self._encode(encoder, batch)
        self._check_states(states, batch.mask)
        return self._run_states(plan, states, batch.mask, excluded)

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
    ) -> Recommendations:
        """Like `decode`, from encoder states.

        encoder_states  [B, T, D] float32, bfloat16 or float16 on the model's device
        mask            bool [B, T], True = valid; other states are never read. A request without
                        any valid state gets an answer, one with states that are not finite none
        """
        plan = self._plan(k, num_beams, temperatures, level_weights, normalisation)
        self._check_states(encoder_states, mask)
        excluded = self._exclusion(exclude, encoder_states.shape[0])
        return self._run_states(plan, encoder_states, mask, excluded)

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
        self._check_tensor(context, "context", (torch.float32,), ("batch", self.student.spec.dim))
        ids, offsets = self._exclusion(exclude, context.shape[0])
        results = plan.beam_decode(context.detach().contiguous(), ids, offsets)
        return Recommendations(*results, plan.snapshot.version)

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
        from .graphs import GraphDecoder  # which imports this module

        if self.device.type != "cuda":
            raise ValueError(
                f"capture: expected a model on a GPU, got one on {self.device}; load it with "
                'device="cuda", or call decode_states, which needs no graph'
            )
        settings = settings_of(
            self.defaults, k, num_beams, temperatures, level_weights, normalisation
        )
        return GraphDecoder(self, settings, batch_sizes, tokens, states_dtype, max_excluded)

    # -- files

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, include_encoder: bool = True
    ) -> None:
        """Writes a checkpoint that `load` reads, fp32, in place of one that is there.

        Raises ValueError for an encoder that is a callable of your own, which a checkpoint cannot
        hold, unless `include_encoder` is False.
        """
        if include_encoder and self._encoder is not None and self._module is None:
            raise ValueError(
                "encoder: expected None, a T5Encoder or an MLPEncoder to save, got "
                f"{type(self._encoder.module).__name__}; pass include_encoder=False to leave it out"
            )
        checkpoint.save(
            checkpoint.Checkpoint(
                self.student,
                self.tokens,
                self.defaults,
                Catalogue(self._current().snapshot),
                self._module if include_encoder else None,
            ),
            directory,
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, include_encoder: bool = True
    ) -> str:
        """Uploads the checkpoint to the Hugging Face hub as one commit; returns the commit's URL.

        The repository is made if it does not exist. Uses the token of `hf auth login`.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as parent:
            directory = os.path.join(parent, "model")
            self.save_pretrained(directory, include_encoder=include_encoder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message="Upload student"
            )
        return commit.commit_url

    # -- arguments

    def _plan(
        self,
        k: int,
        num_beams: int | None,
        temperatures: Sequence[float] | None,
        level_weights: Sequence[float] | None,
        normalisation: str | None,
    ) -> DecodePlan:
        settings = settings_of(
            self.defaults, k, num_beams, temperatures, level_weights, normalisation
        )
        return self._current().plans.get(settings)

    def _need_encoder(self, method: str) -> EncoderPlan:
        if self._encoder is None:
            raise ValueError(
                f"{method}: expected a model with an encoder, got one without; pass encoder= to "
                "Recommender, or use decode_states with states of your own"
            )
        return self._encoder

    def _check_states(self, states: Tensor, mask: Tensor) -> None:
        dim, device = self.student.spec.dim, self.device
        if (
            isinstance(states, Tensor)
            and isinstance(mask, Tensor)
            and mask.dtype == torch.bool
            and states.dtype in _STATE_DTYPES
            and states.shape == (*mask.shape, dim)
            and mask.ndim == 2
            and states.device == device
            and mask.device == device
        ):
            return  # the usual call must not pay for finding the words of an error
        self._check_tensor(states, "encoder_states", _STATE_DTYPES, ("batch", "tokens", dim))
        self._check_tensor(mask, "mask", (torch.bool,), tuple(states.shape[:2]))

    def _check_tensor(
        self,
        tensor: object,
        name: str,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int | str, ...],
    ) -> None:
        """ValueError unless `tensor` has this dtype, shape (a name is any size) and device."""
        if isinstance(tensor, Tensor) and tensor.ndim == len(shape):
            sizes = zip(shape, tensor.shape, strict=True)
            fits = all(isinstance(wanted, str) or wanted == got for wanted, got in sizes)
            if fits and tensor.dtype in dtypes and tensor.device == self.device:
                return
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a {kinds} tensor [{', '.join(map(str, shape))}] on {self.device}, "
            f"got {describe(tensor)}; convert it with .to() or correct its shape"
        )

    @traced("encoder")
    def _encode(self, encoder: EncoderPlan, batch: Batch) -> Tensor:
        return encoder(batch.ids, batch.mask)

    def _run_states(
        self, plan: DecodePlan, states: Tensor, mask: Tensor, excluded: _Exclusion
    ) -> Recommendations:
        results = plan.decode_states(states.detach().contiguous(), mask.contiguous(), *excluded)
        return Recommendations(*results, plan.snapshot.version)

    def _exclusion(self, exclude: object, batch: int) -> _Exclusion:
        """Ids ascending inside each request int64 [N], offsets int64 [B + 1], on the device."""
        if exclude is None:
            return None, None
        flat, lengths = flatten_ids(exclude, "exclude", none_is_empty=True)
        if len(lengths) != batch:
            raise ValueError(
                f"exclude: expected one sequence of item ids (or None) per request, {batch}, got "
                f"{len(lengths)}; pass [[], ..] for requests that exclude nothing"
            )
        if flat.size == 0:
            return None, None
        ids, offsets = flat.copy(), np.concatenate([[0], np.cumsum(lengths)])
        for begin, end in itertools.pairwise(offsets.tolist()):
            ids[begin:end].sort()  # ten times faster than one lexsort over the batch
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(offsets).to(self.device)


def _check_type(value: object, name: str, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"{name}: expected a {kind.__name__}, got {type(value).__name__}; "
            f"make one, see help(sidmlp_kernels.{kind.__name__})"
        )
