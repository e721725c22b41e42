"""Which kernel the CUDA backend takes, and the printed table of cuts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sidmlp_kernels.ops.cuda_kernels import table, tensor_cores_why_not
from sidmlp_kernels.plan import DecodePlan, make_plan
from sidmlp_kernels.testing import assert_results_equal, make_problem
from sidmlp_kernels.trie import host_library


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
        ({"num_beams": 129}, "num_beams"),
        ({"codes_per_level": (4, 1025)}, "codes_per_level"),
    ],
)
def test_other_sizes_take_the_plain_kernel_and_say_why(options: dict[str, Any], named: str) -> None:
    assert why_not(**options).startswith(named)


def test_a_plan_names_its_kernel_and_takes_dense_tiles_early_on_tensor_cores() -> None:
    problem = make_problem((256,) * 4, seed=3, num_items=5000, hidden_dim=64)

    def plan(backend: str, dtype: torch.dtype) -> DecodePlan:
        settings = problem.settings
        return make_plan(
            problem.packed(dtype),
            problem.catalogue.snapshot(),
            backend,
            k=problem.k,
            num_beams=settings.num_beams,
            temperatures=(1.0,) * 4,
            level_weights=(1.0,) * 4,
        )

    half, single = plan("cuda", torch.bfloat16), plan("cuda", torch.float32)
    assert "kernel: tensor cores" in str(half)
    assert "kernel: plain (float32" in str(single)
    assert "kernel" not in str(plan("cpu", torch.float32))
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


def test_cuts() -> None:
    rows = host_library().tensor_core_cuts()
    batches = [row[0] for row in rows]
    assert batches == sorted(set(batches))
    assert batches[-1] == 2**31 - 1, "every batch has a cut"
    for _, cluster, group, reason in rows:
        assert cluster in (1, 2, 4, 8)
        assert group in (1, 2, 4, 8)
        assert reason
    result = subprocess.run(
        [sys.executable, "-m", "sidmlp_kernels.ops.cuda_kernels"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.strip() == table()
    assert len(table().splitlines()) == len(rows) + 1
    assert result.stderr == ""
