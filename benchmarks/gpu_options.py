"""What bench_decode_gpu measures, and how much effort it spends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from decode_catalogues import BEAUTY
from decode_variants import PUBLISHED_SIZES, TOKENS
from gpu_participants import PEERS

CELL_PHONES = "cell_phones_sids"
AXES = ("batch", "items", "beams", "codes")
# Values that matter most come first, in case the time does not reach for all.
BATCHES = (32, 512, 1, 4096, 128, 8)
ITEMS = (1_000_000, 48_000, 20_000_000, 4_000, 12_000)
BEAMS = (200, 10, 512, 100, 20)
CODES = (8192, 1024, 4096, 256)

Left = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure, and how much effort to spend.

    The base point is `base_catalogue`, `num_beams` and the codes of `sizes`, at `base_batches`. It
    belongs to the axis "batch", which measures `batches` on every one of `catalogues`; the other
    axes leave the base's own value out.

    host_backend     the CPU backend takes part
    compile_seconds  no peer is compiled any more once this much went into it, and none of
                     EXTRA_PEERS once half of it did: the others are wanted at every point
    seconds          no point is begun after so many
    """

    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    peers: tuple[str, ...] = PEERS
    host_backend: bool = True
    axes: tuple[str, ...] = AXES
    base_catalogue: str = BEAUTY
    catalogues: tuple[str, ...] = (BEAUTY, CELL_PHONES)
    batches: tuple[int, ...] = BATCHES
    base_batches: tuple[int, ...] = (32, 512)
    items: tuple[int, ...] = ITEMS
    beams: tuple[int, ...] = BEAMS
    codes: tuple[int, ...] = CODES
    code_levels: int = 3
    code_items: int = 12_101
    cold: bool = True
    energy: bool = True
    quick: bool = False
    device: str = "cuda"
    data: Path = ROOT.parent / "shared" / "data"
    sizes: dict[str, Any] = field(default_factory=lambda: dict(PUBLISHED_SIZES))
    tokens: int = TOKENS
    k: int = 10
    num_beams: int = 50
    rounds: int = 40
    cold_rounds: int = 60
    single_rounds: int = 200
    call_rounds: int = 10
    point_seconds: float = 5.0
    call_seconds: float = 3.0
    compile_seconds: float = 200.0
    seconds: float = 340.0


@dataclass
class Clock:
    """How long the benchmark has run, and how much of it went into compiling peers."""

    begin: float = field(default_factory=time.perf_counter)
    compiling: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin
