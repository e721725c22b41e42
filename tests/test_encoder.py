"""The T5 encoder in plain PyTorch against transformers' T5EncoderModel, in fp64 and below."""

from __future__ import annotations

import pytest
import torch
from encoders import T5_SPECS as SPECS
from encoders import ours_of, requests, teacher_of
from transformers.models.t5.modeling_t5 import T5Attention

from sidmlp_kernels.encoder import T5Encoder, relative_buckets
from sidmlp_kernels.spec import T5Spec


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 82), (2, 300)])
def test_states_equal_transformers_in_fp64(name: str, batch: int, length: int) -> None:
    spec = SPECS[name]
    teacher = teacher_of(spec)
    ours = ours_of(spec, teacher).double()
    ids, mask = requests(spec, batch, length)
    with torch.no_grad():
        wanted = teacher.double()(input_ids=ids, attention_mask=mask).last_hidden_state
        got = ours(ids, mask)
    assert got.dtype == torch.float64
    # transformers keeps RMSNorm's variance in fp32 even here, so agreement ends at fp32's rounding.
    torch.testing.assert_close(got[mask], wanted[mask], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_error_is_at_most_twice_transformers_in_the_same_dtype(name: str) -> None:
    spec = SPECS[name]
    teacher = teacher_of(spec)
    ids, mask = requests(spec, 4, 37)
    with torch.no_grad():
        exact = ours_of(spec, teacher).double()(ids, mask)[mask]
        for dtype in (torch.float32, torch.bfloat16):
            ours = ours_of(spec, teacher).to(dtype)(ids, mask)[mask]
            yardstick = teacher_of(spec).to(dtype)(input_ids=ids, attention_mask=mask)
            theirs = yardstick.last_hidden_state[mask]
            assert ours.dtype == dtype
            error = (ours.double() - exact).abs().max().item()
            bound = 2 * (theirs.double() - exact).abs().max().item() + torch.finfo(dtype).eps
            assert error <= bound, f"{name} {dtype}: error {error}, bound {bound}"


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (6, 9), (4, 2), (64, 20), (32, 1000)])
def test_buckets_equal_the_trained_ones(buckets: int, distance: int) -> None:
    length = 400
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    wanted = T5Attention._relative_position_bucket(
        offset, bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    assert torch.equal(relative_buckets(length, buckets, distance), wanted)


def test_padding_changes_nothing() -> None:
    spec = SPECS["relu, two layers"]
    ours = ours_of(spec, teacher_of(spec)).double()
    ids, mask = requests(spec, 1, 12)
    longer = torch.cat([ids, torch.full((1, 9), 5)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(1, 9, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        alone, padded = ours(ids, mask), ours(longer, longer_mask)[:, :12]
    torch.testing.assert_close(alone, padded, rtol=1e-12, atol=1e-12)


def test_empty_batch_and_request_without_tokens() -> None:
    spec = SPECS["relu, two layers"]
    ours = ours_of(spec, teacher_of(spec))
    with torch.no_grad():
        empty = ours(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bool))
        unmasked = ours(torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.bool))
    assert empty.shape == (0, 5, spec.dim)
    assert torch.isfinite(unmasked).all()


def test_fp16_residual_does_not_overflow() -> None:
    """A residual of 60000 + 16000 is beyond fp16, but its norm is 1."""
    spec = T5Spec(1, 16, 2, 8, 24, 30)
    weights = dict(teacher_of(spec).encoder.state_dict())
    attention = "block.0.layer.0.SelfAttention"
    weights["embed_tokens.weight"] = torch.full((30, 16), 6e4)
    weights["block.0.layer.0.layer_norm.weight"] = torch.ones(16)
    weights[f"{attention}.v.weight"] = torch.full((16, 16), 1 / 16)
    weights[f"{attention}.o.weight"] = torch.full((16, 16), 1e3)
    weights["final_layer_norm.weight"] = torch.ones(16)
    ids, mask = requests(spec, 2, 6)
    with torch.no_grad():
        states = T5Encoder.from_weights(spec, weights).half()(ids, mask)
    assert states.dtype == torch.float16
    torch.testing.assert_close(states, torch.ones_like(states), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("final_layer_norm.weight"), "missing final_layer_norm.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unknown extra"),
        (
            lambda w: w.update({"embed_tokens.weight": torch.ones(3, 48)}),
            r"embed_tokens.weight expected shape \[91, 48\], got \[3, 48\]",
        ),
        (
            lambda w: w["block.1.layer.1.DenseReluDense.wo.weight"].fill_(float("nan")),
            "block.1.layer.1.DenseReluDense.wo.weight expected finite",
        ),
    ],
)
def test_bad_weights_are_named(damage, message: str) -> None:
    spec = SPECS["relu, two layers"]
    weights = dict(teacher_of(spec).encoder.state_dict())
    damage(weights)
    with pytest.raises(ValueError, match=message):
        T5Encoder.from_weights(spec, weights)
