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

from .spec import MAX_LEVELS, StudentSpec

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

    def __reduce__(self) -> tuple[type[Student], tuple[StudentSpec, dict[str, Tensor]]]:
        return Student, (self.spec, dict(self.weights))  # a mapping proxy cannot be pickled

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
    levels, last = _official_heads(state)
    names = _official_names(levels, last)
    known = {*names.values(), "embedding.weight"}
    outputs = [f"head{n}.{last}.weight" for n in range(1, levels + 1)]
    sized = ["query_proj.weight", "cross_attn.q_proj.weight", "ffn.0.weight", "head1.0.weight"]
    sized += ["embedding.weight", *outputs]
    _refuse_bad_keys(
        missing=[k for k in known if k not in state],
        unknown=[str(k) for k in state if k not in known],
        misshaped=[k for k in sized if k in state and getattr(state[k], "ndim", 0) != 2],
    )
    spec = StudentSpec(
        codes_per_level=tuple(state[name].shape[0] for name in outputs),
        dim=state["query_proj.weight"].shape[0],
        attention_dim=state["cross_attn.q_proj.weight"].shape[0],
        num_heads=num_heads,
        ffn_dim=state["ffn.0.weight"].shape[0],
        hidden_dim=state["head1.0.weight"].shape[0],
        embedding_dim=state["embedding.weight"].shape[1],
        blocks_per_head=last - 3,
    )
    shapes = weight_shapes(spec)
    got = {k: list(getattr(state[k], "shape", ())) for k in known}
    misshaped = [
        f"{theirs} (expected {list(shapes[ours])}, got {got[theirs]})"
        for ours, theirs in names.items()
        if got[theirs] != list(shapes[ours])
    ]
    table = state["embedding.weight"]
    first_rows = list(itertools.accumulate(spec.codes_per_level, initial=1))
    if table.shape[0] < first_rows[-1]:
        misshaped.append(
            f"embedding.weight (expected at least {first_rows[-1]} rows, got {list(table.shape)})"
        )
    _refuse_bad_keys(missing=[], unknown=[], misshaped=misshaped)

    weights = {ours: state[theirs] for ours, theirs in names.items()}
    for i, (begin, end) in enumerate(itertools.pairwise(first_rows[:-1])):
        weights[f"embeddings.{i}.weight"] = table[begin:end]
    return spec, weights


def _official_heads(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of heads, index of the output Linear in each of them."""
    indices: dict[int, set[int]] = {}
    for key in state:
        match = re.fullmatch(r"head([1-9]\d*)\.(\d+)\..+", str(key))
        if match:
            indices.setdefault(int(match[1]), set()).add(int(match[2]))
    outputs = {n: max(found) for n, found in sorted(indices.items()) if max(found) >= 4}
    if len(set(outputs.values())) > 1:
        raise ValueError(
            f"state_dict: expected heads with equally many blocks, got output indices {outputs} of "
            "head1.. in headN.<index>.weight; a student has one number of blocks per head"
        )
    levels = max(indices, default=1)
    if levels > MAX_LEVELS:
        raise ValueError(
            f"state_dict: expected head1.* .. head{MAX_LEVELS}.* at most, got head{levels}.*; "
            "pass a student's state dict"
        )
    return levels, max(outputs.values(), default=4)


def _official_names(levels: int, last: int) -> dict[str, str]:
    """Our name -> published name, of all but the embeddings."""
    names = dict(_READOUT_FROM_OFFICIAL)
    for i in range(levels):
        for part in ("weight", "bias"):
            ours, theirs = f"heads.{i}", f"head{i + 1}"
            names[f"{ours}.blocks.0.linear.{part}"] = f"{theirs}.0.{part}"
            names[f"{ours}.blocks.0.norm.{part}"] = f"{theirs}.1.{part}"
            for index in range(4, last):
                names[f"{ours}.blocks.{index - 3}.linear.{part}"] = f"{theirs}.{index}.fc.{part}"
                names[f"{ours}.blocks.{index - 3}.norm.{part}"] = f"{theirs}.{index}.norm.{part}"
            names[f"{ours}.output.{part}"] = f"{theirs}.{last}.{part}"
    return names


def _refuse_bad_keys(*, missing: list[str], unknown: list[str], misshaped: list[str]) -> None:
    lists = {"missing": missing, "unknown": unknown, "misshaped": misshaped}
    problems = [f"{kind} {', '.join(sorted(keys))}" for kind, keys in lists.items() if keys]
    if problems:
        raise ValueError(
            "state_dict: expected the published layout (cross_attn.*, norm1, norm2, ffn.0, ffn.3, "
            f"query_proj, embedding.weight, headN.*), got {'; '.join(problems)}; "
            "pass the student's own flat state dict, without wrappers or prefixes"
        )
