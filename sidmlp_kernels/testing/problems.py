"""Seeded decode problems: a student, a catalogue, requests and settings that belong together.

A problem is complete and frozen, so a failing test is repeated from its numbers alone. States that
the mask hides hold NaN: whoever reads one shows it. Sizes, dtypes and instruction sets are up to
the test; the problem itself is float32 on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sidmlp_kernels import backends
from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.packing import PackedWeights, pack
from sidmlp_kernels.plan import DecodePlan, make_plan
from sidmlp_kernels.spec import DecodeSpec, StudentSpec
from sidmlp_kernels.student import Student, weight_shapes


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch of requests against one student and one catalogue.

    weights    float32 tensors by the names of `sidmlp_kernels.student`
    codes      int64 [N, L]; item_ids int64 [N]; available bool [N]
    states     float32 [B, T, D], NaN where mask bool [B, T] is False
    exclude    B sequences of item ids: unsorted, with repetitions and ids that nobody has
    settings   temperatures, level weights, num_beams, normalisation
    """

    seed: int
    spec: StudentSpec
    weights: Mapping[str, Tensor]
    codes: Tensor
    item_ids: Tensor
    available: Tensor
    states: Tensor
    mask: Tensor
    exclude: tuple[tuple[int, ...], ...]
    settings: DecodeSpec
    k: int

    def __str__(self) -> str:
        spec, settings = self.spec, self.settings
        return (
            f"seed {self.seed}, states {list(self.states.shape)}, codes {spec.codes_per_level}, "
            f"D {spec.dim}, A {spec.attention_dim}, heads {spec.num_heads}, F {spec.ffn_dim}, "
            f"H {spec.hidden_dim}, blocks {spec.blocks_per_head}, E {spec.embedding_dim}, "
            f"{len(self.codes)} items, {settings.num_beams} beams, k {self.k}, "
            f"{settings.normalisation}, temperatures {settings.temperatures}, level weights "
            f"{settings.level_weights}"
        )

    @property
    def batch(self) -> int:
        """B."""
        return len(self.states)

    @functools.cached_property
    def student(self) -> Student:
        """The weights, verified."""
        return Student(self.spec, dict(self.weights))

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """The items, with their stock."""
        return Catalogue.from_codes(
            self.codes, self.item_ids, self.spec.codes_per_level, available=self.available
        )

    def packed(self, dtype: torch.dtype = torch.float32) -> PackedWeights:
        """Weights as operators take them, on the CPU; made once for each dtype."""
        if dtype not in self._packed:
            self._packed[dtype] = pack(self.student, dtype)
        return self._packed[dtype]

    @functools.cached_property
    def _packed(self) -> dict[torch.dtype, PackedWeights]:
        return {}

    def plan(
        self,
        backend: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        isa: str = "auto",
        launches: int = 1,
        dense: Sequence[bool] | None = None,
    ) -> DecodePlan:
        """How `backend` decodes this problem. `dense` overrides the plan's choice level by level
        (it may: see level_modes in sidmlp_kernels.ops). Raises ValueError with the reason
        where the backend cannot run here."""
        beams = self.settings.num_beams
        reason = backends.why_not(backend, self.spec, dtype=dtype, num_beams=beams)
        if reason:
            raise ValueError(
                f"backend: expected one that runs this problem, got {backend} ({reason}); skip the "
                "test or benchmark with that reason"
            )
        plan = make_plan(
            self.packed(dtype).to(device),
            self.catalogue.snapshot(),
            backend,
            k=self.k,
            num_beams=beams,
            temperatures=self.settings.temperatures,
            level_weights=self.settings.level_weights,
            normalisation=self.settings.normalisation,
            isa=isa,
            launches=launches,
        )
        if dense is None:
            return plan
        pairs = zip(plan.levels, dense, strict=True)
        levels = tuple(dataclasses.replace(level, dense=flag) for level, flag in pairs)
        return dataclasses.replace(plan, levels=levels)

    def replace(self, **changes: object) -> Problem:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def rows(self, index: Sequence[int] | Tensor) -> Problem:
        """The same problem with some of its requests, in the order of `index`."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return self.replace(
            states=self.states[chosen],
            mask=self.mask[chosen],
            exclude=tuple(self.exclude[b] for b in chosen.tolist()),
        )


def exclude_tensors(
    exclude: Sequence[Sequence[int] | None], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ragged id sequences as operators take them: ids ascending per request, offsets [B + 1]."""
    rows = [sorted(sequence) if sequence is not None else [] for sequence in exclude]
    offsets = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64).cumsum(0)
    ids = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
    return ids.to(device), offsets.to(device)


