"""Launches of the Triton backend, recorded instead of launched, and compiled without a GPU.

`record` builds the bound operators on meta tensors and calls them once with `BoundKernel` replaced,
so a `Launch` holds the very arguments and constants that the same call would launch on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from sidmlp_kernels.ops.triton import bound, encode_mlp, encode_t5, kernels, launch
from sidmlp_kernels.ops.triton.compiler import compile_kernel
from sidmlp_kernels.ops.triton.problem import padded
from sidmlp_kernels.ops.triton.tiles import MOST_SHARED
from sidmlp_kernels.spec import StudentSpec

META = torch.device("meta")
KERNELS = {**vars(encode_mlp), **vars(encode_t5), **vars(kernels)}

# Architecture: what Triton compiles for, what ptxas calls it, bytes of shared memory of a block.
TARGETS = {
    "sm_90a": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_100a": (GPUTarget("cuda", 100, 32), 227 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One kernel for one kind of arguments; equal where the code would be.

    kinds, constants  (name, what the compiler is told) and (name, value)
    options           further arguments of `compile_kernel`: warps, ..
    """

    kernel: str
    kinds: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Code:
    """Bytes of shared memory, and what ptxas says: bytes spilled, registers of a thread."""

    shared: int
    spill_stores: int
    spill_loads: int
    registers: int

    @property
    def spills(self) -> int:
        """Bytes that are spilled, of stores and loads together."""
        return self.spill_stores + self.spill_loads


class Recorder:
    """Stands for `BoundKernel`."""

    launches: ClassVar[list[Launch]] = []

    def __init__(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        varying: Sequence[str],
        *,
        device: torch.device,
        **options: Any,
    ) -> None:
        del device
        names = kernel.arg_names
        assert set(varying) <= set(arguments), "a launch gives what is no argument"
        assert set(arguments) | set(constants) == set(names), "arguments differ from the kernel's"
        kinds = tuple(
            (name, launch.kind_of(arguments[name])) for name in names if name in arguments
        )
        self.varying = len(varying)
        name = kernel.fn.__name__
        launched = Launch(name, kinds, tuple(constants.items()), tuple(options.items()))
        self.launches.append(launched)

    def launch(self, programs: int, values: Sequence[Any]) -> None:
        """Launches nothing."""
        assert programs > 0
        assert len(values) == self.varying


