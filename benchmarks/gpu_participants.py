"""Who takes part in bench_decode_gpu, and the calls that are timed.

    cuda, triton, ..  our backends on "cuda" devices, captured in a CUDA graph
    compiled          TorchPeer, folded, under torch.compile, captured in a CUDA graph
    autotuned         the same with Inductor's max-autotune
    definition        TorchPeer with the student's own modules, torch.compile, CUDA graph
    graph             TorchPeer, folded, without a compiler, in a CUDA graph
    eager             the same, called
    reference         sidmlp.beam with exact_ties=False, called

Each offers two calls: `beam_decode` from the context on, and `decode_states` with the readout in
front. All of one dtype read the same states in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from decode_checks import Reference, Results
from torch import Tensor
from torch_peer import TorchPeer

from sidmlp import beam
from sidmlp_kernels import Recommender

OPERATORS = ("beam_decode", "decode_states")
COMPILED = ("compiled", "autotuned", "definition")
PEERS = (*COMPILED, "graph", "eager", "reference")
MODES = {"compiled": "default", "autotuned": "max-autotune-no-cudagraphs", "definition": "default"}

# The reference's Python loop over requests is no cost of PyTorch's; beyond this batch it shows.
REFERENCE_MOST = 512

Calls = dict[str, Callable[[], Results]]  # by operator


@dataclass(frozen=True)
class Participant:
    """One way to decode a batch.

    graph  time replays of a CUDA graph of its calls; else the calls
    make   its calls; compiles where it must, and may raise whatever a compiler raises
    """

    name: str
    side: str  # "backend" or "peer"
    dtype: torch.dtype
    graph: bool
    make: Callable[[], Calls]


def backend_calls(
    model: Recommender, states: Tensor, mask: Tensor, k: int, num_beams: int
) -> Calls:
    """A backend's operators, below the Recommender's checks."""
    plan = model._plan(k, num_beams, None, None, None)
    context = plan.context_readout(states, mask)
    return {
        "beam_decode": lambda: plan.beam_decode(context),
        "decode_states": lambda: plan.decode_states(states, mask),
    }


def peer_calls(peer: TorchPeer, states: Tensor, mask: Tensor, mode: str | None) -> Calls:
    """The peer's two halves, compiled apart when there is a mode: the readout's compilation then
    serves every catalogue, and in a graph nothing is lost at the seam."""
    read, search = peer.context, peer.beam_decode
    if mode is not None:
        options = {"fullgraph": True, "dynamic": False, "mode": mode}
        read, search = torch.compile(read, **options), torch.compile(search, **options)
    context = read(states, mask).clone()
    search(context)  # compiles here, not while something else counts
    return {
        "beam_decode": lambda: search(context),
        "decode_states": lambda: search(read(states, mask)),
    }


def reference_calls(
    reference: Reference,
    dtype: torch.dtype,
    states: Tensor,
    mask: Tensor,
    k: int,
    num_beams: int,
) -> Calls:
    """The reference in `dtype` on the states' device."""
    student, trie = reference.student_in(dtype).to(states.device), reference.trie.to(states.device)
    context = student.context(states, mask)

    def results(found: beam.Decoded) -> Results:
        return found.items, found.scores, found.codes, found.counts

    return {
        "beam_decode": lambda: results(
            beam.beam_decode(student, context, trie, k, num_beams, exact_ties=False)
        ),
        "decode_states": lambda: results(
            beam.decode_states(student, states, mask, trie, k, num_beams, exact_ties=False)
        ),
    }


def peers(
    reference: Reference,
    dtype: torch.dtype,
    states: Tensor,
    mask: Tensor,
    *,
    k: int,
    num_beams: int,
    names: Sequence[str],
) -> Iterator[Participant]:
    """The peers that `names` says, the cheapest to make first."""

    def peer(name: str) -> Calls:
        made = TorchPeer(
            reference.student,
            reference.trie,
            k=k,
            num_beams=num_beams,
            dtype=dtype,
            device=states.device,
            folded=name != "definition",
        )
        return peer_calls(made, states, mask, MODES.get(name))

    def from_reference() -> Calls:
        return reference_calls(reference, dtype, states, mask, k, num_beams)

    for name in ("reference", "eager", "graph", "compiled", "definition", "autotuned"):
        if name not in names or (name == "reference" and len(states) > REFERENCE_MOST):
            continue
        make = from_reference if name == "reference" else lambda name=name: peer(name)
        yield Participant(name, "peer", dtype, name not in ("reference", "eager"), make)
