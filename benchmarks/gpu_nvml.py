"""This process's GPU as nvidia-ml-py sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Unavailable(RuntimeError):
    """nvidia-ml-py cannot tell; the message says why."""


@contextlib.contextmanager
def this_gpu() -> Iterator[tuple[Any, Any]]:
    """The module pynvml and the handle of torch's device 0; Unavailable where either is missing,
    and for whatever the driver refuses inside the block."""
    try:
        import pynvml
    except ImportError as error:
        raise Unavailable(f"nvidia-ml-py is not installed ({error})") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable(f"NVML: {error}") from error
    try:
        identity = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity)
    except pynvml.NVMLError as error:
        raise Unavailable(f"NVML: {error}") from error
    finally:
        pynvml.nvmlShutdown()
