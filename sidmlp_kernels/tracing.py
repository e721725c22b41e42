"""Named NVTX ranges around the library's calls, for a timeline of Nsight Systems; off by default.

    SIDMLP_NVTX=1 nsys profile --trace=cuda,nvtx python serve.py

or `sidmlp_kernels.tracing.enable()` in a program. Ranges are named "sidmlp.<call>", as in
sidmlp.decode_states around sidmlp.plan.decode_states around the launch; they show what the host
does when, and which kernels a call launched. The replay of a CUDA graph is one range.

Off, nothing is wrapped: `enable` puts wrappers in the place of the methods that `traced` marks and
`disable` takes them out, so a bound method that was taken before keeps what it had. (A wrapper that
looks whether it is on cost a call 0.5 to 1 us of 35, AMD EPYC, 2026-11-22.) Compiled code
(torch.compile, torch.export) has no ranges: a push is no part of a graph.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

logger = logging.getLogger("sidmlp_kernels")

VARIABLE = "SIDMLP_NVTX"
PREFIX = "sidmlp."

Method = TypeVar("Method", bound=Callable[..., Any])

_nvtx: Any = None  # torch.cuda.nvtx while ranges are on
_methods: list[_Traced] = []


def enable() -> None:
    """Ranges from now on, in every thread. Does not initialise CUDA.

    Raises RuntimeError where torch sees no GPU: its NVTX calls would raise, each of them.
    """
    global _nvtx
    if not torch.cuda.device_count():  # asks the driver's management library, unlike is_available
        raise RuntimeError(
            "tracing: expected a CUDA build of torch and a GPU for NVTX ranges, got torch "
            f"{torch.__version__} without a GPU; run on one, or leave tracing off (unset "
            f"{VARIABLE})"
        )
    _nvtx = torch.cuda.nvtx
    for method in _methods:
        setattr(method.owner, method.name, method.wrapper)


def disable() -> None:
    """No further ranges; those that are open are closed when their calls end."""
    global _nvtx
    _nvtx = None
    for method in _methods:
        setattr(method.owner, method.name, method.function)


def enabled() -> bool:
    """Whether ranges are on."""
    return _nvtx is not None


def traced(name: str) -> Callable[[Method], Method]:
    """Marks a method: while tracing is on, its calls are ranges "sidmlp.<name>".

    A range ends with its call, also by an exception. Methods only: the class is where `enable`
    finds them.
    """

    def mark(function: Method) -> Method:
        return cast(Method, _Traced(PREFIX + name, function))

    return mark


class _Traced:
    """A method of a class that is being made; gives its place to the function at once."""

    def __init__(self, label: str, function: Callable[..., Any]) -> None:
        self.function, self.wrapper = function, _ranged(label, function)

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name
        _methods.append(self)
        setattr(owner, name, self.wrapper if enabled() else self.function)


def _ranged(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nvtx = _nvtx  # read once: what is pushed is popped, whoever disables meanwhile
        if nvtx is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        nvtx.range_push(label)
        try:
            return function(*args, **kwargs)
        finally:
            nvtx.range_pop()

    return call


def _from_environment() -> None:
    """What SIDMLP_NVTX asks for; a log line, never an exception, where that is impossible."""
    value = os.environ.get(VARIABLE, "")
    if value == "1":
        try:
            enable()
        except RuntimeError as error:
            logger.warning("%s=1 has no effect: %s", VARIABLE, error)
    elif value not in ("", "0"):
        logger.warning("%s: expected 0 or 1, got %r; ranges stay off", VARIABLE, value)


_from_environment()
