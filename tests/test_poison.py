"""Memory that no kernel may read, poisoned, and arrays at addresses that nobody likes.

NaN, infinities and wild indices stand around every array, in masked states, in weights that no
catalogue needs, in exclusions that belong to nobody, and in the memory that results are made of.
The answer must keep the bits that it has without them. Widths are such that kernels for a GPU's
tensor cores take half precision, too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from captured_graphs import assert_same, make, make_model
from parity import DTYPES, GPU_BACKENDS
from torch import Tensor

from sidmlp_kernels.ops import operator
from sidmlp_kernels.ops.library import Results
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem

on_gpus = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

WILD = {torch.int16: 32767, torch.int32: 2147480000, torch.int64: 2**62, torch.uint8: 255}
GUARD = 1024  # bytes of poison before and after an array
GARBAGE = (0x00, 0x7F, 0xFF)  # bytes: zeros, large numbers, NaN and -1


def problem_of(seed: int, **options: Any) -> Problem:
    """Fewer items than k in some requests, so that padding is written, too."""
    sizes = {"dim": 64, "hidden_dim": 96, "num_items": 60, "num_beams": 40, "excluded": 30}
    return make_problem((16, 12, 9), seed=seed, **{"batch": 19, **sizes, **options})


@dataclasses.dataclass
class Call:
    """One call of decode_states, every tensor of it in reach."""

    backend: str
    plan: DecodePlan
    tensors: dict[str, Tensor]  # states, mask, ids, offsets, and "heads 0" and so on

    @classmethod
    def of(cls, problem: Problem, backend: str, device: torch.device, dtype: str) -> Call:
        plan = problem.plan(backend, DTYPES[dtype], device=device)
        ids, offsets = exclude_tensors(problem.exclude, device)
        states = problem.states.to(device, DTYPES[dtype])
        tensors = {"states": states, "mask": problem.mask.to(device), "ids": ids}
        tensors["offsets"] = offsets
        for name, group in {
            "readout": plan.packed.readout,
            "heads": plan.packed.heads,
            "catalogue": plan.snapshot.trie_tensors(device),
        }.items():
            tensors |= {f"{name} {i}": tensor for i, tensor in enumerate(group)}
        return cls(backend, plan, tensors)

    def __call__(self, **changed: Tensor) -> Results:
        return self.with_tensors(self.tensors | changed)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Results:
        groups = [
            [tensor for key, tensor in tensors.items() if key.startswith(name)]
            for name in ("readout ", "heads ", "catalogue ")
        ]
        inputs = tensors["states"], tensors["mask"]
        excluded = tensors["ids"], tensors["offsets"]
        run = operator("decode_states", self.backend)
        return run(*inputs, *groups, *excluded, *self.plan._decode_args)


def moved(tensor: Tensor, offset: int, before: int = 0, after: int = 0) -> Tensor:
    """A contiguous copy that lies `offset` elements into memory of its own, poison around it."""
    value: float = WILD.get(tensor.dtype, math.nan)
    if tensor.dtype == torch.bool:
        value = True
    size = before + offset + tensor.numel() + after
    memory = torch.full((size,), value, dtype=tensor.dtype, device=tensor.device)
    place = memory[before + offset : before + offset + tensor.numel()].view(tensor.shape)
    return place.copy_(tensor)


@dtypes
def test_what_lies_around_an_array(backend: str, device: torch.device, dtype: str) -> None:
    call = Call.of(problem_of(1), backend, device, dtype)
    wanted = call()
    guarded = {}
    for name, tensor in call.tensors.items():
        guard = GUARD // tensor.element_size()  # so that alignment stays
        guarded[name] = moved(tensor, 0, guard, guard) if tensor.numel() else tensor
    assert_results_equal(call.with_tensors(guarded), wanted, where="poison around every array")


@dtypes
def test_masked_states(backend: str, device: torch.device, dtype: str) -> None:
    problem = problem_of(2)
    call = Call.of(problem, backend, device, dtype)
    wanted = call()
    hidden = ~problem.mask.to(device)[..., None]
    assert bool(call.tensors["states"].masked_select(hidden).isnan().all())
    for garbage in (0.0, math.inf, -math.inf, torch.finfo(DTYPES[dtype]).max):
        states = call.tensors["states"].masked_fill(hidden, garbage)
        assert_results_equal(call(states=states), wanted, where=f"{garbage} in masked states")


@dtypes
@pytest.mark.parametrize("dense", [False, True])
def test_weights_that_no_item_needs(
    backend: str, device: torch.device, dense: bool, dtype: str
) -> None:
    """Logits of codes that continue no item, and table rows of codes that no item has."""
    codes = torch.randint(0, 5, (60, 3), generator=torch.Generator().manual_seed(3))
    problem = problem_of(3, codes=codes * torch.tensor([3, 2, 1]))
    flags = [True, dense, dense]
    call = Call.of(problem, backend, device, dtype)
    call.plan = problem.plan(backend, DTYPES[dtype], device=device, dense=flags)
    wanted = call()
    sizes = problem.spec.codes_per_level
    unused = [
        torch.tensor(sorted(set(range(size)) - set(problem.codes[:, i].tolist())), device=device)
        for i, size in enumerate(sizes)
    ]
    assert all(len(codes) for codes in unused)
    changed = {}
    for level in range(1, 3):
        table, weight, bias = (f"heads {2 + 5 * level + n}" for n in (1, 3, 4))
        offsets = [sum(sizes[:j]) for j in range(level)]
        rows = torch.cat([first + unused[j] for j, first in enumerate(offsets)])
        for name, index in ((table, rows), (weight, unused[level]), (bias, unused[level])):
            changed[name] = call.tensors[name].index_fill(0, index, math.nan)
    assert_results_equal(call(**changed), wanted, where=f"dense {dense}")


@on_gpus
@dtypes
def test_exclusions_of_nobody(backend: str, device: torch.device, dtype: str) -> None:
    """Ids before the first offset and after the last are every item there is, then wild."""
    problem = problem_of(4)
    call = Call.of(problem, backend, device, dtype)
    wanted = call()
    assert int(wanted[3].max()) > 0
    ids, offsets = call.tensors["ids"], call.tensors["offsets"]
    everything = problem.item_ids.sort().values.to(device)
    wild = torch.tensor([2**62, -(2**62), 2**63 - 1, -(2**63)], device=device)
    longer = torch.cat([everything, ids, everything, wild])
    got = call(ids=longer, offsets=offsets + len(everything))
    assert_results_equal(got, wanted, where="exclusions of nobody")


@on_gpus
@dtypes
def test_bad_offsets_of_other_requests(backend: str, device: torch.device, dtype: str) -> None:
    """They are clamped, so they cost nobody else a bit; an empty range excludes nothing."""
    problem = problem_of(5)
    call = Call.of(problem, backend, device, dtype)
    wanted = call()
    free = call(offsets=torch.zeros_like(call.tensors["offsets"]))
    offsets = call.tensors["offsets"].clone()
    offsets[7], offsets[8], offsets[14], offsets[19] = 2**62, -(2**62), -1, 2**63 - 1
    got = call(offsets=offsets)
    # 7 and 13 go from above to below, which is nothing, 18 to the end, and 6, 8 and 14 take in ids
    # of others, so that they exclude too much or too little.
    right = [b for b in range(19) if b not in (6, 7, 8, 13, 14)]
    assert_results_equal([t[right] for t in got], [t[right] for t in wanted], where="legal ranges")
    falling = [7, 13]
    assert_results_equal([t[falling] for t in got], [t[falling] for t in free], where="falling")


@dtypes
def test_arrays_at_any_address(backend: str, device: torch.device, dtype: str) -> None:
    """One element further: the same bits for the catalogue and what a caller brings with each call,
    and for weights the same bits or a refusal, never a fault."""
    call = Call.of(problem_of(6), backend, device, dtype)
    wanted = call()
    for names in (("states", "mask", "ids", "offsets"), ("catalogue",)):
        shifted = {
            name: moved(tensor, 1)
            for name, tensor in call.tensors.items()
            if name.split()[0] in names
        }
        assert_results_equal(call(**shifted), wanted, where=f"{names} one element further")
    for name, tensor in call.tensors.items():
        group = name.split()[0]
        if group not in ("readout", "heads") or not tensor.numel():
            continue
        refusal, got = "", wanted
        try:
            got = call(**{name: moved(tensor, 1)})
        except RuntimeError as error:
            refusal = str(error)
        assert not refusal or f"{group}: expected tensors aligned to 16 bytes" in refusal
        assert_results_equal(got, wanted, where=f"{name} one element further")
    assert_results_equal(call(), wanted, where="after the refusals")


def test_contexts_at_any_address(backend: str, device: torch.device) -> None:
    problem = problem_of(7)
    for dtype in DTYPES.values():
        plan = problem.plan(backend, dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        context = torch.randn(19, problem.spec.dim, generator=generator).to(device)
        got = plan.beam_decode(moved(context, 1, GUARD, GUARD))
        assert_results_equal(got, plan.beam_decode(context), where=f"{dtype}")


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("ids", "exclude_ids"),
        ("offsets", "exclude_offsets"),
        ("catalogue 0", "catalogue level 1 child_begin"),
        ("catalogue 3", "catalogue level 2 codes"),
        ("catalogue 6", "catalogue leaf_begin"),
        ("catalogue 7", "catalogue leaf_item_ids"),
        ("catalogue 8", "catalogue leaf_available"),
        ("heads 1", "heads.context_bias"),
        ("heads 8", "heads.1.prefix_table"),
        ("readout 6", "readout.ffn_in"),
    ],
)
def test_arrays_that_are_not_contiguous_are_refused(
    backend: str, device: torch.device, name: str, named: str
) -> None:
    """Those that test_ops.py lacks."""
    call = Call.of(problem_of(8), backend, device, "bf16")
    with pytest.raises(RuntimeError, match=rf"{named}: expected a contiguous tensor"):
        call(**{name: strided(call.tensors[name])})


@on_gpus
def test_graphs_take_inputs_that_are_not_contiguous(backend: str, device: torch.device) -> None:
    problem = make(9)
    model = make_model(problem, backend, device)
    decoder = model.capture((8,), problem.states.shape[1], num_beams=10)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = model.decode_states(states, mask, num_beams=10)
    turned = states.transpose(0, 2).contiguous().transpose(0, 2)
    wide = mask.repeat_interleave(2, dim=1)[:, ::2]
    assert not turned.is_contiguous()
    assert not wide.is_contiguous()
    assert_same(decoder.decode_states(turned, wide), wanted)
    assert_same(decoder.decode_states(moved(states, 1), moved(mask, 1)), wanted)


def fill_free_memory(byte: int, device: torch.device) -> set[int]:
    """Fills what torch's allocator hands out next with a byte: every hole between tensors and a
    fresh segment for small tensors, and large blocks. The addresses of the small ones."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

    def block(size: int) -> Tensor:
        return torch.full((size,), byte, dtype=torch.uint8, device=device)

    before = torch.cuda.memory_reserved(device)
    blocks = []
    while torch.cuda.memory_reserved(device) == before:
        blocks.append(block(512))  # the last of them is the first in a segment of 2 MiB
    blocks += [block(512) for _ in range(4095)]
    places = {small.data_ptr() for small in blocks}
    blocks += [block(16 << 20), block(300 << 20)]
    return places


@on_gpus
@dtypes
@pytest.mark.parametrize("num_beams", [40, 600])
def test_results_and_scratch_that_begin_as_garbage(
    backend: str, device: torch.device, num_beams: int, dtype: str
) -> None:
    """Whatever freed memory the allocator hands out: every element of a result is written, and no
    scratch is read before."""
    problem = problem_of(10, num_items=30, num_beams=num_beams, k=40)
    call = Call.of(problem, backend, device, dtype)
    wanted = [tensor.cpu() for tensor in call()]
    assert int(wanted[3].max()) < 40, "padding is written, too"
    for byte in GARBAGE:
        places = fill_free_memory(byte, device)
        got = call()
        assert {tensor.data_ptr() for tensor in got} <= places, "not in the memory that was filled"
        assert_results_equal(got, wanted, where=f"bytes {byte:#04x}")
