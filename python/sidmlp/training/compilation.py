"""``torch.compile`` for parts of training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch._dynamo.eval_frame
import torch._functorch.config

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """``function`` compiled as one graph, when it is first called.

    It is compiled for the shapes of the first call and, when others come, once more for any: twice,
    not once for every length of batch. What was compiled of the same code before, for a model of
    another size say, is forgotten; and the process keeps no AOTAutograd cache from now on.
    """
    # There may be eight of one code, and a sweep trains more models.
    torch._dynamo.eval_frame.reset_code(function.__code__)
    # What would be cached is pickled in autograd's own thread, whose stack is too small for a
    # backward graph of this size: a segmentation fault (torch 2.11, Python 3.12, H200, 2026-11-22).
    torch._functorch.config.enable_autograd_cache = False
    return cast(F, torch.compile(function, fullgraph=True))
