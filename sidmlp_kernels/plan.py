"""Plan once, run many: everything that is chosen, checked or looked up before a decode.

    (PackedWeights, CatalogueSnapshot, backend, decode settings)  ->  DecodePlan  ->  results

A plan's methods only call an operator. Print a plan to see what was chosen and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidmlp_kernels.backends import check_launches
from sidmlp_kernels.catalogue import CatalogueSnapshot
from sidmlp_kernels.ops.library import Results, operator
from sidmlp_kernels.packing import PackedWeights
from sidmlp_kernels.tracing import traced

if TYPE_CHECKING:
    from sidmlp_kernels.encoder_plan import EncoderPlan
    from sidmlp_kernels.ops.cuda_kernels import Cut
    from sidmlp_kernels.ops.triton.bound import BoundPlan

ISAS = ("auto", "plain", "avx2", "avx512", "avx512bf16")

# A level is dense where a node continues with more than this share of all codes: a dense tile reads
# each weight row once for several beams, a sparse one computes fewer logits. Tensor cores make
# dense tiles cheap, so they are taken early where there are some. By backend, and by "cuda, plain"
# where its plain kernel decodes.
DENSE_FAN_OUT = {"cpu": 0.5, "cuda": 0.03, "cuda, plain": 0.5, "triton": 0.03}


@dataclass(frozen=True)
class LevelPlan:
    """How one level is computed.

    dense  logits of every code, in tiles; else of children only
    """

    num_codes: int
    num_nodes: int
    mean_children: float
    only_child_share: float
    dense: bool
    reason: str


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """One way to decode: weights, catalogue snapshot and settings, ready to run.

    decode_states, beam_decode and context_readout take contiguous tensors on `packed.device`, as
    `sidmlp_kernels.ops` specifies; the first two return (items, scores, codes, counts).
    """

    backend: str
    packed: PackedWeights
    snapshot: CatalogueSnapshot
    k: int
    num_beams: int
    normalisation: str
    temperatures: tuple[float, ...]
    level_weights: tuple[float, ...]
    levels: tuple[LevelPlan, ...]
    isa: str = "auto"
    launches: int = 1  # of a decode, see make_plan
    chosen: str = ""  # why this backend, see sidmlp_kernels.backends; "": not said
    kernel: str = ""  # of the CUDA backend, see sidmlp_kernels.ops.cuda_kernels
    cuts: tuple[Cut, ...] = ()  # of its tensor core kernel, by batch
    encoder: EncoderPlan | None = None
    _decode_args: tuple = field(init=False, repr=False)
    _readout: list[Tensor] = field(init=False, repr=False)
    _encoder_args: tuple = field(init=False, repr=False, default=())
    _heads_catalogue: tuple[list[Tensor], list[Tensor]] = field(init=False, repr=False)
    # Triton's host side is Python: what an operator checks and chooses is done once, here.
    _bound: BoundPlan | None = field(init=False, repr=False)
    _streams: set[int] = field(init=False, repr=False, default_factory=set)  # that have run it

    def __post_init__(self) -> None:
        packed = self.packed
        arguments = (
            list(packed.sizes),
            packed.spec.layer_norm_eps,
            self.k,
            self.num_beams,
            self.normalisation == "codebook",
            list(self.temperatures),
            list(self.level_weights),
            [int(level.dense) for level in self.levels],
            self.launches,
            ISAS.index(self.isa),
        )
        tensors = (list(packed.heads), self.snapshot.trie_tensors(packed.device))
        object.__setattr__(self, "_decode_args", arguments)
        object.__setattr__(self, "_readout", list(packed.readout))
        object.__setattr__(self, "_heads_catalogue", tensors)
        if self.encoder is not None and self.encoder.joins_decode:
            object.__setattr__(self, "_encoder_args", self.encoder.operator_args())
        bound = None
        if self.backend == "triton":
            from sidmlp_kernels.ops.triton.bound import BoundPlan

            bound = BoundPlan(self._readout, *tensors, arguments, packed.device)
        object.__setattr__(self, "_bound", bound)

    @traced("plan.decode_states")
    def decode_states(
        self,
        states: Tensor,
        mask: Tensor,
        exclude_ids: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> Results:
        """states [B, T, D], mask bool [B, T] -> items, scores, codes, counts."""
        self._note_stream()
        if self._bound is not None and not torch.compiler.is_compiling():
            return self._bound.decode.decode_states(states, mask, exclude_ids, exclude_offsets)
        return operator("decode_states", self.backend)(
            states,
            mask,
            self._readout,
            *self._heads_catalogue,
            exclude_ids,
            exclude_offsets,
            *self._decode_args,
        )

    @traced("plan.recommend")
    def recommend(
        self,
        ids: Tensor,
        mask: Tensor,
        exclude_ids: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> Results:
        """ids int64 [B, T], mask bool [B, T] -> items, scores, codes, counts, by one operator;
        where `encoder.joins_decode`."""
        return operator("recommend", self.backend)(
            ids,
            mask,
            *self._encoder_args,
            self._readout,
            *self._heads_catalogue,
            exclude_ids,
            exclude_offsets,
            *self._decode_args,
        )

    @traced("plan.beam_decode")
    def beam_decode(
        self,
        context: Tensor,
        exclude_ids: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> Results:
        """context float32 [B, D] -> items, scores, codes, counts."""
        self._note_stream()
        if self._bound is not None and not torch.compiler.is_compiling():
            return self._bound.decode.beam_decode(context, exclude_ids, exclude_offsets)
        return operator("beam_decode", self.backend)(
            context, *self._heads_catalogue, exclude_ids, exclude_offsets, *self._decode_args
        )

    @traced("plan.context_readout")
    def context_readout(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D], mask bool [B, T] -> context float32 [B, D]."""
        self._note_stream()
        if self._bound is not None and not torch.compiler.is_compiling():
            return self._bound.readout(states, mask)
        sizes, eps = self._decode_args[:2]
        return operator("context_readout", self.backend)(
            states, mask, self._readout, sizes, eps, self._decode_args[-1]
        )

    def prepare(self) -> None:
        """Compiles `decode_states` for states in the dtype of the weights, where the backend
        compiles at all; the rest is compiled at its first call."""
        if self._bound is not None:
            self._bound.decode.prepare()

    def _note_stream(self) -> None:
        """Tells torch's allocator which streams read the weights and the catalogue, once each: what
        a swap frees must not be handed out again while a decode on another stream is under way.

        Not in compiled code (torch.compile), which cannot call the allocator: whoever compiles a
        call and runs it on a side stream synchronises that stream before a swap.
        """
        device = self.packed.device
        if device.type != "cuda" or torch.compiler.is_compiling():
            return
        raw = torch._C._cuda_getCurrentRawStream(device.index)
        if raw in self._streams or torch.cuda.is_current_stream_capturing():
            return  # whoever captures a graph keeps the catalogue as long as the graph
        stream = torch.cuda.current_stream(device)
        for tensor in (*self._readout, *self._heads_catalogue[0], *self._heads_catalogue[1]):
            tensor.record_stream(stream)
        self._streams.add(raw)

    def __str__(self) -> str:
        lines = [
            f"backend {self.backend}, {self.packed.dtype}, {self.packed.device}, isa {self.isa}, "
            f"launches {self.launches}, {self.num_beams} beams, k {self.k}, {self.normalisation}, "
            f"catalogue version {self.snapshot.version}",
            *([f"chosen: {self.chosen}"] if self.chosen else []),
            *([str(self.encoder)] if self.encoder is not None else []),
            *([f"kernel: {self.kernel}"] if self.kernel else []),
            f"{'level':>9} {'codes':>6} {'nodes':>9} {'children':>9} {'only child':>10}  logits",
        ]
        for number, level in enumerate(self.levels, 1):
            lines.append(
                f"{number:>9} {level.num_codes:>6} {level.num_nodes:>9} "
                f"{level.mean_children:>9.2f} {level.only_child_share:>10.2f}  "
                f"{'dense' if level.dense else 'sparse'}: {level.reason}"
            )
        if self.cuts:
            from sidmlp_kernels.ops.cuda_kernels import table

            lines += table(self.cuts)
        return "\n".join(lines)


