"""The host side of the Triton backend, as far as it needs no GPU: loading and limits."""

from __future__ import annotations

import importlib.util
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from sidmlp_kernels import Recommender
from sidmlp_kernels.ops.triton import bound, launch
from sidmlp_kernels.plan import DecodePlan
from sidmlp_kernels.testing import make_problem


class SlowKernel:
    """Like Triton's CompiledKernel, `run` is there before `function`: loading takes a while."""

    def __init__(self) -> None:
        self.function: object = None
        self._run: object = None

    @property
    def run(self) -> object:
        if self._run is None:
            self._run = object()
            time.sleep(0.2)
            self.function = object()
        return self._run


def test_threads_that_load_at_once_get_a_loaded_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SlowKernel] = []

    def compile_kernel(*_: Any, **__: Any) -> SlowKernel:
        made.append(SlowKernel())
        return made[-1]

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    monkeypatch.setattr(launch, "_loaded", {})
    start = threading.Barrier(4)

    def load() -> object:
        start.wait()
        return launch._load("kernel", (), (), 8, 255, torch.device("cuda:0")).function

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(load) for _ in range(4)]]
    assert len(made) == 1
    assert found == [made[0].function] * 4
    assert found[0] is not None


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_beams": 2000, "num_items": 9000, "codes_per_level": (64,) * 3}, "num_beams"),
        ({"dim": 16400, "attention_dim": 16, "ffn_dim": 16, "num_heads": 1}, "dim"),
    ],
)
def test_sizes_beyond_the_limits_are_a_runtime_error(sizes: dict[str, Any], named: str) -> None:
    problem = make_problem(**sizes)
    plan = problem.plan("cpu")
    packed = problem.packed()
    arguments = (list(packed.readout), *plan._heads_catalogue, plan._decode_args)
    with pytest.raises(RuntimeError, match=named):
        bound.BoundPlan(*arguments, torch.device("cpu"))


def test_a_recommender_compiles_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` binds the very kernel that a call with aligned states then launches."""
    made: list[object] = []

    class Recorded:
        def __init__(self, kernel: object, *_: Any, **__: Any) -> None:
            made.append(kernel)

        def launch(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(bound, "BoundKernel", Recorded)
    problem = make_problem(batch=3, excluded=4)
    plan, packed = problem.plan("cpu"), problem.packed()
    arguments = (list(packed.readout), *plan._heads_catalogue, plan._decode_args)
    ours = bound.BoundPlan(*arguments, torch.device("cpu"))
    ours.decode.prepare()
    assert len(made) == 1
    ours.decode.decode_states(problem.states, problem.mask)
    ours.decode.decode_states(problem.states[:1], problem.mask[:1].clone())
    assert len(made) == 1
    prepared: list[DecodePlan] = []
    monkeypatch.setattr(DecodePlan, "prepare", lambda plan: prepared.append(plan))
    model = Recommender(problem.student, problem.catalogue, device="cpu")
    found = model.decode_states(problem.states, problem.mask, k=5, num_beams=10)
    assert len(prepared) == 1
    assert found.catalogue_version == prepared[0].snapshot.version
