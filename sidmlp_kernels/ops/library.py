"""Schemas and fakes of `torch.ops.sidmlp.*`, and the loading of the libraries that implement them.

One schema serves every backend: implementations register themselves for their dispatch key when
their library is loaded. Triton shares CUDA's dispatch key, so `X_triton` stands beside each `X`
with the same schema and fake. What each operator computes is specified in `sidmlp_kernels.ops`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY_DIR = Path(__file__).parent.parent / "_lib"

_MODEL = "int[] sizes, float layer_norm_eps"
_DECODE = (
    "Tensor[] heads, Tensor[] catalogue, Tensor? exclude_ids, Tensor? exclude_offsets, "
    f"{_MODEL}, int k, int num_beams, bool codebook, float[] temperatures, float[] level_weights, "
    "int[] level_modes, int launches, int isa"
)
_RESULTS = "(Tensor items, Tensor scores, Tensor codes, Tensor counts)"
_ENCODER = f"Tensor ids, Tensor mask, Tensor[] encoder, {_MODEL}, int form, int isa"

SCHEMAS = {
    "beam_decode": f"(Tensor context, {_DECODE}) -> {_RESULTS}",
    "decode_states": f"(Tensor states, Tensor mask, Tensor[] readout, {_DECODE}) -> {_RESULTS}",
    "context_readout": (
        f"(Tensor states, Tensor mask, Tensor[] readout, {_MODEL}, int isa) -> Tensor"
    ),
    "level_logits": (
        f"(Tensor context, Tensor prefix_codes, Tensor[] heads, {_MODEL}, int isa) -> Tensor"
    ),
    "encode_t5": f"({_ENCODER}) -> Tensor",
    "encode_mlp": f"({_ENCODER}) -> Tensor",
    "recommend": (
        "(Tensor ids, Tensor mask, Tensor[] encoder, int[] encoder_sizes, float encoder_eps, "
        f"int form, Tensor[] readout, {_DECODE}) -> {_RESULTS}"
    ),
}

_library = torch.library.Library("sidmlp", "DEF")
TRITON_SUFFIX = "_triton"
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.define(_name + TRITON_SUFFIX + _schema)

_NUM_FIXED_SIZES = 7  # sizes = [L, D, heads, head_dim, F, H, blocks, C_1 .. C_L]

Results = tuple[Tensor, Tensor, Tensor, Tensor]


Fake = TypeVar("Fake", bound=Callable[..., object])


def _fake(name: str) -> Callable[[Fake], Fake]:
    """Registers the fake of operator `name` and of its Triton sibling."""

    def register(function: Fake) -> Fake:
        for suffix in ("", TRITON_SUFFIX):
            torch.library.register_fake(f"sidmlp::{name}{suffix}", function, lib=_library)
        return function

    return register


def _fake_results(operator_name: str) -> None:
    """The fake of an operator with _RESULTS, whose first tensor has a row for each request."""
    schema = getattr(torch.ops.sidmlp, operator_name).default._schema
    names = [argument.name for argument in schema.arguments]

    @_fake(operator_name)
    def results(*args: Any, **kwargs: Any) -> Results:
        given = dict(zip(names, args, strict=False), **kwargs)
        rows, k, levels = given[names[0]], given["k"], given["sizes"][0]
        batch = rows.shape[0]
        return (
            rows.new_empty((batch, k), dtype=torch.int64),
            rows.new_empty((batch, k), dtype=torch.float32),
            rows.new_empty((batch, k, levels), dtype=torch.int32),
            rows.new_empty((batch,), dtype=torch.int32),
        )


for _name in ("beam_decode", "decode_states", "recommend"):
    _fake_results(_name)


@_fake("context_readout")
def _context_readout_fake(states, mask, readout, sizes, layer_norm_eps, isa) -> Tensor:
    return states.new_empty((states.shape[0], sizes[1]), dtype=torch.float32)


@_fake("level_logits")
def _level_logits_fake(context, prefix_codes, heads, sizes, layer_norm_eps, isa) -> Tensor:
    width = sizes[_NUM_FIXED_SIZES + prefix_codes.shape[1]]
    return context.new_empty((context.shape[0], width), dtype=torch.float32)


@_fake("encode_t5")
@_fake("encode_mlp")
def _encode_fake(ids, mask, encoder, sizes, layer_norm_eps, form, isa) -> Tensor:
    return ids.new_empty((*ids.shape, sizes[1]), dtype=encoder[0].dtype)


def operator(name: str, backend: str) -> Any:
    """The overload of `torch.ops.sidmlp` that runs operator `name` on `backend`."""
    suffix = TRITON_SUFFIX if backend == "triton" else ""
    return getattr(torch.ops.sidmlp, name + suffix).default


@functools.cache
def load(backend: str) -> str:
    """Loads what implements `backend` once; returns "" or why it cannot."""
    if backend == "triton":
        try:
            importlib.import_module("sidmlp_kernels.ops.triton.register")
        except ImportError as error:
            return f"triton does not load: {error}; install it with `pip install triton`"
        return ""
    path = LIBRARY_DIR / f"libsidmlp_{backend}.so"
    if not path.exists():
        return (
            f"{path.name} is not built; run `pip install --no-build-isolation .` "
            "(or `python setup.py build_ext --inplace` in a checkout)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}; rebuild it against this torch"
    return ""