def packed_tensors(
    spec: StudentSpec, dtype: torch.dtype, *, factored: bool
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """readout, heads and sizes as `sidmlp_kernels.packing` makes them, without numbers."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=META)

    head_dim = spec.attention_dim // spec.num_heads
    dim, dim_pad, ffn_pad = spec.dim, padded(spec.dim), padded(spec.ffn_dim)
    inner, stride = spec.num_heads * padded(head_dim), padded(spec.hidden_dim)
    if factored:
        attention = [
            *(empty(dim, inner), empty(spec.attention_dim, dim_pad)),
            *(empty(dim, inner), empty(spec.attention_dim, dim_pad)),
        ]
    else:
        score, value = empty(dim, spec.num_heads * dim_pad), empty(spec.num_heads * dim, dim_pad)
        attention = [empty(0), score, value, empty(0)]
    readout = [
        *(empty(dim, dim_pad), empty(6, dim_pad, of=torch.float32), *attention),
        *(empty(dim, ffn_pad), empty(ffn_pad, of=torch.float32), empty(spec.ffn_dim, dim_pad)),
    ]
    width = spec.num_levels * stride
    heads = [empty(dim, width), empty(width, of=torch.float32)]
    rows, blocks = 0, spec.blocks_per_head
    for codes in spec.codes_per_level:
        heads += [
            empty(3 * blocks - 1, stride, of=torch.float32),
            empty(rows, stride),
            empty(blocks - 1, spec.hidden_dim, stride),
            empty(codes, stride),
            empty(codes, of=torch.float32),
        ]
        rows += codes
    sizes = [spec.num_levels, dim, spec.num_heads, head_dim, spec.ffn_dim, spec.hidden_dim, blocks]
    return readout, heads, [*sizes, *spec.codes_per_level]


def catalogue_tensors(spec: StudentSpec, leaves: int) -> list[Tensor]:
    """A trie (sidmlp_kernels.trie) with `leaves` leaves, without numbers."""
    tensors, parents = [], 1
    for codes in spec.codes_per_level:
        nodes = min(parents * codes, leaves)
        tensors.append(torch.empty(parents + 1, dtype=torch.int32, device=META))
        tensors.append(torch.empty(nodes, dtype=torch.int16, device=META))
        parents = nodes
    for size, dtype in ((parents + 1, torch.int32), (leaves, torch.int64), (leaves, torch.uint8)):
        tensors.append(torch.empty(size, dtype=dtype, device=META))
    return tensors


def record(
    spec: StudentSpec,
    dtype: torch.dtype,
    *,
    num_beams: int,
    batch: int = 2,
    shared: int = MOST_SHARED,
    states_dtype: torch.dtype | None = None,
    operators: Sequence[str] = ("beam_decode", "decode_states", "context_readout", "level_logits"),
) -> dict[str, Launch]:
    """What each operator would launch for this model.

    shared: kilobytes that the GPU offers a program. states_dtype: by default the weights'.
    """
    factored = spec.num_heads * spec.dim > 2 * spec.attention_dim  # as packing.py chooses
    readout, heads, sizes = packed_tensors(spec, dtype, factored=factored)
    eps, levels = spec.layer_norm_eps, spec.num_levels
    settings = (num_beams, num_beams, False, [1.0] * levels, [1.0] * levels, [1] * levels)
    trie = catalogue_tensors(spec, leaves=10_000)
    states = torch.empty(batch, 50, spec.dim, dtype=states_dtype or dtype, device=META)
    mask = torch.empty(batch, 50, dtype=torch.bool, device=META)
    context = torch.empty(batch, spec.dim, device=META)
    prefix = torch.empty(batch, levels - 1, dtype=torch.int32, device=META)
    excluded = torch.empty(9, dtype=torch.int64, device=META)
    offsets = torch.empty(batch + 1, dtype=torch.int64, device=META)
    Recorder.launches.clear()
    recorded = {}
    with (
        mock.patch.object(bound, "BoundKernel", Recorder),
        mock.patch.object(bound, "shared_kilobytes", return_value=shared),
    ):
        for name in operators:
            decode_of = None if name == "beam_decode" else readout
            if name == "context_readout":
                bound.BoundReadout(readout, sizes, eps, META)(states, mask)
            elif name == "level_logits":
                bound.BoundLogits(heads, sizes, eps, META)(context, prefix)
            else:
                decode = bound.BoundDecode(decode_of, heads, trie, sizes, eps, settings, META)
                if name == "beam_decode":
                    decode.beam_decode(context, excluded, offsets)
                else:
                    decode.decode_states(states, mask, excluded, offsets)
            (recorded[name],) = Recorder.launches
            Recorder.launches.clear()
    return recorded


def compiled(recorded: Launch, architecture: str) -> Code:
    """Compiles what was recorded for `architecture`, and asks ptxas about it."""
    target, _ = TARGETS[architecture]
    kernel, arguments = KERNELS[recorded.kernel], dict(recorded.kinds)
    constants, options = dict(recorded.constants), dict(recorded.options)
    try:
        code = compile_kernel(kernel, arguments, constants, **options, target=target)
    except Exception as error:  # Triton's own errors do not travel between processes
        raise RuntimeError(f"{recorded.kernel}: {type(error).__name__}: {error}") from None
    ptxas = get_ptxas(target.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(code.asm["ptx"])
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name", architecture, source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    # Functions that are called have lines of their own.
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.findall(r"Used (\d+) registers", said)
    assert spills, said
    assert registers, said
    return Code(
        code.metadata.shared,
        sum(int(stores) for stores, _ in spills),
        sum(int(loads) for _, loads in spills),
        max(map(int, registers)),
    )
