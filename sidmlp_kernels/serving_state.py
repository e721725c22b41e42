"""What a Recommender exchanges as a whole when its catalogue changes, and the plans made for it.

A call reads one ServingState and takes everything from it, so that codes, items and version of an
answer come from one catalogue; `replaced_by` builds the next state beside it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .catalogue import Catalogue, CatalogueSnapshot
from .plan import DecodePlan
from .spec import NORMALISATIONS, DecodeSpec, check_choice, check_floats, check_int

MAX_PLANS = 32


class Settings(NamedTuple):
    """Decode arguments in one form, checked; the key of a plan."""

    k: int
    num_beams: int
    temperatures: tuple[float, ...]
    level_weights: tuple[float, ...]
    normalisation: str


def settings_of(
    defaults: DecodeSpec,
    k: int,
    num_beams: int | None,
    temperatures: Sequence[float] | None,
    level_weights: Sequence[float] | None,
    normalisation: str | None,
) -> Settings:
    """The arguments of a call, None meaning the default; ValueError for a wrong one.

    Every call passes here, so plain ints in range and None must cost no more than a comparison.
    """
    if num_beams is None:
        num_beams = defaults.num_beams
    elif type(num_beams) is not int or num_beams < 1:
        num_beams = check_int(num_beams, "num_beams", low=1)
    if type(k) is not int or not 1 <= k <= num_beams:
        k = check_int(k, "k", low=1)
        if k > num_beams:
            raise ValueError(f"k: expected at most num_beams={num_beams}, got {k}; raise num_beams")
    levels = len(defaults.temperatures)
    if temperatures is None:
        temperatures = defaults.temperatures
    else:
        temperatures = check_floats(temperatures, "temperatures", length=levels, positive=True)
    if level_weights is None:
        level_weights = defaults.level_weights
    else:
        level_weights = check_floats(level_weights, "level_weights", length=levels)
    if normalisation is None:
        normalisation = defaults.normalisation
    else:
        check_choice(normalisation, "normalisation", NORMALISATIONS)
    return Settings(k, num_beams, temperatures, level_weights, normalisation)


PlanMaker = Callable[[CatalogueSnapshot, Settings], DecodePlan]


class Plans:
    """The plans of one snapshot; of more than 32 the least recently used is dropped."""

    def __init__(self, snapshot: CatalogueSnapshot, make: PlanMaker) -> None:
        self._snapshot, self._make = snapshot, make
        self._plans: OrderedDict[Settings, DecodePlan] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, settings: Settings) -> DecodePlan:
        """The plan for these settings, made at their first use."""
        plan = self._plans.get(settings)
        if plan is not None:
            if not torch.compiler.is_compiling():  # torch.compile cannot enter a lock
                with self._lock:
                    if settings in self._plans:
                        self._plans.move_to_end(settings)
            return plan
        plan = self._make(self._snapshot, settings)  # without the lock: others need not wait
        with self._lock:
            self._plans[settings] = plan
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        return plan

    def settings(self) -> list[Settings]:
        """Those that there are plans for, the least recently used first."""
        with self._lock:
            return list(self._plans)


@dataclass(frozen=True, eq=False)
class ServingState:
    """One catalogue at one version, with its plans.

    catalogue  the caller's, whose stock may change at any time
    source     its snapshot that this state was made from
    snapshot   the same, but with all known items and with the student's codes_per_level
    """

    catalogue: Catalogue
    source: CatalogueSnapshot
    snapshot: CatalogueSnapshot
    plans: Plans

    @classmethod
    def first(
        cls, catalogue: Catalogue, codes_per_level: tuple[int, ...], make: PlanMaker
    ) -> ServingState:
        """The state that a Recommender starts with."""
        source = catalogue.snapshot()
        snapshot = dataclasses.replace(source, codes_per_level=codes_per_level)
        return cls(catalogue, source, snapshot, Plans(snapshot, make))

    def is_current(self) -> bool:
        """Whether the catalogue is still at this state's version."""
        return self.source is self.catalogue.snapshot()

    def replaced_by(self, catalogue: Catalogue, make: PlanMaker) -> ServingState:
        """The state for `catalogue` (this one after a change of stock, or another).

        Items known here stay known, new codes win. Plans are made now for all settings in use, so
        that no request waits for them.
        """
        source = catalogue.snapshot()
        known = self.snapshot.known
        if source.known is not self.source.known:
            known = known.merged(source.known)
        codes = self.snapshot.codes_per_level
        snapshot = dataclasses.replace(source, known=known, codes_per_level=codes)
        plans = Plans(snapshot, make)
        for settings in self.plans.settings():
            plans.get(settings)
        return ServingState(catalogue, source, snapshot, plans)
