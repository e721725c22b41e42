"""Every backend against the fp64 reference, over all sizes: MUST <= result <= MAY (tier 3).

eps, how far a score may be off, comes from tier 2 beforehand: twice what ordinary PyTorch in the
same dtype is off by, and the rounding floor. bfloat16 and float16 kernels of the backend that keeps
activations in float32 are judged a second time against the packed weights in float64, where the eps
of float32 applies and next to nothing can hide.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import (
    DTYPES,
    ISAS,
    assert_within_bounds,
    decode,
    float32_activations,
    require_isa,
    require_sizes,
    sanitized,
    score_errors,
    student_of,
)

from sidmlp_kernels.student import Student
from sidmlp_kernels.testing import PackedModel, Problem, assert_results_equal, make_problem

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CASES: dict[str, dict[str, Any]] = {
    # levels
    "L1": {"codes_per_level": (17,), "num_items": 60, "num_beams": 10},
    "L2": {"codes_per_level": (17, 5), "num_beams": 12},
    "L3": {"codes_per_level": (12, 17, 9), "num_beams": 25, "k": 5},
    "L4": {"codes_per_level": (8,) * 4, "num_items": 2000, "num_beams": 50},
    "L5": {"codes_per_level": (5, 4, 3, 4, 5), "num_beams": 20},
    "L6": {"codes_per_level": (3, 17, 2, 3, 2, 5), "num_beams": 20},
    "L7": {"codes_per_level": (3,) * 7, "num_items": 900, "num_beams": 30},
    "L8": {"codes_per_level": (2, 4, 3, 2, 17, 2, 3, 2), "num_items": 900, "num_beams": 30},
    # codes
    "C256": {"codes_per_level": (256,) * 4, "num_items": 3000, "num_beams": 50, "k": 10},
    "C256, full nodes": {
        "codes_per_level": (64, 256, 9),
        "num_items": 12000,
        "num_beams": 50,
        "dim": 64,
        "hidden_dim": 128,
    },
    "C8192 first": {"codes_per_level": (8192, 17, 300), "num_items": 3000, "k": 3},
    "C8192 within": {"codes_per_level": (5, 8192, 4), "num_items": 3000, "num_beams": 30},
    # widths
    "H2048": {"hidden_dim": 2048, "dim": 128, "batch": 2},
    "H768 blocks 2": {"hidden_dim": 768, "blocks_per_head": 2, "batch": 3},
    "H100 blocks 3": {"hidden_dim": 100, "blocks_per_head": 3, "embedding_dim": 24},
    "D1024 A256": {"dim": 1024, "attention_dim": 256, "num_heads": 8, "batch": 2},
    "D80 A40, one head": {"dim": 80, "attention_dim": 40, "num_heads": 1, "ffn_dim": 100},
    "D72 A600, products": {"dim": 72, "attention_dim": 600, "num_heads": 4, "ffn_dim": 33},
    "D96 E40": {"dim": 96, "embedding_dim": 40},
    # beams
    "greedy": {"num_beams": 1, "batch": 9},
    "512 beams": {"codes_per_level": (40, 40, 40), "num_items": 4000, "num_beams": 512, "batch": 2},
    "more beams than leaves": {"num_items": 30, "num_beams": 100},
    # tokens
    "T1": {"tokens": 1, "batch": 6},
    "T82": {"tokens": 82, "batch": 6},
    "T1000": {"tokens": 1000, "batch": 3},
    # settings
    "codebook": {"normalisation": "codebook", "num_beams": 25, "codes_per_level": (20, 30, 17)},
    "temperatures": {"temperatures": (0.5, 1.7, 3.0), "num_beams": 25},
    "weights": {"level_weights": (1.0, -0.5, 0.7), "num_beams": 25},
    "weights and codebook": {
        "level_weights": (-1.0, 0.0, 2.0),
        "temperatures": (2.0, 0.7, 1.0),
        "normalisation": "codebook",
    },
    "stock and exclusion": {"unavailable": 0.3, "excluded": 200, "num_beams": 20},
    "untrained": {"trained": False, "num_beams": 20},
}
HALF = (
    "L1",
    "C256, full nodes",
    "C8192 first",
    "512 beams",
    "L8",
    "H768 blocks 2",
    "D80 A40, one head",
    "D72 A600, products",
    "weights",
    "codebook",
)
MODES = ("L4", "C8192 within", "H100 blocks 3", "512 beams", "weights")
ISA_CASES = ("L3", "H100 blocks 3", "D80 A40, one head", "T82", "codebook", "weights")
# Small ones that reach every branch of the kernels.
SANITIZE = (
    "L1",
    "L8",
    "H100 blocks 3",
    "D80 A40, one head",
    "D72 A600, products",
    "512 beams",
    "more beams than leaves",
    "codebook",
    "weights",
    "stock and exclusion",
)
SANITIZE_HALF = (
    ("L1", "fp16"),
    ("L8", "bf16"),
    ("D80 A40, one head", "fp16"),
    ("D72 A600, products", "bf16"),
    ("codebook", "bf16"),
)


@functools.cache
def problem_of(case: str) -> Problem:
    return make_problem(seed=sorted(CASES).index(case), **CASES[case])


@functools.cache
def eps_of(case: str, dtype: torch.dtype, states_dtype: torch.dtype = torch.float32) -> list[float]:
    problem = problem_of(case)
    return score_errors(problem, dtype, problem.states.to(states_dtype))


@pytest.mark.parametrize("case", sanitized(CASES, SANITIZE))
def test_decode(backend: str, device: torch.device, case: str) -> None:
    problem = problem_of(case)
    require_sizes(backend, problem)
    result = decode(problem.plan(backend, device=device), problem)
    eps = eps_of(case, torch.float32)
    assert eps[-1] < 1e-3, f"eps {eps} says nothing: this is no test"
    assert_within_bounds(result, problem, eps, where=f"{case}, {backend} fp32")
    assert int(result.counts.min()) > 0


@pytest.mark.parametrize(
    ("case", "dtype"), sanitized(itertools.product(HALF, ("bf16", "fp16")), SANITIZE_HALF)
)
def test_decode_in_half_precision(
    backend: str, device: torch.device, case: str, dtype: str
) -> None:
    problem = problem_of(case)
    states = problem.states.to(DTYPES[dtype])
    plan = problem.plan(backend, DTYPES[dtype], device=device)
    result = decode(plan, problem, states)
    where = f"{case}, {backend} {dtype}"
    eps = eps_of(case, DTYPES[dtype], DTYPES[dtype])
    assert_within_bounds(result, problem, eps, where=where, states=states)
    if float32_activations(backend, dtype, problem):
        eps = eps_of(case, torch.float32, DTYPES[dtype])
        exact = PackedModel(problem.packed(DTYPES[dtype]))
        where += ", packed weights"
        assert_within_bounds(result, problem, eps, where=where, states=states, exact=exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ISA_CASES)
def test_decode_with_each_instruction_set(case: str, dtype: str, isa: str) -> None:
    require_isa(isa)
    problem = problem_of(case)
    result = decode(problem.plan("cpu", DTYPES[dtype], isa=isa), problem)
    eps = eps_of(case, torch.float32)
    exact = PackedModel(problem.packed(DTYPES[dtype]))
    where = f"{case}, cpu {isa} {dtype}, packed weights"
    assert_within_bounds(result, problem, eps, where=where, exact=exact)


@pytest.mark.parametrize(
    ("case", "dtype"),
    sanitized(itertools.product(MODES, DTYPES), [("H100 blocks 3", dtype) for dtype in DTYPES]),
)
def test_level_modes_do_not_matter(
    backend: str, device: torch.device, case: str, dtype: str
) -> None:
    """Not by a bit where activations are float32; elsewhere a dense level may round otherwise, on
    tensor cores, and each choice is as right as the other."""
    problem = problem_of(case)
    require_sizes(backend, problem, DTYPES[dtype])
    levels = problem.spec.num_levels
    sparse = None
    for flags in (
        [False] * levels,
        [True] * levels,
        [level % 2 == 1 for level in range(levels)],
    ):
        plan = problem.plan(backend, DTYPES[dtype], device=device, dense=flags)
        where = f"{case}, {backend} {dtype}, dense {flags}"
        result = decode(plan, problem)
        if float32_activations(backend, dtype, problem):
            sparse = sparse or result
            assert_results_equal(_tensors(result), _tensors(sparse), where=where)
        else:
            assert_within_bounds(result, problem, eps_of(case, DTYPES[dtype]), where=where)
            again = _tensors(decode(plan, problem))
            assert_results_equal(again, _tensors(result), where=where, wanted_is="the first run")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("codes", ["rkmeans_native", "rqvae_zcr"])
def test_published_sizes_on_a_real_catalogue(
    backend: str, device: torch.device, codes: str, dtype: str
) -> None:
    file = DATA / "amazon14_beauty" / "semantic_ids.npz"
    if not file.exists():
        pytest.skip(f"real semantic IDs are not here: {file}")
    with np.load(file) as arrays:
        real = torch.from_numpy(arrays[codes].astype(np.int64))
    problem = make_problem(
        (256,) * 4,
        seed=3,
        codes=real,
        dim=128,
        attention_dim=384,
        ffn_dim=1024,
        hidden_dim=512,
        tokens=82,
        num_beams=50,
        k=10,
        excluded=30,
    )
    result = decode(problem.plan(backend, DTYPES[dtype], device=device), problem)
    eps = score_errors(problem, DTYPES[dtype], problem.states)
    assert_within_bounds(result, problem, eps, where=f"{codes}, {backend} {dtype}")


@pytest.mark.parametrize("blocks", [1, 3])
def test_published_layout(backend: str, device: torch.device, blocks: int) -> None:
    problem = make_problem((256,) * 4, seed=9, num_items=2000, blocks_per_head=blocks, k=10)
    loaded = Student.from_official(published_layout(problem), num_heads=problem.spec.num_heads)
    assert loaded.spec == problem.spec
    again = dataclasses.replace(problem, weights=loaded.weights)
    result = decode(again.plan(backend, device=device), problem)
    eps = score_errors(problem, torch.float32, problem.states)
    assert_within_bounds(result, problem, eps, where=f"published layout, {backend}")


def published_layout(problem: Problem) -> dict[str, torch.Tensor]:
    """The reference's weights under the names of the paper's release, offsets 1/257/513/769."""
    weights = student_of(problem, torch.float32).state_dict()
    flat = {}
    for theirs, ours in {
        **{f"cross_attn.{p}_proj": f"attention.{p}_proj" for p in ("q", "k", "v", "out")},
        **{"query_proj": "query_proj", "norm1": "norm1", "norm2": "norm2"},
        **{"ffn.0": "ffn_in", "ffn.3": "ffn_out"},
    }.items():
        for part in ("weight", "bias"):
            if f"readout.{ours}.{part}" in weights:
                flat[f"{theirs}.{part}"] = weights[f"readout.{ours}.{part}"]
    blocks = problem.spec.blocks_per_head
    for i in range(4):
        for part in ("weight", "bias"):
            ours, theirs = f"heads.{i}", f"head{i + 1}"
            flat[f"{theirs}.0.{part}"] = weights[f"{ours}.blocks.0.linear.{part}"]
            flat[f"{theirs}.1.{part}"] = weights[f"{ours}.blocks.0.norm.{part}"]
            for b in range(1, blocks):
                flat[f"{theirs}.{3 + b}.fc.{part}"] = weights[f"{ours}.blocks.{b}.linear.{part}"]
                flat[f"{theirs}.{3 + b}.norm.{part}"] = weights[f"{ours}.blocks.{b}.norm.{part}"]
            flat[f"{theirs}.{3 + blocks}.{part}"] = weights[f"{ours}.output.{part}"]
    # Row 0 is padding; the last level's rows and the extra ones are never read, so NaN-like noise.
    table = torch.full((1 + 4 * 256 + 7, problem.spec.embedding_dim), 1e30)
    for i, first in enumerate((1, 257, 513)):
        table[first : first + 256] = weights[f"embeddings.{i}.weight"]
    flat["embedding.weight"] = table
    return flat


def _tensors(result: object) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(result, f.name) for f in dataclasses.fields(result))  # type: ignore[arg-type]
