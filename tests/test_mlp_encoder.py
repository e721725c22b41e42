"""SID-MLP++'s encoder in plain PyTorch: the reference against its equations, the package's module
against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from encoders import MLP_SPECS, module_of, reference_of, requests
from torch import Tensor

from sidmlp.mlp_encoder import MLPEncoder as ReferenceMLPEncoder
from sidmlp.mlp_encoder import MLPEncoderConfig, roles_of
from sidmlp_kernels import MLPEncoder


def by_hand(model: ReferenceMLPEncoder, ids: list[int]) -> Tensor:
    """States of one request without padding, token by token, float64."""
    config, w = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean()
        scale = torch.sqrt((centred * centred).mean() + config.layer_norm_eps)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    rows = [
        w["embed_tokens.weight"][token] + w["embed_positions.weight"][t]
        for t, token in enumerate(ids)
    ]
    for layer in range(config.num_layers):
        mean = sum(rows) / len(rows)
        after = []
        for t, row in enumerate(rows):
            first_or_last = t in (0, len(rows) - 1)
            role = config.num_roles - 1 if first_or_last else (t - 1) % config.num_roles
            at = f"layers.{layer}.roles.{role}"
            hidden = w[f"{at}.linear_in.weight"] @ torch.cat([row, mean])
            hidden = norm(hidden + w[f"{at}.linear_in.bias"], f"{at}.norm")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            out = w[f"{at}.linear_out.weight"] @ hidden + w[f"{at}.linear_out.bias"]
            after.append(row + out)
        rows = after
    return torch.stack([norm(row, "final_layer_norm") for row in rows])


@pytest.mark.parametrize("name", MLP_SPECS)
@pytest.mark.parametrize("length", [1, 2, 6, 14])
def test_the_reference_is_its_equations(name: str, length: int) -> None:
    spec = MLP_SPECS[name]
    model = reference_of(spec).double()
    ids = [(7 * t + 3) % spec.vocab_size for t in range(length)]
    mask = torch.tensor([[True] * length + [False] * 3])
    padded = torch.tensor([[*ids, 2**40, -1, 5]])  # padding is no index
    got = model(padded, mask)
    torch.testing.assert_close(got[0, :length], by_hand(model, ids), rtol=1e-12, atol=1e-12)
    assert (got[0, length:] == 0).all()


def test_roles_are_levels_but_for_the_first_and_the_last_valid_token() -> None:
    full = torch.ones(1, 8, dtype=torch.bool)
    assert roles_of(full, 3).tolist() == [[2, 0, 1, 2, 0, 1, 2, 2]]
    short = torch.tensor([[True] * 6 + [False] * 2])
    assert roles_of(short, 3)[0, :6].tolist() == [2, 0, 1, 2, 0, 2]
    hole = torch.tensor([[False, True, False, True, True, False, False, False]])
    assert roles_of(hole, 3)[hole].tolist() == [0, 2, 2]
    alone = torch.tensor([[False, True, False]])
    assert roles_of(alone, 3)[alone].tolist() == [2]


def test_the_reference_refuses_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="num_roles"):
        MLPEncoderConfig(1, 0, 4, 4, 4, 4)


@pytest.mark.parametrize("name", MLP_SPECS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (5, 82), (2, 300)])
def test_states_equal_the_reference_in_fp64(name: str, batch: int, length: int) -> None:
    spec = MLP_SPECS[name]
    ids, mask = requests(spec, batch, length)
    with torch.no_grad():
        wanted = reference_of(spec).double()(ids, mask)
        got = module_of(spec).double()(ids, mask)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got[mask], wanted[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MLP_SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_references_in_the_same_dtype(
    name: str, dtype: torch.dtype
) -> None:
    spec = MLP_SPECS[name]
    ids, mask = requests(spec, 4, 37)
    with torch.no_grad():
        exact = reference_of(spec).double()(ids, mask)[mask]
        theirs = reference_of(spec).to(dtype)(ids, mask)[mask]
        ours = module_of(spec).to(dtype)(ids, mask)[mask]
    assert ours.dtype == dtype
    error = (ours.double() - exact).abs().max().item()
    bound = 2 * (theirs.double() - exact).abs().max().item() + torch.finfo(dtype).eps
    assert error <= bound, f"{name} {dtype}: error {error}, bound {bound}"


def test_requests_without_tokens_and_empty_batches() -> None:
    spec = MLP_SPECS["four roles"]
    model = module_of(spec)
    with torch.no_grad():
        for batch, length in ((0, 5), (2, 0)):
            ids = torch.zeros(batch, length, dtype=torch.int64)
            assert model(ids, ids.bool()).shape == (batch, length, spec.dim)
        unmasked = torch.ones(1, 5, dtype=torch.int64)
        assert torch.isfinite(model(unmasked, torch.zeros(1, 5, dtype=torch.bool))).all()


def test_bad_weights_are_named() -> None:
    spec = MLP_SPECS["four roles"]
    weights = dict(reference_of(spec).state_dict())
    weights.pop("layers.1.roles.3.linear_in.bias")
    weights["embed_positions.weight"] = torch.ones(3, 24)
    with pytest.raises(ValueError, match=r"missing layers.1.roles.3.linear_in.bias") as caught:
        MLPEncoder.from_weights(spec, weights)
    assert "embed_positions.weight expected shape [300, 24], got [3, 24]" in str(caught.value)
