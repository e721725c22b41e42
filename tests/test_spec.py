"""The specs check themselves, print themselves and survive JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidmlp_kernels.spec import (
    DecodeSpec,
    StudentSpec,
    T5Spec,
    TokenSpec,
    check_float,
    check_floats,
    check_int,
)

STUDENT = StudentSpec((5, 7), 12, 16, 4, 20, 10, 12)
TOKENS = TokenSpec.for_codes((5, 7), num_user_tokens=3, max_items=4)
T5 = T5Spec(2, 12, 4, 8, 20, 40, "gated-gelu")
DECODE = DecodeSpec((1.0, 0.5), (1.0, -2.0), 10, "codebook")


@pytest.mark.parametrize("spec", [STUDENT, TOKENS, T5, DECODE], ids=lambda s: type(s).__name__)
def test_json_round_trip_and_named_fields(spec) -> None:
    values = json.loads(json.dumps(spec.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(spec)}
    assert type(spec).from_dict(values) == spec
    for name in values:
        fewer = {k: v for k, v in values.items() if k != name}
        with pytest.raises(ValueError, match=rf"missing \['{name}'\] and unknown \[\]"):
            type(spec).from_dict(fewer)
    with pytest.raises(ValueError, match=r"missing \[\] and unknown \['colour'\]"):
        type(spec).from_dict(values | {"colour": 1})
    with pytest.raises(ValueError, match="expected an object of named fields, got list"):
        type(spec).from_dict([1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, next(iter(values)), 1)
    assert hash(spec) == hash(type(spec).from_dict(values))


def test_defaults_are_those_of_the_papers() -> None:
    assert (STUDENT.blocks_per_head, STUDENT.layer_norm_eps) == (1, 1e-5)
    assert (T5Spec(1, 8, 1, 8, 8, 8).layer_norm_eps, T5.relative_buckets) == (1e-6, 32)
    assert T5.relative_max_distance == 128
    assert DecodeSpec.for_levels(3) == DecodeSpec((1.0,) * 3, (1.0,) * 3, 50, "children")
    tokens = TokenSpec.for_codes((256,) * 4)
    assert tokens.code_offsets == (1, 257, 513, 769)
    assert (tokens.pad_id, tokens.user_offset, tokens.num_user_tokens) == (0, 1025, 1)
    assert (tokens.eos_id, tokens.vocab_size, tokens.max_items) == (1026, 1027, 20)
    assert tokens.max_length == 82


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 30))
def test_the_usual_tokens_never_share_an_id(codes, users: int, max_items: int) -> None:
    tokens = TokenSpec.for_codes(codes, num_user_tokens=users, max_items=max_items)
    ids = [tokens.pad_id, tokens.eos_id]
    ids += [tokens.user_offset + u for u in range(users)]
    ids += [o + c for o, n in zip(tokens.code_offsets, codes, strict=True) for c in range(n)]
    assert sorted(ids) == list(range(tokens.vocab_size))
    tokens.check_codes(codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_per_level": ()}, r"codes_per_level: expected 1..8 levels, got 0"),
        ({"codes_per_level": (2,) * 9}, r"codes_per_level: expected 1..8 levels, got 9"),
        ({"codes_per_level": (5, 0)}, r"codes_per_level\[1\]: expected .* got 0"),
        ({"codes_per_level": (5, 32768)}, r"codes_per_level\[1\]: .*1..32767, got 32768"),
        ({"codes_per_level": (5, 7.0)}, r"codes_per_level\[1\]: expected an integer .* got 7.0"),
        ({"codes_per_level": 5}, "codes_per_level: expected one size per level, got 5"),
        ({"codes_per_level": "57"}, "codes_per_level: expected"),
        ({"dim": 0}, "dim: expected an integer >= 1, got 0"),
        ({"dim": True}, "dim: expected an integer >= 1, got True"),
        ({"hidden_dim": -3}, "hidden_dim: expected"),
        ({"hidden_dim": "10"}, "hidden_dim: expected an integer >= 1, got '10'"),
        ({"blocks_per_head": 0}, "blocks_per_head: expected"),
        ({"num_heads": 3}, "num_heads: expected a divisor of attention_dim=16, got 3"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps: expected a finite number > 0, .*got 0.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected"),
        ({"layer_norm_eps": None}, "layer_norm_eps: expected .* got None"),
    ],
)
def test_wrong_student_sizes(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDENT, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_offsets": ()}, "code_offsets: expected 1..8 offsets"),
        ({"code_offsets": (1, -1)}, r"code_offsets\[1\]: expected"),
        ({"user_offset": -1}, "user_offset: expected"),
        ({"num_user_tokens": 0}, "num_user_tokens: expected"),
        ({"max_items": 0}, "max_items: expected"),
        ({"eos_id": 15}, r"eos_id: expected the largest token id \(> 15\), got 15"),
        ({"pad_id": 99}, "eos_id: expected the largest"),
    ],
)
def test_wrong_tokens(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOKENS, **change)


def test_tokens_that_collide_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"codes of level 1 \(up to 5\) overlapping codes of level 2"
    ):
        TokenSpec((1, 5), 20, 30).check_codes((5, 7))
    with pytest.raises(ValueError, match="overlapping user tokens"):
        TokenSpec((1, 6), 12, 30).check_codes((5, 7))
    with pytest.raises(ValueError, match="pad"):
        TokenSpec((0, 6), 20, 30).check_codes((5, 7))
    with pytest.raises(ValueError, match=r"eos"):
        TokenSpec((1, 21), 10, 30).check_codes((5, 70))
    with pytest.raises(ValueError, match="expected 3 levels as in the student, got 2"):
        TOKENS.check_codes((5, 7, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected"),
        ({"feed_forward": "swish"}, "feed_forward: expected 'relu' or .* got 'swish'"),
        ({"relative_buckets": 7}, "relative_buckets: expected an even number"),
        ({"relative_buckets": 2}, "relative_buckets: expected an integer >= 4"),
        ({"relative_max_distance": 8}, "relative_max_distance: expected an integer >= 9"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: expected"),
    ],
)
def test_wrong_encoder_sizes(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(T5, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected"),
        ({"normalisation": "softmax"}, "normalisation: expected 'children' or 'codebook'"),
        ({"normalisation": None}, "normalisation: expected"),
        (
            {"temperatures": (1.0, 0.0)},
            r"temperatures\[1\]: expected a finite number > 0, .*got 0.0",
        ),
        ({"temperatures": (1.0, float("inf"))}, r"temperatures\[1\]: expected"),
        ({"temperatures": (1e-60, 1.0)}, r"temperatures\[0\]: expected .*float32"),
        ({"level_weights": (1e39, 1.0)}, r"level_weights\[0\]: expected .*float32"),
        ({"temperatures": 1.0}, "temperatures: expected one number per level, got 1.0"),
        ({"temperatures": ()}, "length of temperatures: expected"),
        ({"level_weights": (1.0,)}, "level_weights: expected 2 numbers, one per level, got 1"),
        ({"level_weights": (1.0, float("nan"))}, r"level_weights\[1\]: expected a finite number"),
        ({"level_weights": (1.0, "2")}, r"level_weights\[1\]: expected a finite number, got '2'"),
    ],
)
def test_wrong_decode_settings(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DECODE, **change)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    assert check_int(np.int32(3), "k", low=1) == 3
    assert check_float(np.float32(0.5), "t", positive=True) == 0.5
    assert check_floats(np.array([1, 2], np.float32), "w", length=2) == (1.0, 2.0)
    assert check_floats(torch.tensor([1.0, -2.0]), "w", length=2) == (1.0, -2.0)
    assert StudentSpec(np.array([5, 7]), 12, 16, 4, 20, 10, 12) == STUDENT
