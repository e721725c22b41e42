"""Who takes part in bench_decode: the reference in PyTorch, eager and compiled, and our kernel.

All decode the very same states against the same catalogue with the same weights:

    eager        sidmlp.beam.decode_states, with topk instead of its stable sort (exact_ties=False)
    compiled     torch.compile of that function as one graph for these very shapes, weights frozen
                 so that Inductor may pack them beforehand; compiling is not part of the time
    recommender  sidmlp_kernels.Recommender.decode_states: what a user calls
    plan         the operator alone, below the Recommender's checks

The peers have float32 weights; the kernel has float32 and bfloat16 ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from decode_catalogues import ItemCodes
from decode_checks import Reference, Results
from library_trie import library_trie
from torch import Tensor

from sidmlp.beam import decode_states
from sidmlp.trie import Trie
from sidmlp_kernels import Recommender
from sidmlp_kernels.packing import PackedWeights, pack
from sidmlp_kernels.plan import make_plan
from sidmlp_kernels.testing import Problem, make_problem

PUBLISHED_SIZES = {
    "codes_per_level": (256, 256, 256, 256),
    "dim": 128,
    "attention_dim": 384,
    "num_heads": 4,
    "ffn_dim": 1024,
    "hidden_dim": 512,
    "blocks_per_head": 1,
}
TOKENS = 82  # 1 user token + 20 items x 4 codes + eos
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
SEED = 0


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Variant:
    """One way to decode a batch.

    side   "peer" or "kernel"
    about  first_call_s of a compiled peer
    """

    name: str
    side: str
    dtype: torch.dtype
    isa: str
    call: Callable[[], object]
    about: dict[str, Any]

    def results(self) -> Results:
        """Items, scores, codes and counts of one call."""
        found: Any = self.call()
        if isinstance(found, tuple):
            return found
        return found.items, found.scores, found.codes, found.counts

    @property
    def key(self) -> str:
        """Unique among a point's variants."""
        parts = [self.name]
        if self.side == "kernel":
            parts += [dtype_name(self.dtype)] + ([] if self.isa == "auto" else [self.isa])
        return "-".join(parts)


class Contest:
    """One catalogue, one student and the requests of the largest batch, for every participant."""

    def __init__(
        self,
        items: ItemCodes,
        batch: int,
        *,
        sizes: dict[str, Any],
        tokens: int,
        k: int,
        own_trie: bool = True,
    ) -> None:
        """own_trie: the reference sorts the catalogue itself; else its trie is `library_trie`'s."""
        self.items, self.k = items, k
        problem = make_problem(
            seed=SEED,
            codes=torch.from_numpy(items.codes).long(),
            batch=batch,
            tokens=tokens,
            k=k,
            full_histories=True,
            **sizes,
        )
        self.spec = problem.spec
        self.states, self.mask = problem.states, problem.mask
        self.statistics = problem.catalogue.snapshot().statistics()
        self.student, self.catalogue = problem.student, problem.catalogue
        self.item_ids = problem.item_ids  # of the rows of items.codes
        self._packed = {dtype: pack(problem.student, dtype) for dtype in KERNEL_DTYPES}
        self._models = {
            dtype: Recommender(problem.student, problem.catalogue, device="cpu", dtype=dtype)
            for dtype in KERNEL_DTYPES
        }
        self.reference = _reference_of(problem, own_trie)

    def requests(self, batch: int) -> tuple[Tensor, Tensor]:
        """States [batch, T, D] and mask [batch, T]; smaller batches begin as larger ones do."""
        return self.states[:batch], self.mask[:batch]

    def packed(self, dtype: torch.dtype) -> PackedWeights:
        """The kernel's weights, on the CPU."""
        if dtype not in self._packed:
            self._packed[dtype] = pack(self.student, dtype)
        return self._packed[dtype]

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the kernel's packed weights."""
        return self.packed(dtype).num_bytes

    def peers(self, batch: int, num_beams: int, names: Sequence[str]) -> list[Variant]:
        """The reference as `names` say; "compiled" is compiled now."""
        states, mask = self.requests(batch)
        student, trie, k = self.reference.student, self.reference.trie, self.k

        def decode(states: Tensor, mask: Tensor) -> Results:
            found = decode_states(student, states, mask, trie, k, num_beams, exact_ties=False)
            return found.items, found.scores, found.codes, found.counts

        variants = []
        if "eager" in names:
            eager = Variant("eager", "peer", torch.float32, "", lambda: decode(states, mask), {})
            variants.append(eager)
        if "compiled" in names:
            torch.compiler.reset()  # every point gets its own graph, not one for changing shapes
            compiled = torch.compile(
                decode, fullgraph=True, dynamic=False, options={"freezing": True}
            )
            begin = time.perf_counter()
            compiled(states, mask)
            about = {"first_call_s": time.perf_counter() - begin}
            call = lambda: compiled(states, mask)  # noqa: E731
            variants.append(Variant("compiled", "peer", torch.float32, "", call, about))
        return variants

    def kernels(self, batch: int, num_beams: int) -> list[Variant]:
        """Our kernel through Recommender and plan, for each dtype of weights."""
        return [
            variant
            for dtype in KERNEL_DTYPES
            for variant in (
                self._recommender(dtype, batch, num_beams),
                self._plan(dtype, batch, num_beams, "auto"),
            )
        ]

    def instruction_sets(self, batch: int, num_beams: int, isas: Sequence[str]) -> list[Variant]:
        """The plan's call with each instruction set, for each dtype of weights."""
        return [self._plan(dtype, batch, num_beams, isa) for dtype in KERNEL_DTYPES for isa in isas]

    def _recommender(self, dtype: torch.dtype, batch: int, num_beams: int) -> Variant:
        model, k = self._models[dtype], self.k
        states, mask = self.requests(batch)

        def call() -> object:
            return model.decode_states(states, mask, k=k, num_beams=num_beams)

        return Variant("recommender", "kernel", dtype, "auto", call, {})

    def _plan(self, dtype: torch.dtype, batch: int, num_beams: int, isa: str) -> Variant:
        levels = self.spec.num_levels
        plan = make_plan(
            self.packed(dtype),
            self.catalogue.snapshot(),
            "cpu",
            k=self.k,
            num_beams=num_beams,
            temperatures=[1.0] * levels,
            level_weights=[1.0] * levels,
            isa=isa,
        )
        states, mask = self.requests(batch)
        call = lambda: plan.decode_states(states, mask)  # noqa: E731
        return Variant("plan", "kernel", dtype, isa, call, {"plan": str(plan).splitlines()})


def _reference_of(problem: Problem, own_trie: bool) -> Reference:
    if own_trie:
        trie = Trie.from_codes(
            problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
        )
    else:
        trie = library_trie(problem.catalogue.snapshot(), problem.codes, problem.item_ids)
    return Reference.build(problem.spec, problem.weights, trie)
