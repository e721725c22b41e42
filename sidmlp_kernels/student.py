"""The student's weights, verified: spec + named tensors, from our names or the published ones.

Names and shapes (D, A, F, H, E, C_l as in StudentSpec; heads and embeddings index levels from 0):

    readout.query_proj.{weight [D, D], bias [D]}
    readout.attention.{q_proj, k_proj, v_proj}.weight [A, D], .out_proj.weight [D, A]; no biases
    readout.norm1.{weight, bias} [D], readout.norm2.{weight, bias} [D]
    readout.ffn_in.{weight [F, D], bias [F]}, readout.ffn_out.{weight [D, F], bias [D]}
    embeddings.{i}.weight [C_{i+1}, E]          i = 0..L-2: the last level's is never read
    heads.{i}.blocks.{b}.linear.{weight, bias}  b = 0: [H, D + i*E], input [ctx; e(c_1); .. e(c_i)]
                                                b > 0: [H, H]
    heads.{i}.blocks.{b}.norm.{weight, bias} [H]
    heads.{i}.output.{weight [C_{i+1}, H], bias [C_{i+1}]}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .spec import StudentSpec

_READOUT_FROM_OFFICIAL = {
    "readout.query_proj.weight": "query_proj.weight",
    "readout.query_proj.bias": "query_proj.bias",
    "readout.attention.q_proj.weight": "cross_attn.q_proj.weight",
    "readout.attention.k_proj.weight": "cross_attn.k_proj.weight",
    "readout.attention.v_proj.weight": "cross_attn.v_proj.weight",
    "readout.attention.out_proj.weight": "cross_attn.out_proj.weight",
    "readout.norm1.weight": "norm1.weight",
    "readout.norm1.bias": "norm1.bias",
    "readout.ffn_in.weight": "ffn.0.weight",
    "readout.ffn_in.bias": "ffn.0.bias",
    "readout.ffn_out.weight": "ffn.3.weight",
    "readout.ffn_out.bias": "ffn.3.bias",
    "readout.norm2.weight": "norm2.weight",
    "readout.norm2.bias": "norm2.bias",
}


def weight_shapes(spec: StudentSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a student of these sizes."""
    d, a, f, h = spec.dim, spec.attention_dim, spec.ffn_dim, spec.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {
        "readout.query_proj.weight": (d, d),
        "readout.query_proj.bias": (d,),
        "readout.attention.q_proj.weight": (a, d),
        "readout.attention.k_proj.weight": (a, d),
        "readout.attention.v_proj.weight": (a, d),
        "readout.attention.out_proj.weight": (d, a),
        "readout.norm1.weight": (d,),
        "readout.norm1.bias": (d,),
        "readout.ffn_in.weight": (f, d),
        "readout.ffn_in.bias": (f,),
        "readout.ffn_out.weight": (d, f),
        "readout.ffn_out.bias": (d,),
        "readout.norm2.weight": (d,),
        "readout.norm2.bias": (d,),
    }
    for i, codes in enumerate(spec.codes_per_level):
        if i < spec.num_levels - 1:
            shapes[f"embeddings.{i}.weight"] = (codes, spec.embedding_dim)
        for b in range(spec.blocks_per_head):
            inputs = h if b else d + i * spec.embedding_dim
            shapes[f"heads.{i}.blocks.{b}.linear.weight"] = (h, inputs)
            shapes[f"heads.{i}.blocks.{b}.linear.bias"] = (h,)
            shapes[f"heads.{i}.blocks.{b}.norm.weight"] = (h,)
            shapes[f"heads.{i}.blocks.{b}.norm.bias"] = (h,)
        shapes[f"heads.{i}.output.weight"] = (codes, h)
        shapes[f"heads.{i}.output.bias"] = (codes,)
    return shapes


