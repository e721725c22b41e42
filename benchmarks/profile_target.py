"""The process that profile_nsight runs under ncu: one call of one operator, warmed up before.

Inputs are those of bench_decode_gpu. Only the last call stands between cudaProfilerStart and
cudaProfilerStop, so that ncu sees its kernels and no others. What a reading needs to know (device,
plan, counted bytes) goes to --facts as JSON; where the call is impossible, {"problem": why}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from decode_catalogues import load_catalogue
from decode_checks import Walk, walk_beams
from decode_variants import PUBLISHED_SIZES, TOKENS, Contest
from torch import Tensor
from work_counts import launch_bytes

from sidmlp_kernels import Recommender, why_not
from sidmlp_kernels.backends import DTYPES
from sidmlp_kernels.plan import DecodePlan

OPERATORS = ("beam_decode", "decode_states", "context_readout")
REQUESTS = 4096  # made as in bench_decode_gpu; of another number, random numbers would be others
WALKED = 8  # requests whose beams say how much there is to read, as many as benchmarks judge

Call = Callable[[], Any]
Counted = dict[str, dict[str, float]]


def operator_call(plan: DecodePlan, operator: str, states: Tensor, mask: Tensor) -> Call:
    """The call to profile."""
    if operator == "context_readout":
        return lambda: plan.context_readout(states, mask)
    if operator == "decode_states":
        return lambda: plan.decode_states(states, mask)
    context = plan.context_readout(states, mask)
    return lambda: plan.beam_decode(context)


def counted_bytes(
    plan: DecodePlan, operator: str, batch: int, tokens: int, walk: Walk | None
) -> Counted:
    """Bytes that a call reads and writes at least, each datum once per launch.

    A decode's are work_counts.launch_bytes; a readout's its weights, states and contexts.
    """
    if walk is None:
        element = plan.packed.heads[0].element_size()
        dim = plan.packed.spec.dim
        weights = sum(t.numel() * t.element_size() for t in plan.packed.readout)
        read = {"weights": weights, "states": batch * tokens * (dim * element + 1)}
        return {"read": read, "written": {"results": batch * dim * 4}}
    parts = launch_bytes(
        plan.packed,
        plan.snapshot.statistics(),
        walk,
        batch=batch,
        tokens=tokens,
        num_beams=plan.num_beams,
        k=plan.k,
        operator=operator,
    )
    read = {name: size for name, size in parts.items() if name not in ("results", "total")}
    return {"read": read, "written": {"results": parts["results"]}}


def prepare(
    args: argparse.Namespace, device: str = "cuda", sizes: dict[str, Any] | None = None
) -> tuple[Call, dict[str, Any]]:
    """The call, run `args.warm` times, and the facts about it; sizes: the student's, else the
    published ones."""
    items = load_catalogue(args.catalogue, args.data or ROOT.parent / "shared" / "data")
    contest = Contest(
        items, max(REQUESTS, args.batch), sizes=sizes or PUBLISHED_SIZES, tokens=TOKENS, k=args.k
    )
    contest.states = contest.states.bfloat16().float()  # as the benchmark rounds them
    dtype = DTYPES[args.dtype]
    model = Recommender(
        contest.student, contest.catalogue, device=device, dtype=dtype, backend=args.backend
    )
    plan = model._plan(args.k, args.beams, None, None, None)
    walk = None
    if args.operator != "context_readout":
        walk = walk_beams(contest.reference, *contest.requests(WALKED), args.beams, ())
    states, mask = contest.requests(args.batch)
    states, mask = states.to(device, dtype), mask.to(device)
    call = operator_call(plan, args.operator, states, mask)
    for _ in range(args.warm):
        call()
    about = {"name": items.name, "origin": items.origin, "items": items.num_items}
    counted = counted_bytes(plan, args.operator, args.batch, TOKENS, walk)
    return call, {
        "torch": torch.__version__,
        "catalogue": about,
        "plan": str(plan).splitlines(),
        "counted": counted,
    }


def parser() -> argparse.ArgumentParser:
    """The command line that profile_nsight passes on."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--backend", required=True)
    made.add_argument("--operator", required=True, choices=OPERATORS)
    made.add_argument("--batch", type=int, required=True)
    made.add_argument("--dtype", choices=DTYPES, required=True)
    made.add_argument("--beams", type=int, required=True)
    made.add_argument("--k", type=int, required=True)
    made.add_argument("--catalogue", required=True)
    made.add_argument("--data", type=Path)
    made.add_argument("--warm", type=int, required=True)
    made.add_argument("--facts", type=Path, required=True)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    reason = why_not(args.backend, dtype=args.dtype, num_beams=args.beams)
    if reason:
        problem = f"backend: expected {args.backend} to run here, got: {reason}; see "
        problem += "`python -m sidmlp_kernels doctor`"
        args.facts.write_text(json.dumps({"problem": problem}))
        return 1
    with torch.no_grad():
        call, facts = prepare(args)
        facts["gpu"] = torch.cuda.get_device_name()
        facts["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        args.facts.write_text(json.dumps(facts))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
