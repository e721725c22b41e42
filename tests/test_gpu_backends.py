"""What only a GPU can get wrong: its operators against the CPU's, addresses, launches, devices.

The other tests judge every backend by the reference; these compare two backends on the same packed
weights, whose answers differ by float32 rounding alone, and bits with bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import DTYPES, GPU_BACKENDS, PUBLISHED, float32_activations, require_sizes
from torch import Tensor
from torch.autograd import DeviceType

from sidmlp_kernels.ops import load, operator
from sidmlp_kernels.ops.cuda_kernels import readout_on_tensor_cores
from sidmlp_kernels.ops.library import Results
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

on_gpus = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)

# Weights for which a backend's readout and logits keep activations in float32, so that they must
# agree with the CPU's; test_kernel_parity.py judges the others. Decodes: float32_activations.
as_the_cpu = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in GPU_BACKENDS
        for dtype in DTYPES
        if backend == "cuda" or dtype == "fp32"
    ],
    indirect=["backend"],
)

# Ten times what float32 rounding makes of these scores, far below most gaps between candidates.
TOLERANCE = 5e-5

SIZES: dict[str, dict[str, Any]] = {
    "published": {**PUBLISHED, "k": 10, "excluded": 30},
    "one level": {"codes_per_level": (40,), "num_items": 90},
    "eight levels": {"codes_per_level": (3, 2, 4, 2, 3, 2, 5, 2), "num_items": 700},
    "wide": {"dim": 1024, "hidden_dim": 2048, "blocks_per_head": 3, "num_heads": 16, "batch": 2},
    "D not a multiple of 4": {"dim": 30, "attention_dim": 15, "num_heads": 3, "hidden_dim": 21},
    "product form": {"dim": 72, "attention_dim": 600, "ffn_dim": 33, "blocks_per_head": 2},
    "long history": {"tokens": 1000, "num_heads": 8, "batch": 3},
    "8192 codes": {"codes_per_level": (8192, 5, 300), "num_items": 4000, "num_beams": 20},
    "600 beams": {"codes_per_level": (40, 40, 40), "num_items": 5000, "num_beams": 600},
    "codebook": {"codes_per_level": (30, 200, 17), "normalisation": "codebook", "num_beams": 25},
    "settings": {
        "temperatures": (0.5, 1.7, 3.0),
        "level_weights": (1.0, -0.5, 0.7),
        "unavailable": 0.3,
        "excluded": 100,
    },
}


def run(plan: DecodePlan, problem: Problem, states: Tensor | None = None) -> Results:
    """decode_states of the problem's requests on the plan's device."""
    device = plan.packed.device
    states = problem.states if states is None else states
    excluded = exclude_tensors(problem.exclude, device)
    return plan.decode_states(states.to(device), problem.mask.to(device), *excluded)


def assert_agree(got: Results, wanted: Results, *, where: str) -> None:
    """Equal counts, scores within TOLERANCE rank by rank, and the same item wherever the
    neighbouring scores are further apart than that."""
    items, scores, _, counts = (tensor.cpu() for tensor in got)
    items_wanted, scores_wanted, _, counts_wanted = (tensor.cpu() for tensor in wanted)
    assert torch.equal(counts, counts_wanted), where
    real = torch.arange(items.shape[1]) < counts[:, None]
    assert torch.equal(real, scores.isfinite()), where
    gap = torch.where(real, scores - scores_wanted, torch.zeros_like(scores)).abs()
    assert float(gap.max()) <= TOLERANCE, f"{where}: scores differ by {float(gap.max()):.2e}"
    step = scores_wanted[:, :-1] - scores_wanted[:, 1:]
    far = torch.ones_like(real)
    far[:, :-1] &= step > 2 * TOLERANCE  # to the next; false between two paddings
    far[:, 1:] &= step > 2 * TOLERANCE
    far[:, -1] = False  # it may be tied with the first that was cut
    assert torch.equal(items[far], items_wanted[far]), where
    assert bool((items[~real] == -1).all()), where


@as_the_cpu
@pytest.mark.parametrize("case", SIZES)
def test_as_the_cpu(backend: str, device: torch.device, case: str, dtype: str) -> None:
    problem = make_problem(seed=21, **SIZES[case])
    require_sizes(backend, problem, DTYPES[dtype])
    states = problem.states.to(DTYPES[dtype])
    ours, theirs = (
        problem.plan(name, DTYPES[dtype], device=place)
        for name, place in ((backend, device), ("cpu", "cpu"))
    )
    if backend != "cuda" or not readout_on_tensor_cores(problem.spec, DTYPES[dtype]):
        context = ours.context_readout(states.to(device), problem.mask.to(device)).cpu()
        wanted = theirs.context_readout(states, problem.mask)
        torch.testing.assert_close(context, wanted, rtol=1e-5, atol=2e-5)
    got = run(ours, problem, states)
    if float32_activations(backend, dtype, problem):
        assert_agree(got, run(theirs, problem, states), where=f"{case}, {dtype}")
    assert int(got[3].min()) > 0


@as_the_cpu
@pytest.mark.parametrize("states_dtype", DTYPES)
def test_states_of_another_dtype(
    backend: str, device: torch.device, dtype: str, states_dtype: str
) -> None:
    problem = make_problem(seed=22, tokens=30, blocks_per_head=2)
    assert float32_activations(backend, dtype, problem)
    states = problem.states.to(DTYPES[states_dtype])
    got = run(problem.plan(backend, DTYPES[dtype], device=device), problem, states)
    wanted = run(problem.plan("cpu", DTYPES[dtype]), problem, states)
    assert_agree(got, wanted, where=f"weights {dtype}, states {states_dtype}")


@on_gpus
@pytest.mark.parametrize("states_dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 30])
def test_states_at_any_address(
    backend: str, device: torch.device, dim: int, states_dtype: str
) -> None:
    """A contiguous view that begins at an odd element gives the same bits."""
    problem = make_problem(seed=23, dim=dim, num_heads=1)
    plan = problem.plan(backend, device=device)
    states = problem.states.to(device, DTYPES[states_dtype])
    memory = torch.empty(states.numel() + 1, dtype=states.dtype, device=device)
    moved = memory[1:].view(states.shape)
    moved.copy_(states)
    assert moved.is_contiguous()
    assert moved.data_ptr() % 4 or states.dtype == torch.float32
    got, wanted = run(plan, problem, moved), run(plan, problem, states)
    assert_results_equal(got, wanted, where=f"D {dim}, {states_dtype}")


@on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_is_the_readout_and_the_beams(
    backend: str, device: torch.device, dtype: str
) -> None:
    """Sizes that one kind of kernel reads out and decodes; a plain decode rounds otherwise than a
    context_readout on tensor cores."""
    problem = make_problem(seed=24, **SIZES["published"], batch=9)
    plan = problem.plan(backend, DTYPES[dtype], device=device)
    context = plan.context_readout(problem.states.to(device), problem.mask.to(device))
    two = plan.beam_decode(context, *exclude_tensors(problem.exclude, device))
    assert_results_equal(run(plan, problem), two, where=dtype)


@as_the_cpu
def test_level_logits_as_the_cpu(backend: str, device: torch.device, dtype: str) -> None:
    """A row with a code that does not exist, which nobody can check before the launch, is NaN."""
    problem = make_problem((7, 300, 9), seed=25, dim=40, hidden_dim=50, blocks_per_head=2)
    assert not load("cpu"), load("cpu")
    packed = problem.packed(DTYPES[dtype])
    context = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    for level, codes in enumerate(((), (3,), (6, 299))):
        prefix = torch.tensor(codes, dtype=torch.int32).expand(33, level).contiguous()
        rest = (list(packed.sizes), packed.spec.layer_norm_eps, 0)
        wanted = operator("level_logits", "cpu")(context, prefix, list(packed.heads), *rest)
        broken = prefix.clone()
        if level:
            broken[5, level - 1], broken[6, 0] = 300, -1
        heads = list(packed.to(device).heads)
        inputs = (context.to(device), broken.to(device))
        got = operator("level_logits", backend)(*inputs, heads, *rest).cpu()
        if level:
            assert bool(got[5:7].isnan().all())
            got[5:7] = wanted[5:7]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


@on_gpus
def test_scratch_that_no_multiprocessor_holds(backend: str, device: torch.device) -> None:
    """3,000 beams live in global memory, and blocks take several requests each."""
    problem = make_problem(
        (64, 64, 64), seed=26, num_items=9000, batch=400, num_beams=3000, dim=16, hidden_dim=16
    )
    require_sizes(backend, problem)
    plan = problem.plan(backend, device=device)
    whole = run(plan, problem)
    rows = [0, 1, 131, 263, 264, 399]
    part = problem.rows(rows)
    alone = run(plan, part)
    assert_results_equal(alone, [tensor[rows] for tensor in whole], where="6 of 400 requests")
    assert_agree(alone, run(problem.plan("cpu"), part), where="3000 beams")


@on_gpus
def test_a_batch_beyond_what_runs_at_once(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=27, batch=37)
    plan = problem.plan(backend, device=device)
    once = run(plan, problem)
    rows = torch.arange(20_000) % 37
    many = run(plan, problem.rows(rows))
    wanted = [tensor[rows.to(device)] for tensor in once]
    assert_results_equal(many, wanted, where="batch 20000")


@on_gpus
def test_repeated_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=28, **SIZES["published"], batch=64)
    plan = problem.plan(backend, torch.bfloat16, device=device)
    first = run(plan, problem)
    for turn in range(20):
        assert_results_equal(run(plan, problem), first, where=f"run {turn}")


@on_gpus
def test_exclusion_offsets_are_clamped(backend: str, device: torch.device) -> None:
    """Nobody reads offsets before the launch: bad ones exclude too much or too little, no more."""
    problem = make_problem(seed=29, batch=5, excluded=50)
    plan = problem.plan(backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    ids, _ = exclude_tensors(problem.exclude, device)
    for row in ([-7, 10**15, -(10**15), 40, 3, 2**62], [2**62] * 6, [5, 4, 3, 2, 1, 0]):
        offsets = torch.tensor(row, device=device)
        items, _, _, counts = plan.decode_states(states, mask, ids, offsets)
        real = torch.arange(items.shape[1]) < counts.cpu()[:, None]
        assert set(items.cpu()[real].tolist()) <= set(problem.item_ids.tolist())


@on_gpus
def test_no_requests_launch_nothing(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=30)
    plan = problem.plan(backend, device=device)
    nobody = problem.rows([])
    assert [list(t.shape) for t in run(plan, nobody)] == [[0, 10], [0, 10], [0, 10, 3], [0]]
    assert plan.context_readout(nobody.states.to(device), nobody.mask.to(device)).shape == (0, 64)
    tokenless = problem.replace(states=problem.states[:, :0], mask=problem.mask[:, :0])
    wanted = run(problem.plan("cpu"), tokenless)
    assert_agree(run(plan, tokenless), wanted, where="no tokens")


@on_gpus
def test_one_kernel(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=33, **SIZES["published"], batch=3)
    plan = problem.plan(backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    excluded = exclude_tensors(problem.exclude, device)
    context = plan.context_readout(states, mask)
    calls = {
        "decode_states": lambda: plan.decode_states(states, mask, *excluded),
        "beam_decode": lambda: plan.beam_decode(context, *excluded),
        "context_readout": lambda: plan.context_readout(states, mask),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        work = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
        assert len(work) == 1, f"{name}: {work}"
        assert ("readout" if name == "context_readout" else "decode") in work[0]


def decode_with(
    heads: list[Tensor], backend: str, plan: DecodePlan, states: Tensor, mask: Tensor
) -> Results:
    """decode_states of the plan with other heads."""
    catalogue = plan.snapshot.trie_tensors(plan.packed.device)
    rest = (heads, catalogue, None, None, *plan._decode_args)
    return operator("decode_states", backend)(states, mask, list(plan.packed.readout), *rest)


@on_gpus
def test_calls_that_do_not_fit(backend: str, device: torch.device) -> None:
    problem = make_problem(seed=34)
    plan = problem.plan(backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = plan.decode_states(states, mask)
    heads = list(plan.packed.heads)
    with pytest.raises(RuntimeError, match=r"states: expected a CUDA tensor"):
        plan.decode_states(states.cpu(), mask)
    with pytest.raises(RuntimeError, match=r"mask: expected on the device"):
        plan.decode_states(states, mask.cpu())
    with pytest.raises(RuntimeError, match=r"heads.context_weight: expected on the device"):
        decode_with([heads[0].cpu(), *heads[1:]], backend, plan, states, mask)
    other = list(problem.packed(torch.bfloat16).to(device).heads)
    with pytest.raises(RuntimeError, match=r"heads: expected matrices of the readout's dtype"):
        decode_with(other, backend, plan, states, mask)
    got = decode_with(heads, backend, plan, states, mask)
    assert_results_equal(got, wanted, where="after the refusals")


@on_gpus
def test_heads_at_any_address(backend: str, device: torch.device) -> None:
    """Weights that begin at an odd element are refused, or read right: never a fault."""
    problem = make_problem(seed=34)
    plan = problem.plan(backend, device=device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = plan.decode_states(states, mask)
    heads = list(plan.packed.heads)
    memory = torch.zeros(heads[0].numel() + 1, device=device)
    heads[0] = memory[1:].view(heads[0].shape).copy_(heads[0])
    refusal = ""
    try:
        got = decode_with(heads, backend, plan, states, mask)
    except RuntimeError as error:
        refusal, got = str(error), wanted
    assert not refusal or "heads: expected tensors aligned to 16 bytes" in refusal
    assert_results_equal(got, wanted, where="heads at an odd address")


@on_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend: str) -> None:
    problem = make_problem(seed=35)
    results = [run(problem.plan(backend, device=f"cuda:{i}"), problem) for i in (0, 1)]
    assert results[1][0].device.index == 1
    assert torch.cuda.current_device() == 0
    assert_results_equal(results[1], results[0], where="cuda:1")
