"""`torch.ops.sidmlp.*`: opcheck, fakes, torch.compile, torch.export, and calls that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sidmlp_kernels import Recommendations, Recommender, backends, ops
from sidmlp_kernels.ops import SCHEMAS, operator
from sidmlp_kernels.plan import ISAS
from sidmlp_kernels.testing import Problem, assert_results_equal, exclude_tensors, make_problem
from sidmlp_kernels.trie import host_library

# Those that take token ids: test_encoder_ops.py.
NAMES = ("beam_decode", "decode_states", "context_readout", "level_logits")


def make() -> Problem:
    return make_problem(
        (5, 4, 6), seed=1, dim=24, hidden_dim=20, blocks_per_head=2, num_items=80, excluded=5
    )


def arguments(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A legal call of the operator, argument by argument."""
    problem = make()
    packed = problem.packed(dtype).to(device)
    ids, offsets = exclude_tensors(problem.exclude, device)
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(4, 24, generator=generator).to(device)
    model = {"sizes": list(packed.sizes), "layer_norm_eps": 1e-5}
    states = {"states": problem.states.to(device), "mask": problem.mask.to(device)}
    readout = {"readout": list(packed.readout)}
    decode = {
        "heads": list(packed.heads),
        "catalogue": problem.catalogue.snapshot().trie_tensors(device),
        "exclude_ids": ids,
        "exclude_offsets": offsets,
        **model,
        "k": 6,
        "num_beams": 10,
        "codebook": False,
        "temperatures": [1.0, 0.5, 2.0],
        "level_weights": [1.0, -1.0, 0.5],
        "level_modes": [1, 0, 1],
        "launches": 1,
        "isa": 0,
    }
    return {
        "beam_decode": {"context": context, **decode},
        "decode_states": {**states, **readout, **decode},
        "context_readout": {**states, **readout, **model, "isa": 0},
        "level_logits": {
            "context": context,
            "prefix_codes": torch.tensor(
                [[0, 1], [4, 3], [2, 2], [1, 0]], dtype=torch.int32, device=device
            ),
            "heads": list(packed.heads),
            **model,
            "isa": 0,
        },
    }[name]


def call(name: str, backend: str = "cpu", **given: Any) -> Any:
    return operator(name, backend)(*given.values())


