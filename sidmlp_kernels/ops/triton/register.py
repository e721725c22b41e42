"""Implementations of `torch.ops.sidmlp.X_triton`: bind, call once.

A plan keeps what is bound (sidmlp_kernels.plan); an operator called by itself, as from
torch.compile or torch.export, checks and binds at each call, which costs the host more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sidmlp_kernels.ops.library import TRITON_SUFFIX, Results
from sidmlp_kernels.ops.triton import encoder_bound
from sidmlp_kernels.ops.triton.bound import BoundDecode, BoundLogits, BoundReadout
from sidmlp_kernels.ops.triton.encoder_problem import check_form
from sidmlp_kernels.ops.triton.launch import INTERPRETED
from sidmlp_kernels.ops.triton.problem import check_launches

_NUM_SETTINGS = 6  # k, num_beams, codebook, temperatures, level_weights, level_modes


def _device(first: Tensor, name: str) -> torch.device:
    if first.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise RuntimeError(
            f"{name}: expected a CUDA tensor as the other arguments, got one on {first.device}"
        )
    return first.device


def beam_decode(
    context: Tensor,
    heads: list[Tensor],
    catalogue: list[Tensor],
    exclude_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    sizes: list[int],
    layer_norm_eps: float,
    *settings: Any,
) -> Results:
    """See sidmlp_kernels.ops."""
    check_launches(settings[_NUM_SETTINGS])
    bound = BoundDecode(
        None,
        heads,
        catalogue,
        sizes,
        layer_norm_eps,
        settings[:_NUM_SETTINGS],
        _device(context, "context"),
    )
    return bound.beam_decode(context, exclude_ids, exclude_offsets)


def decode_states(
    states: Tensor,
    mask: Tensor,
    readout: list[Tensor],
    heads: list[Tensor],
    catalogue: list[Tensor],
    exclude_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    sizes: list[int],
    layer_norm_eps: float,
    *settings: Any,
) -> Results:
    """See sidmlp_kernels.ops."""
    check_launches(settings[_NUM_SETTINGS])
    bound = BoundDecode(
        readout,
        heads,
        catalogue,
        sizes,
        layer_norm_eps,
        settings[:_NUM_SETTINGS],
        _device(states, "states"),
    )
    return bound.decode_states(states, mask, exclude_ids, exclude_offsets)


def context_readout(
    states: Tensor,
    mask: Tensor,
    readout: list[Tensor],
    sizes: list[int],
    layer_norm_eps: float,
    isa: int,
) -> Tensor:
    """See sidmlp_kernels.ops."""
    return BoundReadout(readout, sizes, layer_norm_eps, _device(states, "states"))(states, mask)


def level_logits(
    context: Tensor,
    prefix_codes: Tensor,
    heads: list[Tensor],
    sizes: list[int],
    layer_norm_eps: float,
    isa: int,
) -> Tensor:
    """See sidmlp_kernels.ops."""
    device = _device(context, "context")
    return BoundLogits(heads, sizes, layer_norm_eps, device)(context, prefix_codes)


def encode_t5(
    ids: Tensor,
    mask: Tensor,
    encoder: list[Tensor],
    sizes: list[int],
    layer_norm_eps: float,
    form: int,
    isa: int,
) -> Tensor:
    """See sidmlp_kernels.ops."""
    check_form(form)
    return encoder_bound.BoundT5(encoder, sizes, layer_norm_eps, _device(ids, "ids"))(ids, mask)


def encode_mlp(
    ids: Tensor,
    mask: Tensor,
    encoder: list[Tensor],
    sizes: list[int],
    layer_norm_eps: float,
    form: int,
    isa: int,
) -> Tensor:
    """See sidmlp_kernels.ops."""
    check_form(form)
    return encoder_bound.BoundMlp(encoder, sizes, layer_norm_eps, _device(ids, "ids"))(ids, mask)


def recommend(
    ids: Tensor,
    mask: Tensor,
    encoder: list[Tensor],
    encoder_sizes: list[int],
    encoder_eps: float,
    form: int,
    *decode: Any,
) -> Results:
    """See sidmlp_kernels.ops."""
    place = _device(ids, "ids")
    encode = encoder_bound.bind_encoder(encoder, encoder_sizes, encoder_eps, form, place)
    return decode_states(encode(ids, mask), mask, *decode)


_library = torch.library.Library("sidmlp", "IMPL", "CPU" if INTERPRETED else "CUDA")
for _function in (
    beam_decode,
    decode_states,
    context_readout,
    level_logits,
    encode_t5,
    encode_mlp,
    recommend,
):
    _library.impl(_function.__name__ + TRITON_SUFFIX, _function)
