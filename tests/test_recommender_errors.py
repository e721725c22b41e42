"""Recommender given what is wrong: settings, tensors, parts, weights, backends; each named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_recommender import (
    SPEC,
    T5,
    TOKENS,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
)

import sidmlp_kernels as sk
from sidmlp_kernels import backends

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(scope="module")
def model(cpu_only: None) -> sk.Recommender:
    """With an encoder; tests do not change it."""
    return sk.Recommender(make_student(), make_catalogue(), make_encoder(), tokens=TOKENS)


def test_a_model_without_encoder_says_so() -> None:
    bare = sk.Recommender(make_student(), make_catalogue())
    with pytest.raises(ValueError, match="batch: expected a model with an encoder"):
        bare.batch([[100]])
    batch = sk.Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="decode: expected a model with an encoder"):
        bare.decode(batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer >= 1, got 0"),
        ({"k": -1}, "k: expected"),
        ({"k": 11, "num_beams": 10}, "k: expected at most num_beams=10, got 11"),
        ({"k": 51}, "k: expected at most num_beams=50, got 51"),
        ({"k": 2.0}, "k: expected an integer >= 1, got 2.0"),
        ({"k": True}, "k: expected an integer >= 1, got True"),
        ({"k": None}, "k: expected"),
        ({"k": "3"}, "k: expected"),
        ({"num_beams": 0}, "num_beams: expected"),
        ({"num_beams": 20.0}, "num_beams: expected an integer >= 1, got 20.0"),
        ({"num_beams": 10**6}, "num_beams: expected at most 65536, got 1000000"),
        ({"temperatures": [1.0, 1.0]}, "temperatures: expected 3 numbers, one per level, got 2"),
        ({"temperatures": [1.0, 0.0, 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": [1.0, -2.0, 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": [1.0, float("nan"), 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": 1.0}, "temperatures: expected 3 numbers"),
        ({"temperatures": "abc"}, "temperatures: expected"),
        ({"level_weights": [1.0, float("inf"), 1.0]}, r"level_weights\[1\]: expected"),
        ({"level_weights": [1.0] * 4}, "level_weights: expected 3 numbers"),
        ({"normalisation": "softmax"}, "normalisation: expected 'children' or 'codebook'"),
        ({"normalisation": ["children"]}, "normalisation: expected"),
        ({"exclude": [[100]]}, "exclude: expected one sequence .* per request, 5, got 1"),
        ({"exclude": [100] * 5}, r"exclude\[0\]: expected a sequence of item ids, got 100"),
        ({"exclude": [[], [], [1.5], [], []]}, r"exclude\[2\]: expected integers"),
        ({"exclude": [[], [], "12", [], []]}, r"exclude\[2\]: expected"),
        ({"exclude": 7}, "exclude: expected one sequence of item ids per request"),
        ({"exclude": torch.ones(5, 2)}, "exclude: expected integers"),
    ],
)
def test_wrong_settings(model, arguments, message: str) -> None:
    states, mask = make_states()
    with pytest.raises(ValueError, match=message):
        model.decode_states(states, mask, **arguments)
    with pytest.raises(ValueError, match=message):
        model.decode(model.batch([[100]] * 5), **arguments)
    with pytest.raises(ValueError, match=message):
        model.beam_decode(torch.zeros(5, 16), **arguments)


STATES, MASK = make_states()


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (STATES[0], MASK[0], r"encoder_states: expected .*\[batch, tokens, 16\].* got"),
        (STATES[..., :15], MASK, r"encoder_states: .*got torch.float32 \[5, 6, 15\]"),
        (STATES.double(), MASK, "encoder_states: expected a torch.float32 or .*got torch.float64"),
        (STATES.long(), MASK, "encoder_states: .*got torch.int64"),
        (STATES.numpy(), MASK, "encoder_states: .*got ndarray"),
        (None, MASK, "encoder_states: .*got NoneType"),
        (STATES.to("meta"), MASK, "encoder_states: .* on cpu, got .* on meta"),
        (STATES, MASK[:4], r"mask: expected a torch.bool tensor \[5, 6\] on cpu, got .*\[4, 6\]"),
        (STATES, MASK[:, :5], "mask: expected"),
        (STATES, MASK[..., None], "mask: expected"),
        (STATES, MASK.long(), "mask: expected a torch.bool tensor .*got torch.int64"),
        (STATES, MASK.float(), "mask: expected"),
        (STATES, MASK.to("meta"), "mask: .*on cpu, got .* on meta"),
        (STATES, None, "mask: .*got NoneType"),
    ],
)
def test_wrong_states_and_masks(model, states, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode_states(states, mask)


@pytest.mark.parametrize(
    "context",
    [torch.zeros(16), torch.zeros(2, 15), torch.zeros(2, 16).bfloat16(), [[0.0] * 16], None],
)
def test_wrong_contexts(model, context) -> None:
    with pytest.raises(ValueError, match=r"context: expected a torch.float32 tensor \[batch, 16\]"):
        model.beam_decode(context)


def test_wrong_batches_and_encoder_results(model) -> None:
    for batch in ([[1, 2]], None, (torch.zeros(1, 2), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="batch: expected a Batch, got"):
            model.decode(batch)
    with pytest.raises(ValueError, match="batch: expected tensors on cpu, got meta"):
        model.decode(model.batch([[100]]).to("meta"))
    for result in (torch.zeros(1, 5, 8), torch.zeros(1, 4, 16), None, (torch.zeros(1, 5, 16),)):
        other = sk.Recommender(make_student(), make_catalogue(), encoder=lambda *_, r=result: r)
        with pytest.raises(ValueError, match=r"(encoder_states|mask): expected"):
            other.decode(other.batch([[100]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": {}}, "student: expected a Student, got dict"),
        ({"catalogue": [[0, 1, 2]]}, "catalogue: expected a Catalogue, got list"),
        ({"encoder": "t5"}, "encoder: expected None, a T5Encoder, an MLPEncoder or a callable"),
        ({"tokens": {}}, "tokens: expected a TokenSpec, got dict"),
        ({"decode": {}}, "decode: expected a DecodeSpec, got dict"),
        ({"tokens": sk.TokenSpec.for_codes((6, 5))}, "code_offsets: expected 3 levels"),
        ({"decode": sk.DecodeSpec.for_levels(2)}, "decode: expected temperatures for 3 levels"),
        ({"catalogue": sk.Catalogue.from_codes([[0, 1]])}, "catalogue: expected 3 levels"),
        ({"catalogue": sk.Catalogue.from_codes([[0, 5, 0]])}, "catalogue: expected 3 levels"),
        ({"encoder": sk.T5Encoder(sk.T5Spec(1, 8, 2, 4, 8, 99))}, "encoder: expected dim=16"),
        ({"encoder": sk.T5Encoder(sk.T5Spec(1, 16, 2, 4, 8, 9))}, "encoder: expected vocab_size"),
        ({"dtype": "float64"}, "dtype: expected one of float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype: expected"),
        ({"dtype": torch.int32}, "dtype: expected"),
        ({"dtype": None}, "dtype: expected"),
        ({"backend": "tpu"}, "backend: expected .*'cpu'.* got 'tpu'"),
        ({"backend": None}, "backend: expected"),
        ({"device": "gpu"}, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"device": 3.5}, "device: expected"),
        ({"device": "meta"}, "backend: expected one that can run .*not on meta"),
        ({"device": "meta", "backend": "cpu"}, "got none .cpu: it runs on cpu, not on meta"),
    ],
)
def test_wrong_parts(arguments, message: str) -> None:
    usual = {"student": make_student(), "catalogue": make_catalogue()}
    with pytest.raises(ValueError, match=message):
        sk.Recommender(**(usual | arguments))


def test_weights_that_overflow_in_fp16_are_named() -> None:
    weights = dict(make_student().weights)
    name = "heads.1.blocks.1.linear.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = 1e5
    student = sk.Student(SPEC, weights)
    with pytest.raises(ValueError, match=rf"{name}.*got 100000; use dtype=.bfloat16."):
        sk.Recommender(student, make_catalogue(), dtype="float16")
    sk.Recommender(student, make_catalogue(), dtype="bfloat16")
    state = dict(make_encoder().state_dict())
    state["final_layer_norm.weight"] = torch.full((16,), -7e4)
    encoder = sk.T5Encoder.from_weights(T5, state)
    with pytest.raises(ValueError, match=r"encoder weights: .*final_layer_norm.weight.*-70000"):
        sk.Recommender(make_student(), make_catalogue(), encoder, dtype="float16")


def test_an_encoder_that_is_not_finite_is_refused() -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.embed_tokens.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"embed_tokens.weight expected finite"):
        sk.Recommender(make_student(), make_catalogue(), encoder)


def test_backends_give_reasons() -> None:
    assert "cpu" in sk.available_backends()
    assert sk.why_not("cpu", SPEC, dtype="bfloat16", num_beams=512) == ""
    wide = dataclasses.replace(SPEC, hidden_dim=2**21)
    assert sk.why_not("cpu", wide) == "hidden_dim: expected at most 1048576, got 2097152"
    with pytest.raises(ValueError, match=r"backend: expected .*'cpu'"):
        sk.why_not("tpu")


def test_a_library_that_is_not_built_is_a_reason(monkeypatch) -> None:
    reason = "libsidmlp_cpu.so is not built; build it"
    monkeypatch.setattr(backends.library, "load", lambda name: reason)
    assert "cpu" not in sk.available_backends()
    assert sk.why_not("cpu") == reason
    for backend in ("cpu", "auto"):
        with pytest.raises(ValueError, match=rf"got none .*cpu: {reason}"):
            sk.Recommender(make_student(), make_catalogue(), backend=backend, device="cpu")