@pytest.fixture(autouse=True)
def _libraries() -> None:
    assert not ops.load("cpu"), ops.load("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: str, device: torch.device, name: str, dtype: str) -> None:
    given = arguments(name, device, DTYPES[dtype])
    torch.library.opcheck(operator(name, backend), tuple(given.values()))


@pytest.mark.parametrize("name", ["beam_decode", "decode_states"])
def test_opcheck_without_exclusion(backend: str, device: torch.device, name: str) -> None:
    given = arguments(name, device) | {"exclude_ids": None, "exclude_offsets": None}
    torch.library.opcheck(operator(name, backend), tuple(given.values()))


@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_real_shapes_and_dtypes(
    backend: str, device: torch.device, name: str
) -> None:
    given = arguments(name, device)
    real = call(name, backend, **given)
    with FakeTensorMode() as mode:
        fake = call(name, backend, **tree_map_only(torch.Tensor, mode.from_tensor, given))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for have, want in pairs:
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        assert have.device == want.device
        assert have.is_contiguous() == want.is_contiguous()


@pytest.mark.parametrize("backend", [backend.name for backend in backends.BACKENDS])
def test_the_schemas_are_those_of_the_specification(backend: str) -> None:
    """Of backends that cannot run here, too: schemas need no library."""
    for name, schema in SCHEMAS.items():
        found = operator(name, backend)._schema
        assert found.name.startswith(f"sidmlp::{name}")
        assert str(found) == found.name + schema


class Decode(torch.nn.Module):
    """A model's tail: what torch.compile and torch.export see of a decode."""

    def __init__(self, problem: Problem, backend: str, device: torch.device) -> None:
        super().__init__()
        plan = problem.plan(backend, device=device)
        self.readout = list(plan.packed.readout)
        self.heads = list(plan.packed.heads)
        self.catalogue = plan.snapshot.trie_tensors(device)
        self.rest = (None, None, *plan._decode_args)
        self.operator = operator("decode_states", backend)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.operator(
            2 * states, mask, self.readout, self.heads, self.catalogue, *self.rest
        )
        items, scores, codes, counts = results
        return items + 1, scores * 0.5, codes, counts


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    problem = make()
    model = Decode(problem, backend, device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    wanted = model(states, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_results_equal(compiled(states, mask), wanted, where="torch.compile, aot_eager")


def test_compile_a_recommender(backend: str, device: torch.device) -> None:
    """Whole calls, as a user compiles them; after a swap they answer from the new catalogue."""
    problem, other = make_problem(seed=1, batch=3), make_problem(seed=2, batch=3)
    table = torch.randn(4000, problem.spec.dim, device=device)
    model = Recommender(
        problem.student,
        problem.catalogue,
        lambda ids, mask: table[ids],
        device=device,
        backend=backend,
    )
    batch = model.batch([[int(item)] for item in problem.item_ids[:3]])
    inputs = (problem.states.to(device), problem.mask.to(device))

    def from_batch() -> Recommendations:
        return model.decode(batch, k=5, num_beams=10)

    def from_states() -> Recommendations:
        return model.decode_states(*inputs, k=5, num_beams=10)

    def results(call: Callable[[], Recommendations]) -> list[torch.Tensor]:
        found = call()
        return [found.items, found.scores, found.codes, found.counts]

    calls = (from_batch, from_states)
    for turn in ("first catalogue", "after a swap"):
        for call in calls:
            wanted = results(call)
            compiled = torch.compile(lambda c=call: results(c), fullgraph=True, backend="aot_eager")
            assert_results_equal(compiled(), wanted, where=f"{call.__name__}, {turn}")
        if turn == "first catalogue":
            reused = torch.compile(
                lambda: results(from_states), fullgraph=True, backend="aot_eager"
            )
            reused()
            model.swap(other.catalogue)
            assert_results_equal(reused(), results(from_states), where="compiled before the swap")


@pytest.mark.slow
def test_compile_with_inductor(backend: str, device: torch.device) -> None:
    problem = make()
    model = Decode(problem, backend, device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (range(4), range(3), range(1, 2)):
        part = problem.rows(rows)
        states, mask = part.states.to(device), part.mask.to(device)
        got, wanted = compiled(states, mask), model(states, mask)
        assert_results_equal(got, wanted, where=f"torch.compile, batch {len(rows)}")


def test_export_with_any_batch(backend: str, device: torch.device) -> None:
    problem = make()
    model = Decode(problem, backend, device)
    states, mask = problem.states.to(device), problem.mask.to(device)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (states, mask), dynamic_shapes={"states": {0: batch}, "mask": {0: batch}}
    )
    targets = [str(node.target) for node in exported.graph.nodes]
    assert str(operator("decode_states", backend)) in targets
    for rows in (range(4), range(1, 3)):
        part = problem.rows(rows)
        states, mask = part.states.to(device), part.mask.to(device)
        got = exported.module()(states, mask)
        assert_results_equal(got, model(states, mask), where=f"torch.export, batch {len(rows)}")


# --- Calls that do not fit: a RuntimeError that names the argument, never a crash. ---

Change = Callable[[dict[str, Any]], dict[str, Any]]


def swap(name: str, value: Any) -> Change:
    return lambda given: {name: value}


def at(name: str, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """One tensor of a list, changed."""
    return lambda given: {name: [change(t) if i == index else t for i, t in enumerate(given[name])]}


def on(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda given: {name: change(given[name])}


def row_short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].contiguous()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


DECODE_FAULTS: dict[str, tuple[Change, str]] = {
    "k 0": (swap("k", 0), "k "),
    "k above beams": (swap("k", 11), "k "),
    "k huge": (swap("k", 2**40), "k "),
    "no beams": (swap("num_beams", 0), "num_beams"),
    "beams beyond the key": (swap("num_beams", 2**16 + 1), "num_beams"),
    "beams huge": (swap("num_beams", 2**50), "num_beams"),
    "few temperatures": (swap("temperatures", [1.0]), "temperatures"),
    "temperature 0": (swap("temperatures", [1.0, 0.0, 1.0]), "temperatures"),
    "temperature NaN": (swap("temperatures", [1.0, float("nan"), 1.0]), "temperatures"),
    "temperature tiny": (swap("temperatures", [1.0, 1e-60, 1.0]), "temperatures"),
    "many weights": (swap("level_weights", [1.0] * 4), "level_weights"),
    "weight infinite": (swap("level_weights", [1.0, 1e39, 1.0]), "level_weights"),
    "few modes": (swap("level_modes", [1, 1]), "level_modes"),
    "launches 0": (swap("launches", 0), "launches"),
    "launches 2 of two blocks": (swap("launches", 2), "launches"),
    "launches huge": (swap("launches", 2**40 + 2), "launches"),
    "mode 2": (swap("level_modes", [1, 2, 0]), "level_modes"),
    "exclusion without offsets": (swap("exclude_offsets", None), "exclude_offsets"),
    "exclusion without ids": (swap("exclude_ids", None), "exclude_ids"),
    "offsets short": (on("exclude_offsets", row_short), "exclude_offsets"),
    "offsets int32": (on("exclude_offsets", torch.Tensor.int), "exclude_offsets"),
    "ids int32": (on("exclude_ids", torch.Tensor.int), "exclude_ids"),
    "ids 2-d": (on("exclude_ids", lambda t: t[None]), "exclude_ids"),
    "catalogue short": (on("catalogue", lambda t: t[:-1]), "catalogue"),
    "catalogue empty": (swap("catalogue", []), "catalogue"),
    "child_begin int64": (at("catalogue", 0, torch.Tensor.long), "catalogue level 1 child_begin"),
    "child_begin short": (at("catalogue", 2, row_short), "catalogue level 2 child_begin"),
    "codes int32": (at("catalogue", 3, torch.Tensor.int), "catalogue level 2 codes"),
    "no nodes": (at("catalogue", 5, lambda t: t[:0]), "catalogue level 3 codes"),
    "leaf_begin short": (at("catalogue", 6, row_short), "leaf_begin"),
    "ids of items int32": (at("catalogue", 7, torch.Tensor.int), "leaf_item_ids"),
    "stock short": (at("catalogue", 8, row_short), "leaf_available"),
    "stock bool": (at("catalogue", 8, torch.Tensor.bool), "leaf_available"),
}
HEADS_FAULTS: dict[str, tuple[Change, str]] = {
    "heads short": (on("heads", lambda t: t[:-1]), "heads"),
    "heads empty": (swap("heads", []), "heads"),
    "context_weight double": (at("heads", 0, torch.Tensor.double), "heads.context_weight"),
    "context_weight short": (at("heads", 0, row_short), "heads.context_weight"),
    "context_bias bf16": (at("heads", 1, torch.Tensor.bfloat16), "heads.context_bias"),
    "vectors short": (at("heads", 2, row_short), "heads.0.vectors"),
    "prefix table short": (at("heads", 8, row_short), "heads.1.prefix_table"),
    "prefix table bf16": (at("heads", 8, torch.Tensor.bfloat16), "heads.1.prefix_table"),
    "block weight flat": (at("heads", 4, lambda t: t[0]), "heads.0.block_weight"),
    "output strided": (at("heads", 5, strided), "heads.0.out_weight"),
    "output bias int": (at("heads", 6, torch.Tensor.int), "heads.0.out_bias"),
}
READOUT_FAULTS: dict[str, tuple[Change, str]] = {
    "readout short": (on("readout", lambda t: t[:-1]), "readout"),
    "query weight int": (at("readout", 0, torch.Tensor.int), "readout.query_weight"),
    "vectors short": (at("readout", 1, row_short), "readout.vectors"),
    "score_out short": (at("readout", 3, row_short), "readout.score_out"),
    "value_in fp16": (at("readout", 4, torch.Tensor.half), "readout.value_in"),
    "value_out missing": (at("readout", 5, lambda t: t[:0]), "readout.value_out"),
    "ffn bias short": (at("readout", 7, row_short), "readout.ffn_in_bias"),
    "ffn_out strided": (at("readout", 8, strided), "readout.ffn_out"),
    "states 2-d": (on("states", lambda t: t[0]), "states"),
    "states narrow": (on("states", lambda t: t[..., :-1].contiguous()), "states"),
    "states double": (on("states", torch.Tensor.double), "states"),
    "states strided": (on("states", strided), "states"),
    "mask uint8": (on("mask", torch.Tensor.byte), "mask"),
    "mask short": (on("mask", row_short), "mask"),
    "mask strided": (on("mask", strided), "mask"),
}
SIZES_FAULTS: dict[str, tuple[Change, str]] = {
    "sizes empty": (swap("sizes", []), "sizes"),
    "sizes short": (on("sizes", lambda s: s[:-1]), "sizes"),
    "no levels": (on("sizes", lambda s: [0, *s[1:]]), "number of levels"),
    "nine levels": (on("sizes", lambda s: [9, *s[1:], *s[7:], *s[7:]]), "number of levels"),
    "dim 0": (on("sizes", lambda s: [s[0], 0, *s[2:]]), "dim"),
    "dim negative": (on("sizes", lambda s: [s[0], -24, *s[2:]]), "dim"),
    "dim huge": (on("sizes", lambda s: [s[0], 2**62, *s[2:]]), "dim"),
    "codes beyond int16": (on("sizes", lambda s: [*s[:-1], 40_000]), "codes of a level"),
}
CONTEXT_FAULTS: dict[str, tuple[Change, str]] = {
    "context bf16": (on("context", torch.Tensor.bfloat16), "context"),
    "context narrow": (on("context", lambda t: t[:, :-1].contiguous()), "context"),
    "context 1-d": (on("context", lambda t: t[0]), "context"),
    "context strided": (on("context", strided), "context"),
}
CODES_FAULTS: dict[str, tuple[Change, str]] = {
    "prefix int64": (on("prefix_codes", torch.Tensor.long), "prefix_codes"),
    "prefix too long": (on("prefix_codes", lambda t: t.repeat(1, 2)), "prefix_codes"),
    "prefix of fewer rows": (on("prefix_codes", row_short), "prefix_codes"),
    "prefix 1-d": (on("prefix_codes", lambda t: t[0]), "prefix_codes"),
}
FAULTS = {
    "beam_decode": CONTEXT_FAULTS | DECODE_FAULTS | HEADS_FAULTS | SIZES_FAULTS,
    "decode_states": READOUT_FAULTS | DECODE_FAULTS | HEADS_FAULTS | SIZES_FAULTS,
    "context_readout": READOUT_FAULTS | SIZES_FAULTS,
    "level_logits": CONTEXT_FAULTS | CODES_FAULTS | HEADS_FAULTS | SIZES_FAULTS,
}


# Contents that a GPU's operators do not read before they launch, and what they have no use for.
ISA_FAULTS: dict[str, tuple[Change, str]] = {
    "isa unknown": (swap("isa", 9), "isa"),
    "isa negative": (swap("isa", -1), "isa"),
}
OFFSETS_FAULTS: dict[str, tuple[Change, str]] = {
    "offsets fall": (on("exclude_offsets", lambda t: t.flip(0)), "exclude_offsets"),
    "offsets beyond": (on("exclude_offsets", lambda t: t + 10**9), "exclude_offsets"),
    "offsets negative": (
        on("exclude_offsets", lambda t: t - torch.tensor([0, 9, 0, 0, 0])),
        "exclude_offsets",
    ),
}
RANGE_FAULTS: dict[str, tuple[Change, str]] = {
    "code too large": (on("prefix_codes", lambda t: t + 1), "prefix_codes"),
    "code negative": (on("prefix_codes", lambda t: t - 1), "prefix_codes"),
}
CPU_FAULTS = {
    "beam_decode": OFFSETS_FAULTS | ISA_FAULTS,
    "decode_states": OFFSETS_FAULTS | ISA_FAULTS,
    "context_readout": ISA_FAULTS,
    "level_logits": RANGE_FAULTS | ISA_FAULTS,
}


def assert_refused(
    name: str, backend: str, given: dict[str, Any], fault: tuple[Change, str]
) -> None:
    change, named = fault
    with pytest.raises(RuntimeError) as caught:
        call(name, backend, **(given | change(given)))
    message = str(caught.value).splitlines()[0]
    assert named in message, message
    assert "expected" in message, message


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in NAMES for fault in FAULTS[name]]
)
def test_a_call_that_does_not_fit(
    backend: str, device: torch.device, name: str, fault: str
) -> None:
    assert_refused(name, backend, arguments(name, device), FAULTS[name][fault])


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in NAMES for fault in CPU_FAULTS[name]]
)
def test_a_call_that_the_cpu_alone_refuses(name: str, fault: str) -> None:
    assert_refused(name, "cpu", arguments(name), CPU_FAULTS[name][fault])


@pytest.mark.parametrize("name", NAMES)
def test_a_legal_call_of_the_table_runs(backend: str, device: torch.device, name: str) -> None:
    """So that a fault above fails for its own reason."""
    call(name, backend, **arguments(name, device))


def test_an_instruction_set_that_is_missing_is_named() -> None:
    present = set(host_library().build_info()["instruction_sets"])
    needs = {"avx2": "avx2", "avx512": "avx512f", "avx512bf16": "avx512bf16"}
    missing = [isa for isa, flag in needs.items() if flag not in present]
    if not missing:
        pytest.skip("this processor has every instruction set that the kernels know")
    given = arguments("context_readout") | {"isa": ISAS.index(missing[0])}
    with pytest.raises(RuntimeError, match="instruction set"):
        call("context_readout", **given)
