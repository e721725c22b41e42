"""Tensors and plain values in one file: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidmlp.data.files import write_atomically


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers and strings, atomically.

    The same value makes the same bytes, so that a file's hash says what is in it.
    """
    # By way of memory: torch writes a file's name into the archive, and the temporary one differs
    # by process; of an open file it reports an interrupt or a full disk as a damaged archive.
    content = io.BytesIO()
    torch.save(value, content)
    write_atomically(path, lambda temporary: _write(temporary, content))


def _write(path: Path, content: io.BytesIO) -> None:
    with path.open("wb") as file:
        file.write(content.getbuffer())


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads what ``save_tensors`` wrote; raises ValueError when it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}); delete it and train again") from None


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below still use the old generator
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's random numbers stand, on the CPU and on ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Continues from what ``random_state`` said."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