def check_weights(
    weights: object, shapes: Mapping[str, tuple[int, ...]], what: str
) -> dict[str, Tensor]:
    """Own fp32 copies of `weights` on the CPU, once names, shapes, dtypes and values are right.

    Raises ValueError that lists every missing, unknown, misshaped, non-float and non-finite tensor.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"{what}: expected a mapping of names to tensors, got {type(weights).__name__}; "
            "pass a state dict"
        )
    problems = [f"missing {name} {list(s)}" for name, s in shapes.items() if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in shapes]
    checked: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name not in weights:
            continue
        tensor = weights[name]
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} is no tensor but {type(tensor).__name__}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} expected shape {list(shape)}, got {list(tensor.shape)}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"{name} expected a float dtype, got {tensor.dtype}")
        else:
            copy = torch.empty(shape, dtype=torch.float32).copy_(tensor.detach())
            if not bool(torch.isfinite(copy).all()):
                bad = tensor.flatten()[int((~torch.isfinite(copy)).flatten().nonzero()[0])].item()
                problems.append(f"{name} expected finite float32 values, got {bad}")
            checked[name] = copy
    if problems:
        raise ValueError(
            f"{what}: expected {len(shapes)} tensors of the names and shapes that the spec gives, "
            f"got {len(problems)} problems: {'; '.join(problems)}; "
            "export the model again, or correct its spec"
        )
    return checked


def check_cast(weights: Mapping[str, Tensor], dtype: torch.dtype, what: str = "weights") -> None:
    """ValueError if a finite weight is no longer finite in `dtype` (float16 ends at 65504)."""
    if dtype in (torch.float32, torch.float64):
        return
    for name, tensor in weights.items():
        overflowed = ~torch.isfinite(tensor.to(dtype))
        if bool(overflowed.any()):
            value = tensor[overflowed].flatten()[0].item()
            raise ValueError(
                f"{what}: expected every value of {name} to fit {dtype} (largest "
                f"{torch.finfo(dtype).max:g}), got {value:g}; "
                'use dtype="bfloat16" or dtype="float32"'
            )


class Student:
    """A student before any backend: `spec` and `weights`, fp32 on the CPU, read-only names.

    Raises ValueError naming each tensor that is missing, unknown, of the wrong shape or dtype, or
    not finite. Any float dtype is taken and stored as fp32.
    """

    __slots__ = ("spec", "weights")

    def __init__(self, spec: StudentSpec, weights: Mapping[str, Tensor]) -> None:
        if not isinstance(spec, StudentSpec):
            raise ValueError(
                f"spec: expected a StudentSpec, got {type(spec).__name__}; "
                "build one, or use Student.from_official(state_dict, num_heads=)"
            )
        self.spec = spec
        self.weights: Mapping[str, Tensor] = MappingProxyType(
            check_weights(weights, weight_shapes(spec), "student weights")
        )

    def __repr__(self) -> str:
        return f"Student({self.spec})"

    def check_cast(self, dtype: torch.dtype) -> None:
        """ValueError naming the first weight that overflows in `dtype`."""
        check_cast(self.weights, dtype, "student weights")

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], *, num_heads: int) -> Student:
        """The student that the paper's release stores as one flat state dict.

        Sizes come from shapes: C_l from the output rows of head l, the number of further blocks
        from the indices headN.4.. (the last is the output). Row offset_l + c of embedding.weight is
        code c of level l, offsets cumulate from 1; rows beyond the last code are not read.
        Only the number of attention heads leaves no trace in a shape.

        Raises ValueError naming every missing, unknown and misshaped key.
        """
        return cls(*_from_official(state_dict, num_heads))


def _from_official(state: Any, num_heads: int) -> tuple[StudentSpec, dict[str, Tensor]]:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state_dict: expected a mapping of names to tensors, got {type(state).__name__}; "
            "torch.load(path, weights_only=True) gives one"
        )
    heads = _official_heads(state)
    outputs = [f"head{n}.{last}" for n, last in heads.items()]
    sized = ("query_proj.weight", "cross_attn.q_proj.weight", "ffn.0.weight", "embedding.weight")
    needed = {*sized, "head1.0.weight", *(f"{name}.weight" for name in outputs)}
    _refuse_bad_keys(
        missing=[k for k in (*_READOUT_FROM_OFFICIAL.values(), *needed) if k not in state],
        unknown=[],
        misshaped=[k for k in needed if k in state and getattr(state[k], "ndim", 0) != 2],
    )
    codes = [int(state[f"{name}.weight"].shape[0]) for name in outputs]
    spec = StudentSpec(
        codes_per_level=tuple(codes),
        dim=state["query_proj.weight"].shape[0],
        attention_dim=state["cross_attn.q_proj.weight"].shape[0],
        num_heads=num_heads,
        ffn_dim=state["ffn.0.weight"].shape[0],
        hidden_dim=state["head1.0.weight"].shape[0],
        embedding_dim=state["embedding.weight"].shape[1],
        blocks_per_head=heads[1] - 3,
    )

    names = dict(_READOUT_FROM_OFFICIAL)  # our name -> official name
    for n in heads:
        for part in ("weight", "bias"):
            names[f"heads.{n - 1}.output.{part}"] = f"{outputs[n - 1]}.{part}"
            names[f"heads.{n - 1}.blocks.0.linear.{part}"] = f"head{n}.0.{part}"
            names[f"heads.{n - 1}.blocks.0.norm.{part}"] = f"head{n}.1.{part}"
            for b in range(1, spec.blocks_per_head):
                names[f"heads.{n - 1}.blocks.{b}.linear.{part}"] = f"head{n}.{b + 3}.fc.{part}"
                names[f"heads.{n - 1}.blocks.{b}.norm.{part}"] = f"head{n}.{b + 3}.norm.{part}"

    shapes = weight_shapes(spec)
    known = {*names.values(), "embedding.weight"}
    rows = 1 + sum(codes)
    misshaped = [
        f"{theirs} (expected {list(shapes[ours])}, got {list(getattr(state[theirs], 'shape', ()))})"
        for ours, theirs in names.items()
        if theirs in state and tuple(getattr(state[theirs], "shape", ())) != shapes[ours]
    ]
    if state["embedding.weight"].shape[0] < rows:
        got = list(state["embedding.weight"].shape)
        misshaped.append(f"embedding.weight (expected at least {rows} rows, got {got})")
    _refuse_bad_keys(
        missing=[k for k in known if k not in state],
        unknown=[str(k) for k in state if k not in known],
        misshaped=misshaped,
    )
    weights = {ours: state[theirs] for ours, theirs in names.items()}
    offsets = itertools.accumulate(codes, initial=1)
    for i, (offset, size) in enumerate(zip(offsets, codes[:-1], strict=False)):
        weights[f"embeddings.{i}.weight"] = state["embedding.weight"][offset : offset + size]
    return spec, weights


def _official_heads(state: Mapping[str, Tensor]) -> dict[int, int]:
    """Head number 1..L -> the index of its output Linear, the largest that it has."""
    found: dict[int, int] = {}
    for key in state:
        match = re.fullmatch(r"head(\d+)\.(\d+)\..+", str(key))
        if match:
            n, index = int(match[1]), int(match[2])
            found[n] = max(found.get(n, 0), index)
    expected = list(range(1, max(found, default=1) + 1))
    missing = [f"head{n}.*" for n in expected if n not in found]
    missing += [f"head{n}.4.weight (its output)" for n, last in found.items() if last < 4]
    if len(set(found.values())) > 1 and not missing:
        raise ValueError(
            "state_dict: expected heads with equally many blocks, got output indices "
            f"{dict(sorted(found.items()))}; a student has one number of blocks per head"
        )
    _refuse_bad_keys(missing=missing, unknown=["head0.*"] if 0 in found else [], misshaped=[])
    return {n: found[n] for n in expected}


def _refuse_bad_keys(*, missing: list[str], unknown: list[str], misshaped: list[str]) -> None:
    lists = {"missing": missing, "unknown": unknown, "misshaped": misshaped}
    problems = [f"{kind} {', '.join(sorted(keys))}" for kind, keys in lists.items() if keys]
    if problems:
        raise ValueError(
            "state_dict: expected the published layout (cross_attn.*, norm1, norm2, ffn.0, ffn.3, "
            f"query_proj, embedding.weight, headN.*), got {'; '.join(problems)}; "
            "pass the student's own flat state dict, without wrappers or prefixes"
        )
