"""Who takes part in bench_decode_gpu, and the calls that are timed.

    cuda, triton, ..  our backends on "cuda" devices, captured in a CUDA graph
    cuda, two launches  the first with launches=2, on the axis "batch"
    cpu               our CPU backend on all of the host's cores, called
    compiled          TorchPeer, folded, under torch.compile, captured in a CUDA graph
    autotuned         the same with Inductor's max-autotune
    definition        TorchPeer with the student's own modules, torch.compile, CUDA graph
    static            StaticPeer, a CSR-mask pipeline, torch.compile, CUDA graph
    graph             TorchPeer, folded, without a compiler, in a CUDA graph
    eager             the same, called
    reference         sidmlp.beam with exact_ties=False, called
    teacher           TIGER's T5 under Hugging Face generate, from encoder states, called

Each offers up to two calls: `beam_decode` from the context on, and `decode_states` with the readout
in front; cpu and teacher the second only. All of one dtype read the same states in that dtype, but
for the teacher, which reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from decode_checks import Reference, Results
from decode_variants import Contest
from static_peer import StaticPeer
from torch import Tensor
from torch_peer import TorchPeer

from sidmlp import beam
from sidmlp_kernels import Recommender

OPERATORS = ("beam_decode", "decode_states")
COMPILED = ("compiled", "autotuned", "definition")
COMPILING = (*COMPILED, "static")
PEERS = (*COMPILED, "static", "graph", "eager", "reference", "teacher")
MODES: dict[str, str | None] = {
    "compiled": "default",
    "autotuned": "max-autotune-no-cudagraphs",
    "definition": "default",
    "static": "default",
}

# The reference's Python loop over requests is no cost of PyTorch's; beyond this batch it shows.
REFERENCE_MOST = 512

Calls = dict[str, Callable[[], Any]]  # by operator


@dataclass(frozen=True)
class Participant:
    """One way to decode a batch.

    timed  "graph": replays of a CUDA graph of its calls; "call": the calls, on the device; "wall":
           the calls, on the host
    make   its calls; compiles where it must, and may raise whatever a compiler raises
    check  judges what it returned, where that is no student's result: what to report of a right
           one, "invalid_rate" included, or VerificationError
    """

    name: str
    side: str  # "backend" or "peer"
    dtype: torch.dtype
    timed: str
    make: Callable[[], Calls]
    check: Callable[[Any], dict[str, Any]] | None = None


def backend_calls(
    model: Recommender,
    states: Tensor,
    mask: Tensor,
    k: int,
    num_beams: int,
    operators: Sequence[str] = OPERATORS,
) -> Calls:
    """A backend's operators, below the Recommender's checks."""
    plan = model._plan(k, num_beams, None, None, None)
    calls: Calls = {}
    if "beam_decode" in operators:  # else nothing of it is compiled
        context = plan.context_readout(states, mask)
        calls["beam_decode"] = lambda: plan.beam_decode(context)
    if "decode_states" in operators:
        calls["decode_states"] = lambda: plan.decode_states(states, mask)
    return calls


def host_backend(
    contest: Contest, dtype: torch.dtype, batch: int, num_beams: int
) -> Participant | None:
    """Our CPU backend with weights of `dtype`; None where it has none."""
    variants = contest.instruction_sets(batch, num_beams, ("auto",))
    call = next((variant.call for variant in variants if variant.dtype == dtype), None)
    if call is None:
        return None
    return Participant("cpu", "backend", dtype, "wall", lambda: {"decode_states": call})


def teacher(
    contest: Contest,
    dtype: torch.dtype,
    batch: int,
    k: int,
    num_beams: int,
    device: str,
    requests: int,
) -> Participant:
    """Hugging Face `generate`, beside the contest's catalogue."""
    made: list[Any] = []

    def make() -> Calls:
        from teacher_peer import TeacherPeer

        made[:] = [
            TeacherPeer(
                contest.items.codes,
                contest.spec.codes_per_level,
                batch=batch,
                k=k,
                num_beams=num_beams,
                dtype=dtype,
                device=device,
            )
        ]
        return {"decode_states": made[0]}

    def check(sequences: Tensor) -> dict[str, Any]:
        verified = made[0].check(sequences, requests)
        return {**verified, "invalid_rate": made[0].invalid_rate(sequences)}

    return Participant("teacher", "peer", dtype, "call", make, check)


def compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """`function` compiled for the shapes of each first call; itself where there is no mode."""
    if mode is None:
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def peer_calls(peer: TorchPeer, states: Tensor, mask: Tensor, mode: str | None) -> Calls:
    """The peer's two halves, compiled apart when there is a mode: the readout's compilation then
    serves every catalogue, and in a graph nothing is lost at the seam."""
    read, search = compiled(peer.context, mode), compiled(peer.beam_decode, mode)
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
        kind = StaticPeer if name == "static" else TorchPeer
        made = kind(
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

    for name in ("reference", "eager", "graph", "compiled", "static", "definition", "autotuned"):
        if name not in names or (name == "reference" and len(states) > REFERENCE_MOST):
            continue
        make = from_reference if name == "reference" else lambda name=name: peer(name)
        timed = "call" if name in ("reference", "eager") else "graph"
        yield Participant(name, "peer", dtype, timed, make)
