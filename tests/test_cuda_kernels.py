"""Which kernel the CUDA backend takes, and the printed table of cuts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sidmlp_kernels.ops.cuda_kernels import (
    Cut,
    readout_on_tensor_cores,
    table,
    tensor_core_cuts,
    tensor_cores_why_not,
)
from sidmlp_kernels.plan import DecodePlan, make_plan
from sidmlp_kernels.spec import PUBLISHED
from sidmlp_kernels.testing import Problem, assert_results_equal, make_problem


def why_not(dtype: torch.dtype = torch.bfloat16, num_beams: int = 50, **sizes: Any) -> str:
    sizes = {"dim": 128, "hidden_dim": 512, "num_items": 300, **sizes}
    spec = make_problem(sizes.pop("codes_per_level", (256,) * 4), seed=1, **sizes).spec
    return tensor_cores_why_not(spec, dtype, num_beams)


@pytest.mark.parametrize("hidden", [128, 256, 512, 768, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_take_the_published_sweep(hidden: int, dtype: torch.dtype) -> None:
    assert why_not(dtype, hidden_dim=hidden) == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"hidden_dim": 100}, "hidden_dim"),
        ({"hidden_dim": 2080}, "hidden_dim"),
        ({"dim": 72}, "dim"),
        ({"blocks_per_head": 2}, "blocks_per_head"),
        ({"num_beams": 513}, "num_beams"),
        ({"codes_per_level": (4, 8193)}, "codes_per_level"),
    ],
)
def test_other_sizes_take_the_plain_kernel_and_say_why(options: dict[str, Any], named: str) -> None:
    assert why_not(**options).startswith(named)


def plan_of(problem: Problem, backend: str, dtype: torch.dtype, chosen: str = "") -> DecodePlan:
    """For any backend, whether it runs here or not."""
    return make_plan(
        problem.packed(dtype),
        problem.catalogue.snapshot(),
        backend,
        k=problem.k,
        num_beams=problem.settings.num_beams,
        temperatures=problem.settings.temperatures,
        level_weights=problem.settings.level_weights,
        chosen=chosen,
    )


def test_a_plan_names_its_kernel_and_takes_dense_tiles_early_on_tensor_cores() -> None:
    problem = make_problem((256,) * 4, seed=3, num_items=5000, hidden_dim=64)
    half, single = (plan_of(problem, "cuda", dtype) for dtype in (torch.bfloat16, torch.float32))
    assert "kernel: tensor cores" in str(half)
    assert "kernel: plain (float32" in str(single)
    assert "kernel" not in str(plan_of(problem, "cpu", torch.float32))
    share = half.levels[1].mean_children / half.levels[1].num_codes
    assert 0.03 < share < 0.5
    assert (half.levels[1].dense, single.levels[1].dense) == (True, False)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_sizes_at_the_edge_of_shared_memory_decode_alike_in_every_batch(
    backend: str, device: torch.device
) -> None:
    """So wide that not every cut fits: the kernel must be the same all the same."""
    problem = make_problem(
        (1024, 256, 16, 8), seed=5, num_items=4000, dim=128, hidden_dim=2048, tokens=3, batch=3
    )
    plan = problem.plan(backend, torch.bfloat16, device=device)
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(device)
    alone = plan.beam_decode(rows)
    for batch in (1, 17, 33, 65, 264, 265, 600):
        order = torch.arange(batch, device=device) % 3
        got = plan.beam_decode(rows[order].contiguous())
        wanted = [tensor[order] for tensor in alone]
        assert_results_equal(got, wanted, where=f"batch {batch}", wanted_is="a batch of 3")


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_padding_of_histories_never_changes_a_bit(backend: str, device: torch.device) -> None:
    """The readout's weights of long histories leave shared memory; the kernel stays the same."""
    problem = make_problem(
        (64, 64, 64), seed=6, dim=128, attention_dim=256, num_heads=16, hidden_dim=128, tokens=20
    )
    plan = problem.plan(backend, torch.bfloat16, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = plan.decode_states(states, mask)
    for tokens in (1136, 1137, 3000):
        longer = torch.full((problem.batch, tokens, 128), torch.nan, device=device)
        longer[:, :20] = states
        valid = torch.zeros(problem.batch, tokens, dtype=torch.bool, device=device)
        valid[:, :20] = mask
        got = plan.decode_states(longer, valid)
        assert_results_equal(got, wanted, where=f"{tokens} tokens", wanted_is="20 tokens")


def test_a_plan_prints_levels_and_cuts_in_one_table() -> None:
    problem = make_problem((1024, 256, 16, 8), seed=5, num_items=4000, num_beams=50)
    lines = str(plan_of(problem, "cuda", torch.bfloat16)).splitlines()
    assert lines[1] == "kernel: tensor cores"
    assert lines[2].split() == ["level", "codes", "nodes", "children", "only", "child", "logits"]
    levels = [line.split(maxsplit=5) for line in lines[3:7]]
    assert [level[0] for level in levels] == ["1", "2", "3", "4"]
    assert levels[0][-1] == "dense: level 1 normalises over all codes"
    share = float(levels[1][3]) / 256
    assert levels[1][-1] == (
        f"sparse: a node continues with {share:.1%} of the codes, dense above 3%"
    )
    assert levels[3][-1].startswith("dense: a node continues with 1")
    assert lines[7].split()[:4] == ["batch", "cluster", "group", "blocks/request"]
    assert lines[7:] == table(tensor_core_cuts(problem.spec, torch.bfloat16, 50))
    assert len(lines) > 8


def test_a_plan_says_why_its_backend_was_chosen() -> None:
    problem = make_problem((8, 8), seed=5, num_items=40)
    plan = plan_of(problem, "cuda", torch.float32, chosen="by 'auto', its first choice")
    lines = str(plan).splitlines()
    assert lines[1] == "chosen: by 'auto', its first choice"
    assert lines[2].startswith("kernel: plain (float32")
    assert not any("cluster" in line for line in lines)
    assert "chosen" not in str(plan_of(problem, "cpu", torch.float32))


def test_cuts() -> None:
    rows = tensor_core_cuts(PUBLISHED, torch.bfloat16, 50)
    batches = [row.most_requests for row in rows]
    assert batches == sorted(set(batches))
    assert batches[-1] == 2**31 - 1, "every batch has a cut"
    for row in rows:
        assert row.cluster in (1, 2, 4, 8)
        assert row.group in (1, 2, 4, 8)
        assert row.resident in (1, 2)
        assert row.reason
    result = subprocess.run(
        [sys.executable, "-m", "sidmlp_kernels.ops.cuda_kernels"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.splitlines() == table(rows)
    assert len(table(rows)) == len(rows) + 1
    assert result.stderr == ""


def test_the_table_of_cuts() -> None:
    cuts = (Cut(16, 8, 1, 1, "few"), Cut(64, 2, 2, 2, "some"), Cut(2**31 - 1, 2, 8, 2, "many"))
    cells = [line.split()[:6] for line in table(cuts)[1:]]
    assert cells == [
        ["1..16", "8", "1", "8", "1", "few"],
        ["17..64", "2", "2", "1", "2", "some"],
        ["65..", "2", "8", "1/4", "2", "many"],
    ]
    assert table(()) == table(cuts)[:1]


def test_what_reads_out_on_tensor_cores() -> None:
    """A matter of the model: half-precision weights, whole tiles, room in shared memory."""
    assert readout_on_tensor_cores(PUBLISHED, torch.bfloat16)
    assert readout_on_tensor_cores(PUBLISHED, torch.float16)
    assert not readout_on_tensor_cores(PUBLISHED, torch.float32)
    for sizes in ({"dim": 120}, {"ffn_dim": 100}, {"attention_dim": 48}, {"dim": 1024}):
        assert not readout_on_tensor_cores(replace(PUBLISHED, **sizes), torch.bfloat16), sizes
