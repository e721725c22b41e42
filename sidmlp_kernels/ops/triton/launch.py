"""A kernel with its constant arguments bound, launched on the current stream."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sidmlp_kernels.ops.triton import kernels
from sidmlp_kernels.ops.triton.compiler import Pointer, Size, compile_kernel
from sidmlp_kernels.ops.triton.scratch import Layout
from sidmlp_kernels.ops.triton.tiles import LEAST_SHARED, MOST_SHARED

INTERPRETED = not isinstance(kernels.beam_decode_kernel, triton.JITFunction)

MAX_WORKSPACE = 1 << 30  # bytes; more requests than fit take turns
# More than run at once: those that wait even out requests that cost more than others.
PROGRAMS_PER_MULTIPROCESSOR = 4

# The C launcher takes these arguments in this order there; elsewhere Triton's own call is used,
# which costs the host more.
_KNOWN_LAUNCHER = triton.__version__.startswith("3.6.")

_load_lock = threading.Lock()
_loaded: dict[Any, triton.compiler.CompiledKernel] = {}


class Bytes(int):
    """An int64 argument that is a multiple of 16."""


class Multiple(int):
    """An int32 argument whose divisibility by 16 the code may use."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 4 for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_kilobytes(device: torch.device) -> int:
    """Shared memory that a program may have; the largest for the interpreter.

    Compute capability 10.x counts as one with little: its matrix instructions for tiles of 64 rows
    do not compile in functions that are not inlined (Triton 3.6), and rows for little shared memory
    have tiles of 32.
    """
    if device.type != "cuda":
        return MOST_SHARED
    if torch.cuda.get_device_capability(device)[0] == 10:
        return LEAST_SHARED
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"] // 1024


def num_programs(batch: int, group: int, layout: Layout, device: torch.device) -> int:
    """Programs of a launch: one a group, but no more than the workspace may hold."""
    groups = -(-batch // group)
    most = max(1, MAX_WORKSPACE // layout.slice_bytes)
    return min(groups, most, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device))


def is_aligned(tensor: Tensor) -> bool:
    """Whether the address is a multiple of 16 bytes."""
    return tensor.data_ptr() % 16 == 0


def kind_of(argument: Any) -> Any:
    """What the compiler is told of an argument."""
    if isinstance(argument, tuple):
        return tuple(kind_of(a) for a in argument)
    if isinstance(argument, Pointer):  # stands for tensors that a launch gives
        return argument
    if isinstance(argument, Tensor):
        return Pointer(argument.dtype, is_aligned(argument))
    if isinstance(argument, Bytes):
        return Size("i64", True)
    if isinstance(argument, Multiple):
        return Size("i32", argument % 16 == 0)
    return Size("i32") if isinstance(argument, int) else float


class BoundKernel:
    """One kernel for one kind of arguments on one device.

    arguments  every argument but the constants, by name: tensors, ints, floats and tuples of them
    varying    names of the arguments that a launch gives anew; here they only show their kind
    """

    def __init__(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        varying: Sequence[str],
        *,
        warps: int,
        registers: int,
        device: torch.device,
    ) -> None:
        names = kernel.arg_names
        self._kernel, self._device = kernel, device
        self._varying = [names.index(name) for name in varying]
        given = {**arguments, **constants}
        if INTERPRETED:
            self._values = [given[name] for name in names]
            return
        self._values = [_raw(given[name]) for name in names]
        kinds = tuple((name, kind_of(arguments[name])) for name in names if name in arguments)
        with torch.cuda.device(device):
            compiled = _load(kernel, kinds, tuple(constants.items()), warps, registers, device)
        self._compiled = compiled
        self._run, self._function = compiled.run, compiled.function
        self._metadata = compiled.packed_metadata

    def launch(self, programs: int, values: Sequence[Any]) -> None:
        """Launches on the current stream; `values` of the varying arguments in their order."""
        arguments = self._values.copy()
        if INTERPRETED:
            for index, value in zip(self._varying, values, strict=True):
                arguments[index] = value
            self._kernel[(programs,)](*arguments)
            return
        for index, value in zip(self._varying, values, strict=True):
            arguments[index] = value.data_ptr() if isinstance(value, Tensor) else value
        device = self._device.index
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                self._launch(programs, device, arguments)
        else:
            self._launch(programs, device, arguments)

    def _launch(self, programs: int, device: int, arguments: list[Any]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        if not _KNOWN_LAUNCHER:
            self._compiled[(programs, 1, 1)](*arguments, stream=stream)
            return
        hooks = (None, None, None)  # launch metadata, enter, exit
        self._run(programs, 1, 1, stream, self._function, self._metadata, *hooks, *arguments)


def _load(
    kernel: Any,
    kinds: tuple,
    constants: tuple,
    warps: int,
    registers: int,
    device: torch.device,
) -> triton.compiler.CompiledKernel:
    """The kernel compiled and loaded on the current device, `device`, once.

    Under a lock: Triton marks a kernel as loaded before its function is there, so another thread
    could take half of it.
    """
    key = (kernel, kinds, constants, warps, registers, device)
    with _load_lock:
        if key not in _loaded:
            compiled = compile_kernel(
                kernel, dict(kinds), dict(constants), warps=warps, registers=registers
            )
            assert compiled.run is not None  # loads it
            _loaded[key] = compiled
        return _loaded[key]


def _raw(argument: Any) -> Any:
    """Tensors as addresses."""
    if isinstance(argument, tuple):
        return tuple(_raw(a) for a in argument)
    return argument.data_ptr() if isinstance(argument, Tensor) else argument
