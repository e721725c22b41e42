"""What a Recommender serves from: a student, its encoder, a catalogue that may change, and plans.

What a decode needs is fixed beforehand: weights are packed when the model is made, and each
combination of settings gets a DecodePlan the first time that it is used.

Threads: everything that `swap` and `set_available` change is one immutable ServingState. A call
reads it once, so codes, items and version of an answer always come from one catalogue.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from . import checkpoint
from .backends import check_launches, encoder_others, resolve, why_not
from .catalogue import Catalogue, CatalogueSnapshot
from .decode_arguments import check_type
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


class ServedModel:
    """The parts of a Recommender, checked and ready; its arguments are described there."""

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
        check_type(student, "student", Student)
        check_type(catalogue, "catalogue", Catalogue)
        codes = student.spec.codes_per_level
        self.student = student
        self.tokens = tokens if tokens is not None else TokenSpec.for_codes(codes)
        self.defaults = decode if decode is not None else DecodeSpec.for_levels(len(codes))
        check_type(self.tokens, "tokens", TokenSpec)
        check_type(self.defaults, "decode", DecodeSpec)

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
            f"{type(self).__name__}({self._state.catalogue!r}, backend={self.backend!r}, "
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
        check_type(catalogue, "catalogue", Catalogue)
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

    # -- plans

    def _plan(
        self,
        k: int,
        num_beams: int | None,
        temperatures: Sequence[float] | None,
        level_weights: Sequence[float] | None,
        normalisation: str | None,
        propose: bool = False,
    ) -> DecodePlan:
        """For these arguments of a call; propose: for num_beams results instead of k."""
        settings = settings_of(
            self.defaults, k, num_beams, temperatures, level_weights, normalisation
        )
        if propose:
            settings = settings._replace(k=settings.num_beams)
        return self._current().plans.get(settings)

    def _need_encoder(self, method: str) -> EncoderPlan:
        if self._encoder is None:
            raise ValueError(
                f"{method}: expected a model with an encoder, got one without; pass encoder= to "
                "load or Recommender, or use decode_states with states of your own"
            )
        return self._encoder