def make_plan(
    packed: PackedWeights,
    snapshot: CatalogueSnapshot,
    backend: str,
    *,
    k: int,
    num_beams: int,
    temperatures: Sequence[float],
    level_weights: Sequence[float],
    normalisation: str = "children",
    isa: str = "auto",
    launches: int = 1,
    chosen: str = "",
    encoder: EncoderPlan | None = None,
) -> DecodePlan:
    """Chooses how each level is computed, from the model's and the catalogue's own numbers.

    The caller has checked its arguments (`Recommender` does). isa: "auto", or the CPU instruction
    set to force, one of ISAS (the operator raises RuntimeError where it is missing).
    chosen: why this backend, for the printed plan. encoder: what makes the states, for `print`.

    launches: 1, or 2 for the CUDA backend's tensor core kernels: the users' first stage in a launch
    of its own, for many users at a time, then the levels; the same bits. Nothing chooses 2 by
    itself. Raises ValueError with the reason where a decode has no two launches.
    """
    check_launches(launches, backend, packed.spec, packed.dtype, num_beams)
    levels = []
    cuts: tuple[Cut, ...] = ()
    most_sparse, kernel = DENSE_FAN_OUT[backend], ""
    if backend == "cuda":
        # Not at the top, since that module can be run as a program.
        from sidmlp_kernels.ops.cuda_kernels import tensor_core_cuts, tensor_cores_why_not

        sizes = (packed.spec, packed.dtype, num_beams)
        plain = tensor_cores_why_not(*sizes)
        kernel, cuts = "tensor cores", tensor_core_cuts(*sizes, launches)
        if plain:
            most_sparse, kernel = DENSE_FAN_OUT["cuda, plain"], f"plain ({plain})"
    statistics = snapshot.statistics()
    for i, (codes, level) in enumerate(
        zip(packed.spec.codes_per_level, statistics.levels, strict=True)
    ):
        if i == 0:
            dense, reason = True, "level 1 normalises over all codes"
        elif normalisation == "codebook":
            dense, reason = True, "codebook mode normalises over all codes"
        else:
            share = level.mean_children / codes
            dense = share > most_sparse
            reason = (
                f"a node continues with {share:.1%} of the codes, dense above {most_sparse:.0%}"
            )
        levels.append(
            LevelPlan(
                codes, level.nodes, level.mean_children, level.only_child_share, dense, reason
            )
        )
    return DecodePlan(
        backend,
        packed,
        snapshot,
        k,
        num_beams,
        normalisation,
        tuple(temperatures),
        tuple(level_weights),
        tuple(levels),
        isa,
        launches,
        chosen,
        kernel,
        cuts,
        encoder,
    )
