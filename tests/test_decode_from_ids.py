"""`Recommender.decode(batch)` from token ids to items with each kind of encoder, on every backend,
against the float64 reference; checkpoints of both kinds; what the plan says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import module_of, reference_of, requests
from small_recommender import (
    T5,
    TOKENS,
    assert_bits,
    assert_same,
    make_catalogue,
    make_encoder,
    make_student,
    make_teacher,
    reference,
)
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp_kernels import Batch, backends, checkpoint

MLP = sk.MLPEncoderSpec(2, 3, 16, 24, TOKENS.vocab_size, TOKENS.max_length)
KINDS = ("t5", "mlp")


def encoder_of(kind: str) -> sk.T5Encoder | sk.MLPEncoder:
    module = make_encoder() if kind == "t5" else module_of(MLP)
    assert isinstance(module, (sk.T5Encoder, sk.MLPEncoder))
    return module


@torch.no_grad()
def exact_states(kind: str, batch: Batch) -> Tensor:
    """float64, by transformers or the reference; they share no code with the package."""
    ids, mask = batch.ids.cpu(), batch.mask.cpu()
    if kind == "mlp":
        return reference_of(MLP).double()(ids, mask)
    return make_teacher().double()(ids, attention_mask=mask).last_hidden_state


def make(kind: str, backend: str = "cpu", **options: Any) -> sk.Recommender:
    return sk.Recommender(
        make_student(),
        make_catalogue(),
        encoder_of(kind),
        backend=backend,
        tokens=TOKENS,
        **options,
    )


HISTORIES = [[100, 101, 102], [], [159, 130, 100, 140, 141, 142, 143], [120]]


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_the_references(backend: str, kind: str) -> None:
    model = make(kind, backend)
    batch = model.batch(HISTORIES)
    states = exact_states(kind, batch)
    for exclude in (None, [[100, 101], None, [130], []]):
        got = model.decode(batch, k=8, num_beams=15, exclude=exclude)
        wanted = reference(
            states, batch.mask.cpu(), model.catalogue, 8, 15, exclude=exclude or [[]] * 4
        )
        moved = {n: getattr(got, n).cpu() for n in ("items", "scores", "codes", "counts")}
        assert_same(dataclasses.replace(got, **moved), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_answered_alike_in_every_batch(backend: str, kind: str, dtype: str) -> None:
    options = {"encoder_form": "throughput"} if _is_fused(backend, kind, dtype) else {}
    if not options:
        pytest.skip(f"backend {backend} has no fused encoder of kind {kind} in {dtype}")
    model = make(kind, backend, dtype=dtype, **options)
    together = model.decode(model.batch(HISTORIES * 9), k=5, num_beams=12)
    for b, history in enumerate(HISTORIES):
        alone = model.decode(model.batch([history]), k=5, num_beams=12)
        for row in range(b, 36, 4):
            for name in ("items", "scores", "codes", "counts"):
                got = getattr(together, name)[row]
                assert torch.equal(got, getattr(alone, name)[0]), (b, row, name)


def _is_fused(backend: str, kind: str, dtype: str) -> bool:
    return not backends.encoder_why_not(backend, T5 if kind == "t5" else MLP, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_operator_has_the_bits_of_two(backend: str, kind: str, dtype: str) -> None:
    if not _is_fused(backend, kind, dtype):
        pytest.skip(f"backend {backend} has no fused encoder of kind {kind} in {dtype}")
    model = make(kind, backend, dtype=dtype)
    batch = model.batch(HISTORIES)
    plan = model._plan(8, None, None, None, None)
    assert plan.encoder is not None
    assert plan.joins_encoder == (backend != "triton")
    states = plan.encoder(batch.ids, batch.mask)
    excluded = [[100], [], [130], None]
    got = model.decode(batch, k=8, exclude=excluded)
    assert_bits(got, model.decode_states(states, batch.mask, k=8, exclude=excluded))


def test_a_plan_of_another_backend_than_the_encoders() -> None:
    """As "auto" may choose for other settings than the model's."""
    plan = make("mlp")._plan(8, None, None, None, None)
    assert plan.encoder is not None
    assert plan.joins_encoder
    other = dataclasses.replace(plan, encoder=dataclasses.replace(plan.encoder, backend="cuda"))
    assert not other.joins_encoder
    line = "encoder: encode_mlp on cuda, form by batch; its states are decoded on cpu"
    assert line in str(other)


