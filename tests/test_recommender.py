"""Recommender: the reference's answers from histories on, and how it chooses, plans and encodes."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from small_recommender import (
    ITEMS,
    SPEC,
    TOKENS,
    assert_bits,
    assert_same,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
    make_teacher,
    reference,
)
from torch import Tensor

import sidmlp_kernels as sk
from sidmlp.student import Student as ReferenceStudent
from sidmlp.student import StudentConfig
from sidmlp_kernels import backends
from sidmlp_kernels.serving_state import MAX_PLANS

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(scope="module")
def model(cpu_only: None) -> sk.Recommender:
    """With an encoder; tests do not change it."""
    return sk.Recommender(make_student(), make_catalogue(), make_encoder(), tokens=TOKENS)


@pytest.fixture
def bare() -> sk.Recommender:
    """Without an encoder; a test's own."""
    return sk.Recommender(make_student(), make_catalogue())


def test_from_histories_to_items_as_the_reference_with_transformers(model) -> None:
    histories = [[100, 101, 102], [], [159, 130, 100, 140, 141, 142, 143], [120]]
    exclude = [[100, 101], None, np.array([130, 7_000_000, 130]), []]
    batch = model.batch(histories)
    with torch.no_grad():
        states = make_teacher().double()(batch.ids, attention_mask=batch.mask).last_hidden_state
    for options in (
        {},
        {"temperatures": (0.7, 1.0, 2.0), "level_weights": (1.0, 0.5, 0.0)},
        {"normalisation": "codebook"},
    ):
        wanted = reference(states, batch.mask, model.catalogue, 8, 15, exclude=exclude, **options)
        got = model.decode(batch, k=8, num_beams=15, exclude=exclude, **options)
        assert_same(got, wanted)
        assert got.catalogue_version == model.catalogue.version
    assert got.items.dtype == torch.int64
    assert got.scores.dtype == torch.float32
    assert got.codes.dtype == got.counts.dtype == torch.int32


def test_long_exclusions_in_any_order(bare) -> None:
    """Operators search ids in ascending order; callers need not sort them."""
    states, mask = make_states()
    tensor = torch.arange(159, 103, -1).repeat(5, 1)
    for exclude in (
        [list(range(159, 103, -1))] * 5,
        tensor,
        [np.random.default_rng(b).permutation(np.arange(104, 160)) for b in range(5)],
    ):
        recs = bare.decode_states(states, mask, k=10, num_beams=500, exclude=exclude)
        assert recs.counts.tolist() == [4] * 5
        assert recs.items[:, :4].sort().values.tolist() == [[100, 101, 102, 103]] * 5
    assert tensor[0].tolist() == list(range(159, 103, -1)), "the caller's ids were changed"


def test_three_ways_to_decode_agree(model) -> None:
    batch = model.batch([[100, 101], [130]])
    states = model._encoder(batch.ids, batch.mask)
    with torch.no_grad():
        torch.testing.assert_close(
            states[batch.mask], make_encoder()(batch.ids, batch.mask)[batch.mask]
        )
    decoded = model.decode(batch, k=4, num_beams=9, exclude=[[101], [102]])
    from_states = model.decode_states(states, batch.mask, k=4, num_beams=9, exclude=[[101], [102]])
    assert_bits(decoded, from_states)
    student = ReferenceStudent(StudentConfig(**dataclasses.asdict(SPEC)))
    student.load_state_dict(dict(make_student().weights))
    with torch.no_grad():
        context = student.context(states, batch.mask)
    from_context = model.beam_decode(context, k=4, num_beams=9, exclude=[[101], [102]])
    assert torch.equal(from_context.items, decoded.items)
    torch.testing.assert_close(from_context.scores, decoded.scores, rtol=1e-4, atol=1e-4)


def test_fewer_items_than_asked_for_are_padded(bare) -> None:
    states, mask = make_states()
    recs = bare.decode_states(states, mask, k=80, num_beams=5_000)
    assert recs.counts.tolist() == [ITEMS] * 5
    assert (recs.items[:, ITEMS:] == -1).all()
    assert (recs.scores[:, ITEMS:] == -torch.inf).all()
    assert (recs.codes[:, ITEMS:] == -1).all()
    assert sorted(recs.items[0, :ITEMS].tolist()) == list(range(100, 160))


def test_inputs_need_not_be_contiguous_and_masked_states_are_not_read(bare) -> None:
    states, mask = make_states()
    wanted = bare.decode_states(states, mask, k=5)
    poisoned = states.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    strided = poisoned.transpose(0, 1).contiguous().transpose(0, 1)
    strided_mask = mask.T.contiguous().T
    assert not strided.is_contiguous()
    got = bare.decode_states(strided, strided_mask, k=5)
    assert_bits(got, wanted)
    assert not got.scores.requires_grad


