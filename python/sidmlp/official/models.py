"""Published state dicts -> models of this package: TIGER's T5 and SID-MLP++'s encoder.

Sizes come from shapes. What leaves no trace in a shape is the release's own: T5 with ReLU, a tied
output layer, 32 buckets up to distance 128, eps 1e-6; LayerNorm eps 1e-5.
The vocabulary is padding 0, the codes of level after level from 1, one user token, the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sidmlp.data import TokenSpec
from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sidmlp.teacher import Teacher, TeacherConfig

from .files import Published

Model = TypeVar("Model", bound=nn.Module)

PREFIX = "t5."
EMBEDDING = "t5.shared.weight"
COPIES = ("t5.encoder.embed_tokens.weight", "t5.decoder.embed_tokens.weight", "t5.lm_head.weight")
FIRST_LAYER = "t5.encoder.block.0.layer."

# Index of a module in the published nn.Sequential of a role -> its name in RoleMLP.
ROLE_PARTS = {"0": "linear_in", "1": "norm", "4": "linear_out"}


def teacher_from_official(
    published: Published, codes_per_level: Sequence[int], *, max_items: int = 20
) -> Teacher:
    """The published TIGER as a Teacher in evaluation mode, fp32 on the CPU.

    Raises ValueError naming a weight that is missing, unknown or misshaped, for an output layer
    that is not the embedding, and for a vocabulary that does not fit codes_per_level.
    """
    state, path = dict(published.state), published.path
    if not any(name.startswith(PREFIX) for name in state):
        raise ValueError(
            f"{path}: expected TIGER's weights, named {PREFIX}.., got {next(iter(state))} and "
            "others; name the TIGER-*.pth of the release"
        )
    table = _matrix(published, EMBEDDING)
    # transformers names the one matrix of a tied T5 several times; a file may leave copies out.
    for name in COPIES:
        if not torch.equal(state.setdefault(name, table), table):
            raise ValueError(
                f"{path}: {name}: expected a copy of {EMBEDDING}, got other values; only models "
                "with one matrix for input and output are read"
            )
    tokens = TokenSpec.for_codes(tuple(codes_per_level), max_items)
    if table.shape[0] != tokens.vocab_size:
        raise ValueError(
            f"{path}: {EMBEDDING}: expected {tokens.vocab_size} rows (padding, "
            f"{' + '.join(map(str, codes_per_level))} codes, one user token, the end), got "
            f"{table.shape[0]}; say with --codes how many codes the levels have"
        )
    bias = _matrix(published, f"{FIRST_LAYER}0.SelfAttention.relative_attention_bias.weight")
    query = _matrix(published, f"{FIRST_LAYER}0.SelfAttention.q.weight")
    hidden = _matrix(published, f"{FIRST_LAYER}1.DenseReluDense.wi.weight")
    layers = {
        stack: 1 + max((int(n) for n in _layer_numbers(state, rf"t5\.{stack}\.block")), default=-1)
        for stack in ("encoder", "decoder")
    }
    if len(set(layers.values())) > 1:
        raise ValueError(
            f"{path}: expected as many layers in the encoder as in the decoder, got "
            f"{layers['encoder']} and {layers['decoder']}; no other teacher is read"
        )
    if query.shape[0] % bias.shape[1]:
        raise ValueError(
            f"{path}: {FIRST_LAYER}0.SelfAttention.q.weight: expected a multiple of the "
            f"{bias.shape[1]} heads as rows, got {query.shape[0]}; fetch the file again"
        )
    config = TeacherConfig(
        dim=table.shape[1],
        num_layers=layers["encoder"],
        num_heads=bias.shape[1],
        head_dim=query.shape[0] // bias.shape[1],
        ffn_dim=hidden.shape[0],
    )
    return _loaded(Teacher(config, tokens), state, published)


def encoder_from_official(published: Published, table: Tensor, num_levels: int) -> MLPEncoder:
    """The published SID-MLP++ encoder as an MLPEncoder in evaluation mode, fp32 on the CPU.

    table: [vocab, D], the teacher's embedding, whose rows the encoder reads and the file leaves
    out. Raises ValueError naming a weight that is missing, unknown or misshaped.
    """
    state, path = published.state, published.path
    if "pos_embed.weight" not in state:
        raise ValueError(
            f"{path}: expected an SID-MLP++ encoder, with pos_embed.weight, got "
            f"{next(iter(state))} and others; name the encoder that the student was trained on"
        )
    ours = {
        "embed_tokens.weight": table,
        "embed_positions.weight": state["pos_embed.weight"],
    }
    for name, tensor in state.items():
        if name != "pos_embed.weight":
            ours[_encoder_name(name)] = tensor
    config = MLPEncoderConfig(
        num_layers=1 + max((int(n) for n in _layer_numbers(state, "layers")), default=0),
        num_roles=num_levels,
        dim=table.shape[1],
        hidden_dim=_matrix(published, "layers.0.0.0.weight").shape[0],
        vocab_size=table.shape[0],
        max_length=_matrix(published, "pos_embed.weight").shape[0],
    )
    return _loaded(MLPEncoder(config), ours, published)


def _encoder_name(theirs: str) -> str:
    """Our name of an encoder weight; an unknown one keeps its own and is refused as that."""
    found = re.fullmatch(r"layers\.(\d+)\.(\d+)\.([014])\.(weight|bias)", theirs)
    if found:
        return f"layers.{found[1]}.roles.{found[2]}.{ROLE_PARTS[found[3]]}.{found[4]}"
    return re.sub(r"^norm\.", "final_layer_norm.", theirs)


def _layer_numbers(state: Mapping[str, Any], stack: str) -> set[str]:
    found = (re.match(rf"{stack}\.(\d+)\.", name) for name in state)
    return {match[1] for match in found if match}


def _matrix(published: Published, name: str) -> Tensor:
    tensor = published.state.get(name)
    if tensor is None or tensor.ndim != 2 or 0 in tensor.shape:
        got = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise ValueError(
            f"{published.path}: {name}: expected a matrix, got {got}; fetch the file again, or "
            "name another one of the release"
        )
    return tensor


def _loaded(model: Model, state: Mapping[str, Tensor], published: Published) -> Model:
    """The model with exactly these weights, in evaluation mode."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
    if wrong:
        named = "; ".join(
            f"{name}: expected {expected.get(name, 'no such weight')}, got "
            f"{got.get(name, 'no such weight')}"
            for name in wrong[:3]
        )
        raise ValueError(
            f"{published.path}: {len(wrong)} weights do not fit: {named}"
            f"{'; ..' if len(wrong) > 3 else ''}; fetch it again, or name a model of the release"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()