def _fused_dtype(backend: str, kind: str) -> str:
    """One in which the backend fuses the encoder."""
    for dtype in ("float32", "bfloat16"):
        if _is_fused(backend, kind, dtype):
            return dtype
    pytest.skip(f"backend {backend} has no fused encoder of kind {kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_answers_as_pytorch(kind: str) -> None:
    fused, plain = make(kind), make(kind, encoder_form="torch")
    batch = fused.batch(HISTORIES)
    got, wanted = fused.decode(batch, k=8), plain.decode(batch, k=8)
    assert torch.equal(got.items, wanted.items)
    torch.testing.assert_close(got.scores, wanted.scores, rtol=1e-4, atol=1e-4)
    operator = {"t5": "encode_t5", "mlp": "encode_mlp"}[kind]
    assert f"encoder: {operator} on {fused.backend}, form by batch" in str(
        fused._plan(8, None, None, None, None)
    )
    assert "encoder: plain PyTorch (as asked for)" in str(plain._plan(8, None, None, None, None))


def test_the_plan_says_why_pytorch_encodes() -> None:
    deep = dataclasses.replace(T5, num_layers=9)
    model = sk.Recommender(
        make_student(), make_catalogue(), module_of(deep), backend="cpu", tokens=TOKENS
    )
    text = str(model._plan(8, None, None, None, None))
    assert "encoder: plain PyTorch (num_layers: expected at most 8, got 9)" in text
    with pytest.raises(ValueError, match=r"encoder_form: .*num_layers: expected at most 8, got 9"):
        sk.Recommender(
            make_student(),
            make_catalogue(),
            module_of(deep),
            tokens=TOKENS,
            encoder_form="throughput",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_ones_own_with_poison_in_its_padding(backend: str, kind: str) -> None:
    """Padding need not be a token for the operator; the model still refuses ids that are none."""
    model = make(kind, backend, dtype=_fused_dtype(backend, kind))
    batch = model.batch(HISTORIES)
    longer = torch.nn.functional.pad(batch.ids[:, :12], (0, 2), value=TOKENS.eos_id)
    mask = torch.nn.functional.pad(batch.mask[:, :12], (0, 2))
    wanted = model.decode(Batch(batch.ids[:, :12], batch.mask[:, :12]), k=5)
    assert_bits(model.decode(Batch(longer, mask), k=5), wanted)
    with pytest.raises(ValueError, match="batch: expected token ids"):
        model.decode(Batch(longer + 1, mask), k=5)


@pytest.mark.parametrize("form", ["auto", "torch"])
def test_more_tokens_than_positions_are_refused(form: str) -> None:
    model = make("mlp", encoder_form=form)
    ids = torch.ones(1, TOKENS.max_length + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"batch: expected at most 14 tokens a request.* got 15"):
        model.decode(Batch(ids, ids.bool()))
    longer = torch.ones(1, 400, dtype=torch.int64)  # T5 has a position bias for any distance
    make("t5", encoder_form=form).decode(Batch(longer, longer.bool()), k=2)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_one_graph(backend: str, kind: str) -> None:
    model = make(kind, backend, dtype=_fused_dtype(backend, kind))
    batch = model.batch(HISTORIES)

    def results() -> tuple[Tensor, ...]:
        found = model.decode(batch, k=5, num_beams=10)
        return found.items, found.scores, found.codes, found.counts

    wanted = results()  # the first call makes the plan, which no graph can hold
    compiled = torch.compile(results, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_the_encoder(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "model")
    entry = json.loads((tmp_path / "model" / "config.json").read_text())["encoder"]
    assert entry == {"kind": kind, **(T5 if kind == "t5" else MLP).to_dict()}
    loaded = sk.load(tmp_path / "model", backend="cpu")
    batch = model.batch(HISTORIES)
    assert_bits(loaded.decode(batch, k=5), model.decode(batch, k=5))
    found = checkpoint.load(tmp_path / "model").encoder
    assert found is not None
    ids, mask = requests(T5 if kind == "t5" else MLP, 2, 7)
    assert torch.equal(found(ids, mask), encoder_of(kind)(ids, mask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_roles": 4}, "expected num_roles=3"),
        ({"max_length": 5}, "expected max_length >= 14"),
        ({"dim": 24}, "expected dim=16"),
        ({"vocab_size": 9}, "expected vocab_size >= 21"),
    ],
)
def test_an_mlp_encoder_that_does_not_fit_the_student(
    changes: dict[str, int], message: str
) -> None:
    spec = dataclasses.replace(MLP, **changes)
    with pytest.raises(ValueError, match=f"encoder: {message}"):
        sk.Recommender(make_student(), make_catalogue(), module_of(spec), tokens=TOKENS)
