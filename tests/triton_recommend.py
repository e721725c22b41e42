"""A call of `recommend` on Triton, with the parts that it consists of: for tests on a GPU and in
the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from encoders import module_of, requests
from torch import Tensor

from sidmlp_kernels import MLPEncoderSpec, T5Spec
from sidmlp_kernels.encoder_plan import plan_encoder
from sidmlp_kernels.ops import operator
from sidmlp_kernels.testing import exclude_tensors, make_problem

SPECS: dict[str, T5Spec | MLPEncoderSpec] = {
    "encode_t5": T5Spec(1, 24, 2, 12, 40, 30),
    "encode_mlp": MLPEncoderSpec(1, 3, 24, 32, 30, 16),
}


@dataclass
class Call:
    """ids and mask, then what `recommend` takes: the encoder's arguments and the decode's."""

    ids: Tensor
    mask: Tensor
    encode: tuple[Any, ...]
    decode: tuple[Any, ...]

    def recommend(self) -> tuple[Tensor, ...]:
        """By the one operator."""
        return operator("recommend", "triton")(self.ids, self.mask, *self.encode, *self.decode)

    def in_two(self, name: str) -> tuple[Tensor, ...]:
        """By encoder `name` and decode_states."""
        states = operator(name, "triton")(self.ids, self.mask, *self.encode, 0)
        return operator("decode_states", "triton")(states, self.mask, *self.decode)


def make_call(name: str, device: torch.device | str, dtype: torch.dtype) -> Call:
    """A legal call with encoder `name`, exclusions and padding in it."""
    spec = SPECS[name]
    place = torch.device(device)
    encoder = plan_encoder(module_of(spec), "triton", place, dtype)
    problem = make_problem(
        (5, 4, 6), seed=1, dim=24, hidden_dim=20, num_items=80, batch=2, excluded=5
    )
    plan = problem.plan("triton", dtype=dtype, device=place)
    ids, mask = (t.to(place) for t in requests(spec, problem.batch, 11))
    excluded = exclude_tensors(problem.exclude, place)
    decode = (plan._readout, *plan._heads_catalogue, *excluded, *plan._decode_args)
    return Call(ids, mask, encoder.operator_args(), decode)


def check(name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """AssertionError unless `recommend` has the bits of its two parts, and unless an id that is
    none costs its own request alone."""
    call = make_call(name, device, dtype)
    got, wanted = call.recommend(), call.in_two(name)
    for have, want in zip(got, wanted, strict=True):
        assert torch.equal(have, want)
    assert int(wanted[3].min()) > 0
    call.ids[1, 0] = -5
    counts = wanted[3].clone()
    counts[1] = 0
    assert torch.equal(call.recommend()[3], counts)
