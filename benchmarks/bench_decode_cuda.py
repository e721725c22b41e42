"""The CUDA backend's decode: replays of a CUDA graph and calls of the operator, batch by batch.

    python benchmarks/bench_decode_cuda.py [--data DIR] [--out FILE]

Published sizes, full histories of 82 tokens, 50 beams, Beauty's catalogue, fp32 and bf16 weights.
Every answer is judged by the float64 reference as in bench_decode (decode_checks), and a wrong one
ends the benchmark without a report; then `decode_states` and `beam_decode` are
timed with CUDA events, L2 warm: one replay, and one call from Python with its launch. The peer is
the reference in eager PyTorch on the same GPU. Writes results/decode-cuda-<gpu>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, machine_facts, results_path, write_json
from decode_catalogues import BEAUTY, load_catalogue
from decode_checks import Judge
from decode_variants import KERNEL_DTYPES, PUBLISHED_SIZES, TOKENS, Contest, dtype_name

from sidmlp.beam import decode_states
from sidmlp_kernels import Recommender, why_not
from sidmlp_kernels.testing import time_interleaved

BATCHES = (1, 8, 32, 128, 512, 4096)
NUM_BEAMS, K = 50, 10
JUDGED = 8


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after warming up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(contest: Contest, models: dict[torch.dtype, Recommender], batch: int) -> dict:
    """One batch size: verified, then timed; its JSON object."""
    states, mask = contest.requests(batch)
    judge = Judge(
        contest.reference,
        states,
        mask,
        k=K,
        num_beams=NUM_BEAMS,
        dtypes=KERNEL_DTYPES,
        requests=JUDGED,
    )
    x, m = states.cuda(), mask.cuda()
    calls: dict[str, Callable[[], object]] = {}
    verified = {}
    for dtype, model in models.items():
        name = dtype_name(dtype)
        found = model.decode_states(x, m, k=K, num_beams=NUM_BEAMS)
        results = tuple(t.cpu() for t in (found.items, found.scores, found.codes, found.counts))
        verified[name] = judge.check(name, results, dtype)
        plan = model._plan(K, NUM_BEAMS, None, None, None)
        context = plan.context_readout(x, m)
        calls[f"decode_states, graph, {name}"] = captured(
            lambda p=plan: p.decode_states(x, m)
        ).replay
        calls[f"beam_decode, graph, {name}"] = captured(
            lambda p=plan, c=context: p.beam_decode(c)
        ).replay
        calls[f"Recommender.decode_states, {name}"] = lambda r=model: r.decode_states(
            x, m, k=K, num_beams=NUM_BEAMS
        )
    if batch <= 512:  # the peer's memory grows with batch x beams x codes
        student, trie = contest.reference.student.cuda(), contest.reference.trie.to("cuda")
        calls["reference, eager"] = lambda: decode_states(
            student, x, m, trie, K, NUM_BEAMS, exact_ties=False
        )
    timings = time_interleaved(calls, device="cuda", rounds=60, warmup=5, max_seconds=10)
    contest.reference.student.cpu()
    return {
        "batch": batch,
        "verified": verified,
        "variants": {
            name: {"p50_us": t.median, "p99_us": t.p99, "users_per_s": batch / t.median * 1e6}
            for name, t in timings.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="what is measured, where the tree is no git checkout")
    args = parser.parse_args()
    reason = why_not("cuda")
    if reason:
        print(f"bench_decode_cuda: the CUDA backend cannot run here: {reason}", file=sys.stderr)
        return 2
    items = load_catalogue(BEAUTY, args.data)
    results = []
    with torch.no_grad():
        contest = Contest(items, max(BATCHES), sizes=PUBLISHED_SIZES, tokens=TOKENS, k=K)
        models = {
            dtype: Recommender(contest.student, contest.catalogue, device="cuda", dtype=dtype)
            for dtype in KERNEL_DTYPES
        }
        for batch in BATCHES:
            results.append(measure(contest, models, batch))
            print(batch, {n: round(v["p50_us"], 1) for n, v in results[-1]["variants"].items()})
    machine = machine_facts()
    if args.commit:
        machine["commit"] = args.commit
    report = {
        "kind": "decode-cuda",
        "machine": machine,
        "gpu": torch.cuda.get_device_name(),
        "setting": {"sizes": PUBLISHED_SIZES, "tokens": TOKENS, "k": K, "num_beams": NUM_BEAMS},
        "catalogue": {"name": items.name, "origin": items.origin, "items": items.num_items},
        "results": results,
    }
    out = args.out or results_path("decode-cuda", torch.cuda.get_device_name())
    write_json(out, report)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
