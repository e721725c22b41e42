"""Ahead-of-time compilation of a kernel for given argument types: no hidden search, no retuning.

`compile_kernel` takes what the compiler must know of each argument (`Pointer`, `Size`, float), not
the argument, so that a launch and a test without a GPU compile the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: its dtype, and whether its address is a multiple of 16 bytes."""

    dtype: torch.dtype
    aligned: bool = True


@dataclass(frozen=True)
class Size:
    """Stands for an integer: its width, and whether it is a multiple of 16."""

    kind: str = "i32"
    divisible: bool = False


Argument = Any  # Pointer | Size | float | tuple of these


def _describe(argument: Argument, path: tuple[int, ...], attrs: dict) -> Any:
    """The signature entry of one argument; attributes go into `attrs`."""
    if isinstance(argument, tuple):
        return tuple(_describe(a, (*path, i), attrs) for i, a in enumerate(argument))
    if isinstance(argument, Pointer):
        if argument.aligned:
            attrs[path] = _DIVISIBLE
        return POINTERS[argument.dtype]
    if isinstance(argument, Size):
        if argument.divisible:
            attrs[path] = _DIVISIBLE
        return argument.kind
    assert argument is float
    return "fp32"


def source_of(
    kernel: Any, arguments: Mapping[str, Argument], constants: Mapping[str, Any]
) -> ASTSource:
    """What is compiled: `kernel` for these kinds of arguments and these constants."""
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = _describe(arguments[name], (index,), attrs)
    return ASTSource(kernel, signature, dict(constants), attrs)


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Argument],
    constants: Mapping[str, Any],
    *,
    warps: int,
    registers: int = 255,
    target: GPUTarget | None = None,
) -> CompiledKernel:
    """Machine code for the current GPU, or for `target` without one."""
    source = source_of(kernel, arguments, constants)
    return triton.compile(source, target=target, options={"num_warps": warps, "maxnreg": registers})
