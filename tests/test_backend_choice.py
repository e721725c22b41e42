"""What backend="auto" takes on a GPU, and that it says why; no GPU is needed."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from small_recommender import make_catalogue, make_states, make_student

import sidmlp_kernels as sk
from sidmlp_kernels import backends, doctor
from sidmlp_kernels.spec import PUBLISHED

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H200 to choose for, with both backends built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backends.library, "load", lambda name: "")
    return monkeypatch


def choose(
    name: str = "auto", dtype: torch.dtype = torch.bfloat16, beams: int = 50, **sizes: Any
) -> backends.Choice:
    spec = dataclasses.replace(PUBLISHED, **sizes)
    return backends.resolve(name, dtype=dtype, spec=spec, num_beams=beams)


@pytest.mark.parametrize("hidden", [128, 512, 2048])
@pytest.mark.parametrize("dtype", HALF)
def test_tensor_cores_are_the_first_choice(gpu, dtype: torch.dtype, hidden: int) -> None:
    choice = choose(dtype=dtype, hidden_dim=hidden)
    assert (choice.backend.name, choice.device) == ("cuda", torch.device("cuda", 0))
    assert choice.reason == "by 'auto', its first choice"


PLAIN = [
    ({"beams": 513}, "num_beams: expected at most 512"),
    ({"codes_per_level": (8193,) * 3}, "codes_per_level: expected at most 8192"),
    ({"blocks_per_head": 2}, "blocks_per_head: expected 1"),
    ({"hidden_dim": 100}, "hidden_dim: expected a multiple of 32"),
    ({"dim": 72}, "dim: expected a multiple of 16"),
    (
        {"beams": 512, "codes_per_level": (8192,) * 8, "hidden_dim": 2048, "dim": 1024},
        "too wide for shared",
    ),
]


@pytest.mark.parametrize(("options", "named"), PLAIN)
@pytest.mark.parametrize("dtype", HALF)
def test_other_sizes_in_half_precision_get_triton(
    gpu, dtype: torch.dtype, options: dict[str, Any], named: str
) -> None:
    choice = choose(dtype=dtype, **options)
    assert choice.backend.name == "triton"
    assert choice.reason.startswith("by 'auto', since cuda: would take its plain kernel")
    assert named in choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(("options", "named"), PLAIN)
def test_float32_and_an_explicit_name_take_cuda_for_every_size(gpu, options, named: str) -> None:
    assert choose(dtype=torch.float32, **options).backend.name == "cuda"
    choice = choose("cuda", **options)
    assert (choice.backend.name, choice.reason) == ("cuda", "asked for")


def test_other_architectures_get_triton(gpu) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for dtype in (torch.float32, torch.bfloat16):
        choice = choose(dtype=dtype)
        assert choice.backend.name == "triton"
        assert "since cuda: it is built for compute capability 9.0" in choice.reason


def test_the_plain_kernel_where_triton_cannot(gpu) -> None:
    """And never the CPU in its place."""
    choice = choose(beams=1025)
    assert choice.backend.name == "cuda"
    assert choice.reason.startswith("by 'auto', though cuda: would take its plain kernel")
    assert choice.reason.endswith("triton: num_beams: expected at most 1024, got 1025")
    absent = {"triton": "triton cannot be imported"}
    gpu.setattr(backends.library, "load", lambda name: absent.get(name, ""))
    choice = choose(beams=513)
    assert choice.backend.name == "cuda"
    assert choice.reason.endswith("triton: triton cannot be imported")


def test_the_device_that_was_asked_for_decides(gpu) -> None:
    choice = backends.resolve("auto", "cpu", "bfloat16", spec=PUBLISHED, num_beams=513)
    assert choice.backend.name == "cpu"
    assert "cuda: it runs on cuda, not on cpu" in choice.reason


def test_triton_is_not_imported_to_choose_cuda(gpu) -> None:
    loaded: list[str] = []
    gpu.setattr(backends.library, "load", lambda name: loaded.append(name) or "")
    assert choose().backend.name == "cuda"
    assert loaded == ["cuda"]


def test_each_choice_is_logged_once_with_its_reason(gpu, caplog) -> None:
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sidmlp_kernels"):
        for beams in (50, 513, 50, 513):
            choose(beams=beams)
            choose("cuda", beams=beams)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "backend cuda on cuda:0 with torch.bfloat16 weights, chosen by 'auto', its first choice"
    )
    assert second.startswith("backend triton on cuda:0 with torch.bfloat16 weights, chosen by ")
    assert "num_beams" in second


def test_doctor_lists_kernels_and_choices(gpu) -> None:
    lines = list(doctor._backends())
    sizes = "published sizes, 50 beams"
    assert f"cuda, {sizes}, bfloat16: yes, tensor cores" in lines
    plain = "plain kernel (float32 weights: tensor cores would round them)"
    assert f"cuda, {sizes}, float32: yes, {plain}" in lines
    assert f"triton, {sizes}, float16: yes" in lines
    assert f"auto, {sizes}, bfloat16: cuda, chosen by 'auto', its first choice" in lines


def test_a_model_chooses_for_each_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two backends of the CPU, of which the first leaves more than 10 beams to the second."""
    cpu = next(backend for backend in backends.BACKENDS if backend.name == "cpu")

    def rather_not(sizes: backends.Sizes) -> str:
        return "is slow above 10 beams" if (sizes.num_beams or 0) > 10 else ""

    both = (
        dataclasses.replace(cpu, name="first", rather_not=rather_not),
        dataclasses.replace(cpu, name="second"),
    )
    monkeypatch.setattr(backends, "BACKENDS", both)
    made = []
    original = sk.served_model.make_plan

    def on_the_cpu(packed, snapshot, backend, **settings):
        plan = original(packed, snapshot, "cpu", **settings)
        made.append((backend, str(plan).splitlines()[1]))
        return plan

    monkeypatch.setattr(sk.served_model, "make_plan", on_the_cpu)
    states, mask = make_states()
    model = sk.Recommender(make_student(), make_catalogue())
    assert model.backend == "second", "of the default 50 beams"
    for beams in (5, 50):
        model.decode_states(states, mask, k=4, num_beams=beams)
    asked = sk.Recommender(make_student(), make_catalogue(), backend="first")
    asked.decode_states(states, mask, k=4, num_beams=50)
    assert made == [
        ("first", "chosen: by 'auto', its first choice"),
        ("second", "chosen: by 'auto', since first: is slow above 10 beams"),
        ("first", "chosen: asked for"),
    ]


def test_settings_that_nothing_runs_are_refused_when_they_are_used() -> None:
    model = sk.Recommender(make_student(), make_catalogue(), device="cpu")
    states, mask = make_states()
    wanted = (
        r"num_beams=70000\), got none \(.*; cpu: num_beams: expected at most 65536, got 70000\)"
    )
    with pytest.raises(ValueError, match=wanted):
        model.decode_states(states, mask, k=4, num_beams=70_000)
    assert model.decode_states(states, mask, k=4).counts.tolist() == [4] * 5