def make_problem(
    codes_per_level: Sequence[int] = (16, 16, 16),
    *,
    seed: int = 0,
    dim: int = 64,
    attention_dim: int | None = None,
    num_heads: int = 4,
    ffn_dim: int | None = None,
    hidden_dim: int = 96,
    embedding_dim: int | None = None,
    blocks_per_head: int = 1,
    num_items: int = 500,
    codes: Tensor | None = None,
    batch: int = 4,
    tokens: int = 12,
    num_beams: int = 10,
    k: int | None = None,
    normalisation: str = "children",
    temperatures: Sequence[float] | None = None,
    level_weights: Sequence[float] | None = None,
    trained: bool = True,
    full_histories: bool = False,
    unavailable: float = 0.0,
    excluded: int = 0,
) -> Problem:
    """A random problem; every random number comes from `seed`.

    codes: of the items, random ones by default (`make_codes`).
    trained: weights and states on the scales of a trained student (logits spread over several
    units, gains and biases away from 1 and 0, some state dimensions far larger than the rest);
    else torch's initialisation and standard normal states.
    full_histories: every state valid; else lengths 0..T at random, the first request's 0 and the
    second's T. unavailable: share of items out of stock. excluded: ids excluded per request.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = tuple(codes_per_level)
    spec = StudentSpec(
        codes_per_level=sizes,
        dim=dim,
        attention_dim=attention_dim or dim,
        num_heads=num_heads,
        ffn_dim=ffn_dim or 2 * dim,
        hidden_dim=hidden_dim,
        embedding_dim=embedding_dim or dim,
        blocks_per_head=blocks_per_head,
    )
    codes = make_codes(sizes, num_items, generator) if codes is None else codes
    num_items = len(codes)
    states = torch.randn(batch, tokens, dim, generator=generator)
    if trained:
        spread = torch.exp(0.7 * torch.randn(dim, generator=generator))
        states = states * spread + 0.5 * torch.randn(dim, generator=generator)
    lengths = torch.randint(0, tokens + 1, (batch,), generator=generator)
    lengths[:1], lengths[1:2] = 0, tokens
    if full_histories:
        lengths[:] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    # Holes, too: "any mask is legal", not right padding alone.
    mask &= (torch.rand(batch, tokens, generator=generator) < 0.9) | (lengths == tokens)[:, None]
    states[~mask] = math.nan

    # Ids are no positions, and not ascending: mixing the two up shows.
    item_ids = 1000 + 3 * torch.randperm(num_items, generator=generator)
    available = torch.rand(num_items, generator=generator) >= unavailable
    picks = torch.randint(0, 2 * num_items, (batch, excluded), generator=generator)
    exclude = tuple(
        tuple(int(item_ids[p]) if p < num_items else int(p) % 1000 for p in row.tolist())
        for row in picks
    )
    levels = len(sizes)
    settings = DecodeSpec(
        temperatures=tuple(temperatures or (1.0,) * levels),
        level_weights=tuple(level_weights or (1.0,) * levels),
        num_beams=num_beams,
        normalisation=normalisation,
    )
    return Problem(
        seed=seed,
        spec=spec,
        weights=MappingProxyType(_make_weights(spec, generator, trained)),
        codes=codes,
        item_ids=item_ids,
        available=available,
        states=states,
        mask=mask,
        exclude=exclude,
        settings=settings,
        k=num_beams if k is None else k,
    )


def make_codes(sizes: Sequence[int], num_items: int, generator: torch.Generator) -> Tensor:
    """Random codes int64 [N, L]: early levels share prefixes, about 1 item in 10 collides."""
    columns = [torch.randint(0, size, (num_items,), generator=generator) for size in sizes]
    codes = torch.stack(columns, dim=1)
    # Half of the items copy all but the last codes of another: nodes with one child and with many.
    donors = torch.randint(0, num_items, (num_items,), generator=generator)
    depth = torch.randint(0, len(sizes) + 1, (num_items,), generator=generator)
    copied = torch.arange(len(sizes)) < depth[:, None]
    copied &= torch.rand(num_items, 1, generator=generator) < 0.5
    return torch.where(copied, codes[donors], codes)


def _make_weights(
    spec: StudentSpec, generator: torch.Generator, trained: bool
) -> dict[str, Tensor]:
    weights = {}
    for name, shape in weight_shapes(spec).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            gain = 1.0 if name.endswith("weight") else 0.0
            weights[name] = gain + (0.2 if trained else 0.0) * noise
        elif name.startswith("embeddings."):
            weights[name] = noise * (1.5 if trained else 0.02)
        elif name.endswith("bias"):
            weights[name] = noise * (0.3 if trained else 0.02)
        else:
            scale = 1 / math.sqrt(3 * shape[-1])  # the standard deviation of torch's nn.Linear
            if trained:
                scale *= 8 if name.endswith("output.weight") else 1.5
            weights[name] = noise * scale
    return weights
