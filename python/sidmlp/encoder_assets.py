"""What a checkpoint keeps of an encoder: sizes and weights, taken from a model and checked.

t5_encoder_assets    TIGER's T5 encoder, of transformers
mlp_encoder_assets   SID-MLP++'s encoder, of sidmlp.mlp_encoder
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig

FEED_FORWARDS = ("relu", "gelu", "gated-relu", "gated-gelu")
T5_FIELDS = (
    "num_layers",
    "dim",
    "num_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
    "feed_forward",
    "relative_buckets",
    "relative_max_distance",
    "layer_norm_eps",
)
MLP_FIELDS = (
    "num_layers",
    "num_roles",
    "dim",
    "hidden_dim",
    "vocab_size",
    "max_length",
    "layer_norm_eps",
)


def t5_encoder_assets(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes and fp32 weights of the encoder of a `transformers` T5 model, on the CPU.

    Takes an encoder stack or any model that has one as `.encoder`; weights are named as inside the
    stack. Raises ValueError for a model without a T5 encoder or with a feed-forward unknown here.
    """
    stack = getattr(model, "encoder", model)
    config = getattr(stack, "config", None)
    if getattr(config, "model_type", None) != "t5" or getattr(config, "is_decoder", False):
        raise ValueError(
            f"model: expected a transformers T5 encoder or a model that has one, got "
            f"{type(model).__name__}; pass e.g. a T5ForConditionalGeneration"
        )
    assert config is not None
    if config.feed_forward_proj not in FEED_FORWARDS:
        raise ValueError(
            f"model: expected feed_forward_proj to be one of {FEED_FORWARDS}, got "
            f"{config.feed_forward_proj!r}; train the teacher with one of them"
        )
    state = {
        name: weight.detach().to("cpu", torch.float32, copy=True)
        for name, weight in stack.state_dict().items()
    }
    fields = {
        "num_layers": config.num_layers,
        "dim": config.d_model,
        "num_heads": config.num_heads,
        "head_dim": config.d_kv,
        "ffn_dim": config.d_ff,
        "vocab_size": state["embed_tokens.weight"].shape[0],
        "feed_forward": config.feed_forward_proj,
        "relative_buckets": config.relative_attention_num_buckets,
        "relative_max_distance": config.relative_attention_max_distance,
        "layer_norm_eps": config.layer_norm_epsilon,
    }
    return fields, state


def mlp_encoder_assets(model: MLPEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes and fp32 weights of SID-MLP++'s encoder, on the CPU."""
    if not isinstance(model, MLPEncoder):
        raise ValueError(
            f"model: expected a sidmlp.mlp_encoder.MLPEncoder, got {type(model).__name__}; "
            f"t5_encoder_assets takes T5 models"
        )
    weights = model.state_dict().items()
    state = {name: w.detach().to("cpu", torch.float32, copy=True) for name, w in weights}
    return dataclasses.asdict(model.config), state


def _t5_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a T5 encoder with these sizes."""
    dim, ffn = fields["dim"], fields["ffn_dim"]
    width = fields["num_heads"] * fields["head_dim"]
    gated = fields["feed_forward"].startswith("gated-")
    buckets = (fields["relative_buckets"], fields["num_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (fields["vocab_size"], dim),
        "block.0.layer.0.SelfAttention.relative_attention_bias.weight": buckets,
        "final_layer_norm.weight": (dim,),
    }
    for i in range(fields["num_layers"]):
        attention, dense = f"block.{i}.layer.0", f"block.{i}.layer.1"
        for name in "qkv":
            shapes[f"{attention}.SelfAttention.{name}.weight"] = (width, dim)
        shapes[f"{attention}.SelfAttention.o.weight"] = (dim, width)
        shapes[f"{attention}.layer_norm.weight"] = (dim,)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            shapes[f"{dense}.DenseReluDense.{name}.weight"] = (ffn, dim)
        shapes[f"{dense}.DenseReluDense.wo.weight"] = (dim, ffn)
        shapes[f"{dense}.layer_norm.weight"] = (dim,)
    return shapes


def _mlp_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of an MLP encoder with these sizes."""
    with torch.device("meta"):
        model = MLPEncoder(MLPEncoderConfig(**fields))
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def check_fields(what: str, given: Mapping[str, Any], expected: Sequence[str]) -> dict[str, Any]:
    """`given` with its fields in the expected order, tuples as lists."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"{what}: expected the fields {list(expected)}, got missing {missing} and unknown "
            f"{unknown}; name every field and no other"
        )
    values = {name: given[name] for name in expected}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def checked_encoder(
    config: Mapping[str, Any] | None,
    state: Mapping[str, Tensor] | None,
    dim: int,
    tokens: Mapping[str, Any],
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """config.json's entry and the weights of an encoder (None and none without one), checked."""
    if (config is None) != (state is None):
        raise ValueError(
            "encoder_config, encoder_state_dict: expected both or neither, got one; "
            "use t5_encoder_assets(model) or mlp_encoder_assets(model)"
        )
    if config is None or state is None:
        return None, {}
    kind = "mlp" if "num_roles" in config else "t5"
    fields = check_fields("encoder_config", config, MLP_FIELDS if kind == "mlp" else T5_FIELDS)
    if kind == "t5" and fields["feed_forward"] not in FEED_FORWARDS:
        raise ValueError(
            f"encoder_config: expected feed_forward to be one of {FEED_FORWARDS}, got "
            f"{fields['feed_forward']!r}; train the teacher with one of them"
        )
    if fields["dim"] != dim or fields["vocab_size"] <= tokens["eos_id"]:
        raise ValueError(
            f"encoder_config: expected dim {dim} as the student has and vocab_size > "
            f"{tokens['eos_id']} as tokens say, got {fields['dim']} and {fields['vocab_size']}; "
            f"pass the encoder that the student was distilled from"
        )
    levels = len(tokens["code_offsets"])
    longest = 2 + tokens["max_items"] * levels
    if kind == "mlp" and (fields["num_roles"] != levels or fields["max_length"] < longest):
        raise ValueError(
            f"encoder_config: expected num_roles {levels} and max_length >= {longest} as tokens "
            f"say, got {fields['num_roles']} and {fields['max_length']}; pass the encoder that the "
            f"student was distilled from"
        )
    expected = _mlp_shapes(fields) if kind == "mlp" else _t5_shapes(fields)
    got = {name: tuple(weight.shape) for name, weight in state.items()}
    wrong = sorted(
        name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"encoder_state_dict: {name}: expected shape {expected.get(name, 'no such weight')}, "
            f"got {got.get(name, 'no such weight')}; use t5_encoder_assets or mlp_encoder_assets"
        )
    return {"kind": kind, **fields}, dict(state)
