"""Weights of the encoders that are PyTorch modules."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .student import check_weights

Module = TypeVar("Module", bound=nn.Module)


def with_weights(encoder: Module, weights: object) -> Module:
    """`encoder`, made on the meta device, with these weights in fp32 on the CPU; frozen, in eval
    mode.

    Raises ValueError naming each tensor that is missing, unknown, misshaped or not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    encoder.load_state_dict(check_weights(weights, shapes, "encoder weights"), assign=True)
    return encoder.requires_grad_(False).eval()
