"""Host memory for copies: pinned for a GPU, ordinary with one warning where none can be had."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from captured_graphs import CYCLES
from request_models import ASK, capture, histories_of, make_fused
from small_recommender import assert_bits

from sidmlp_kernels import host_memory
from sidmlp_kernels.host_memory import Mark

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_pinned_and_nothing_waits() -> None:
    made = host_memory.host_memory((3, 4), torch.int32, CPU)
    assert (made.shape, made.dtype) == ((3, 4), torch.int32)
    assert not made.is_pinned()
    mark = Mark(CPU)
    mark.wait()
    mark.record()
    mark.wait()


@pytest.fixture
def none_to_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand advice on debugging")
        return right(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(host_memory, "_warned", False)


def test_without_memory_to_lock_it_is_ordinary_and_says_so_once(
    none_to_lock: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sidmlp_kernels"):
        for _ in range(3):
            made = host_memory.host_memory((5,), torch.int64, torch.device("cuda"))
            assert made.device == CPU
    assert [record.getMessage() for record in caplog.records] == [
        "no page-locked memory (CUDA error: out of memory): copies to and from the GPU wait for "
        "their end; raise the limit of locked memory (ulimit -l) or that of the container"
    ]


@pytest.mark.parametrize(
    "words", ["CUDA error: an illegal memory access was encountered", "No CUDA GPUs are available"]
)
def test_other_errors_are_not_about_memory(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def empty(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(RuntimeError, match=words):
        host_memory.host_memory((5,), torch.int64, torch.device("cuda"))


def test_on_a_gpu(cuda: torch.device) -> None:
    made = host_memory.host_memory((5,), torch.int64, cuda)
    assert made.is_pinned()
    mark = Mark(cuda)
    there = torch.zeros(5, dtype=torch.int64, device=cuda)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    there.fill_(7)
    made.copy_(there, non_blocking=True)
    mark.record()
    assert not torch.cuda.current_stream().query(), "the copy waited"
    mark.wait()
    assert made.tolist() == [7] * 5


def test_answers_are_right_without_memory_to_lock(cuda: torch.device, none_to_lock: None) -> None:
    model = make_fused("cuda")
    histories = histories_of(model, 5)
    batch = model.batch(histories)
    assert batch.ids.device.type == "cuda"
    wanted = model.decode(batch, **ASK).cpu()
    assert_bits(next(model.decode_stream([histories], **ASK)), wanted)
    graphs = capture(model, batch_sizes=(5,), max_excluded=3)
    assert_bits(graphs.recommend(histories), wanted)
    best = [row[:3] for row in wanted.item_lists()]
    excluded = model.decode(batch, **ASK, exclude=best).cpu()
    assert_bits(graphs.recommend(histories, exclude=best), excluded)
