"""Tier 2: contexts, logits and scores are as close to fp64 as ordinary PyTorch in the same dtype.

err(kernel, fp64 reference) <= 2 x err(PyTorch in the dtype of the weights, fp64 reference) + floor.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from parity import DTYPES, ISAS, decode, require_isa, sanitized, student_of, trie_of

from sidmlp.beam import Beams, LevelOptions, expand
from sidmlp_kernels.ops import operator
from sidmlp_kernels.plan import ISAS as ISA_NUMBERS
from sidmlp_kernels.testing import PackedModel, Problem, assert_bounded, make_problem

READOUTS: dict[str, dict[str, Any]] = {
    "products": {"dim": 64, "attention_dim": 256, "tokens": 40, "batch": 9},
    "factored": {"dim": 80, "attention_dim": 40, "num_heads": 1, "ffn_dim": 100, "batch": 9},
    "one token": {"tokens": 1, "batch": 20},
    "long": {"tokens": 1000, "batch": 3},
    "wide": {"dim": 1024, "attention_dim": 256, "num_heads": 8, "batch": 3},
    "untrained": {"trained": False, "batch": 9},
}
HEADS: dict[str, dict[str, Any]] = {
    "eight levels": {"codes_per_level": (9, 17, 4, 33, 2, 3, 17, 40)},
    "8192 codes": {"codes_per_level": (8192, 300)},
    "three blocks": {"hidden_dim": 100, "blocks_per_head": 3, "embedding_dim": 24},
    "H2048": {"hidden_dim": 2048, "codes_per_level": (64, 256)},
    "untrained": {"trained": False, "blocks_per_head": 2},
}


@functools.cache
def problem_of(table: str, case: str) -> Problem:
    cases = READOUTS if table == "readouts" else HEADS
    return make_problem(seed=100 + list(cases).index(case), **cases[case])


@pytest.mark.parametrize(
    ("case", "dtype", "states_dtype"),
    sanitized(
        itertools.product(READOUTS, DTYPES, DTYPES),
        [
            ("products", "fp32", "fp32"),
            ("products", "bf16", "fp16"),
            ("factored", "fp16", "bf16"),
            ("one token", "fp32", "fp32"),
        ],
    ),
)
def test_contexts(
    backend: str, device: torch.device, case: str, dtype: str, states_dtype: str
) -> None:
    problem = problem_of("readouts", case)
    states = problem.states.to(DTYPES[states_dtype])
    plan = problem.plan(backend, DTYPES[dtype], device=device)
    assert_bounded(
        plan.context_readout(states.to(device), problem.mask.to(device)),
        student_of(problem, DTYPES[dtype]).context(states.to(DTYPES[dtype]), problem.mask),
        student_of(problem).context(states.double(), problem.mask),
        dtype=DTYPES[dtype],
        what="context",
        where=f"{case}, {backend} {dtype}, states {states_dtype}; {problem}",
    )


def level_logits(
    problem: Problem,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    isa: str,
    *inputs: torch.Tensor,
) -> torch.Tensor:
    packed = problem.packed(dtype).to(device)
    return operator("level_logits", backend)(
        *(tensor.to(device) for tensor in inputs),
        list(packed.heads),
        list(packed.sizes),
        problem.spec.layer_norm_eps,
        ISA_NUMBERS.index(isa),
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    sanitized(
        itertools.product(HEADS, DTYPES),
        [("eight levels", "fp32"), ("eight levels", "bf16"), ("three blocks", "fp16")],
    ),
)
def test_logits_of_every_level(backend: str, device: torch.device, case: str, dtype: str) -> None:
    problem = problem_of("heads", case)
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(37, problem.spec.dim, generator=generator)
    sizes = problem.spec.codes_per_level
    codes = [torch.randint(0, size, (37,), generator=generator) for size in sizes]
    prefix = torch.stack(codes, dim=1)
    exact, same = student_of(problem), student_of(problem, DTYPES[dtype])
    for level in range(len(sizes)):
        inputs = (context, prefix[:, :level].int().contiguous())
        assert_bounded(
            level_logits(problem, DTYPES[dtype], backend, device, "auto", *inputs),
            same.logits(level, context.to(DTYPES[dtype]), prefix),
            exact.logits(level, context.double(), prefix),
            dtype=DTYPES[dtype],
            what=f"logits of level {level + 1}",
            where=f"{case}, {backend} {dtype}; {problem}",
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_weights_cost_nothing_but_their_own_rounding(dtype: str, isa: str) -> None:
    """Accumulation, softmax and activations are float32 whatever the weights are."""
    require_isa(isa)
    for case in ("products", "factored"):
        problem = problem_of("readouts", case)
        context = problem.plan("cpu", DTYPES[dtype], isa=isa).context_readout(
            problem.states, problem.mask
        )
        float32 = student_of(problem, torch.float32).context(problem.states, problem.mask)
        exact = student_of(problem).context(problem.states.double(), problem.mask)
        packed = PackedModel(problem.packed(DTYPES[dtype]))
        own = packed.context(problem.states.double(), problem.mask)
        where = f"{case}, cpu {isa} {dtype}, packed weights; {problem}"
        # What float32 costs is measured on the unpacked model and allowed around the packed one.
        assert_bounded(
            context, own + (float32 - exact), own, dtype=torch.float32, what="context", where=where
        )
    problem = problem_of("heads", "three blocks")
    prefix = torch.tensor([[1, 2], [3, 4], [5, 15]])
    context = torch.randn(3, problem.spec.dim, generator=torch.Generator().manual_seed(2))
    cpu = torch.device("cpu")
    got = level_logits(problem, DTYPES[dtype], "cpu", cpu, isa, context, prefix.int())
    float32 = student_of(problem, torch.float32).logits(2, context, prefix)
    exact = student_of(problem).logits(2, context.double(), prefix)
    own = PackedModel(problem.packed(DTYPES[dtype])).logits(2, context.double(), prefix)
    assert_bounded(
        got,
        own + (float32 - exact),
        own,
        dtype=torch.float32,
        what="logits",
        where=f"cpu {isa} {dtype}, packed weights; {problem}",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalisation", ["children", "codebook"])
def test_scores(backend: str, device: torch.device, normalisation: str, dtype: str) -> None:
    """The score of every returned item, recomputed along its own codes."""
    problem = make_problem(
        (20, 30, 17),
        seed=5,
        batch=8,
        num_beams=40,
        normalisation=normalisation,
        temperatures=(1.0, 0.8, 1.3),
        level_weights=(1.0, 0.5, 2.0),
    )
    result = decode(problem.plan(backend, DTYPES[dtype], device=device), problem)
    assert bool((result.counts == 40).all())
    assert_bounded(
        result.scores,
        scores_of(problem, DTYPES[dtype], result.codes.long()),
        scores_of(problem, torch.float64, result.codes.long()),
        dtype=DTYPES[dtype],
        what="scores",
        where=f"{backend} {dtype}; {problem}",
    )


@torch.no_grad()
def scores_of(problem: Problem, dtype: torch.dtype, codes: torch.Tensor) -> torch.Tensor:
    """Reference scores [B, n] in `dtype` of leaves given by codes [B, n, L]."""
    student, trie = student_of(problem, dtype), trie_of(problem)
    options = LevelOptions.make(
        trie.num_levels,
        problem.settings.temperatures,
        problem.settings.level_weights,
        problem.settings.normalisation,
    )
    context = student.context(problem.states.to(dtype), problem.mask)
    nodes = torch.zeros(codes.shape[:2], dtype=torch.int64)
    scores = torch.zeros(codes.shape[:2], dtype=torch.promote_types(dtype, torch.float32))
    live = torch.ones(codes.shape[:2], dtype=torch.bool)
    for level in range(trie.num_levels):
        beams = Beams(scores, nodes, codes[..., :level], live)
        found = expand(student, trie, level, context, beams, options)
        child = (found.exists & (found.codes == codes[..., level, None])).long().argmax(-1)
        scores = found.scores.gather(2, child[..., None])[..., 0]
        nodes = found.nodes.gather(2, child[..., None])[..., 0]
    return scores