def test_a_request_with_states_that_are_not_finite_fails_alone(bare) -> None:
    states, mask = make_states()
    mask[2, 1] = True
    wanted = bare.decode_states(states, mask, k=5)
    broken = states.clone()
    broken[2, 1, 3] = torch.inf
    got = bare.decode_states(broken, mask, k=5)
    assert got.counts.tolist() == [5, 5, 0, 5, 5]
    others = [0, 1, 3, 4]
    assert torch.equal(got.items[others], wanted.items[others])
    assert torch.equal(got.scores[others], wanted.scores[others])


def test_no_requests_and_no_tokens(model) -> None:
    recs = model.decode(model.batch([]), k=3)
    assert recs.items.shape == recs.scores.shape == (0, 3)
    assert recs.codes.shape == (0, 3, 3)
    empty = model.decode_states(torch.empty(2, 0, 16), torch.empty(2, 0, dtype=torch.bool), k=3)
    assert empty.counts.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32", torch.float32])
def test_dtypes_by_name_or_by_themselves(dtype) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), make_encoder(), dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    recs = model.decode(model.batch([[100], [120, 121]]), k=5)
    assert torch.isfinite(recs.scores).all()
    states, mask = make_states()
    for states_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert model.decode_states(states.to(states_dtype), mask, k=2).counts.tolist() == [2] * 5


def test_defaults_come_from_the_decode_spec() -> None:
    spec = sk.DecodeSpec((0.5, 1.0, 2.0), (1.0, 2.0, 1.0), 12, "codebook")
    model = sk.Recommender(make_student(), make_catalogue(), decode=spec)
    states, mask = make_states()
    wanted = sk.Recommender(make_student(), make_catalogue()).decode_states(
        states,
        mask,
        k=6,
        num_beams=12,
        temperatures=[0.5, 1.0, 2.0],
        level_weights=torch.tensor([1.0, 2.0, 1.0]),
        normalisation="codebook",
    )
    assert_bits(model.decode_states(states, mask, k=6), wanted)
    with pytest.raises(ValueError, match="k: expected at most num_beams=12, got 13"):
        model.decode_states(states, mask, k=13)


def test_any_callable_encodes() -> None:
    calls = []

    def encoder(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append((ids, mask))
        return torch.ones(*ids.shape, 16)

    model = sk.Recommender(make_student(), make_catalogue(), encoder=encoder, tokens=TOKENS)
    batch = model.batch([[100], []])
    recs = model.decode(batch, k=3)
    assert calls[0][0] is batch.ids
    assert calls[0][1] is batch.mask
    assert_bits(recs, model.decode_states(torch.ones(2, 5, 16), batch.mask, k=3))


def test_the_model_keeps_its_own_encoder() -> None:
    encoder = make_encoder()
    model = sk.Recommender(make_student(), make_catalogue(), encoder, tokens=TOKENS)
    batch = model.batch([[100, 101]])
    before = model.decode(batch, k=5)
    with torch.no_grad():
        encoder.embed_tokens.weight.zero_()
    assert_bits(model.decode(batch, k=5), before)
    assert encoder.training is False
    assert encoder.embed_tokens.weight.dtype == torch.float32


def test_plans_are_made_once_bounded_and_ready_after_a_swap(bare, monkeypatch) -> None:
    made = []
    original = sk.served_model.make_plan

    def counting(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(sk.served_model, "make_plan", counting)
    states, mask = make_states()
    for _ in range(3):
        bare.decode_states(states, mask, k=4)
        bare.decode_states(states, mask, k=np.int64(4), num_beams=50, temperatures=[1, 1, 1])
    assert len(made) == 1
    bare.decode_states(states, mask, k=4, normalisation="codebook")
    assert len(made) == 2
    bare.swap(make_catalogue(seed=2))
    assert len(made) == 4
    bare.decode_states(states, mask, k=4)
    assert len(made) == 4
    for k in range(1, MAX_PLANS + 2):
        bare.decode_states(states, mask, k=k)
    assert len(bare._state.plans.settings()) == MAX_PLANS
    made.clear()
    bare.decode_states(states, mask, k=MAX_PLANS + 1)
    assert not made
    bare.decode_states(states, mask, k=4, normalisation="codebook")  # long unused: dropped
    assert len(made) == 1


def test_auto_logs_its_choice_once(caplog) -> None:
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sidmlp_kernels"):
        for _ in range(2):
            model = sk.Recommender(make_student(), make_catalogue())
        sk.Recommender(make_student(), make_catalogue(), backend=model.backend)
    assert [record.getMessage() for record in caplog.records] == [
        f"backend {model.backend} on {model.device} with {model.dtype} weights, chosen by 'auto', "
        "its first choice"
    ]
