"""The files of the release: weights as .pth, semantic IDs as one JSON object.

TIGER-*.pth               a state dict, names t5.<name in transformers>
SID-MLP, SID-MLP++ .pth   {"model_state_dict", "args": options of the training, "model_type", ..}
SID-MLP++ encoder .pth    a state dict
*.sem_ids                 {"<item>": [c_1, .., c_L], ..}; codes 0-based but for the last, which
                          counts the items on the same first codes, from 1

A .pth is unpickled with weights_only=True: tensors and plain values, never code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A published .pth: its flat state dict, the options it was trained with, what it says it is.

    args and model_type are empty where the file is a bare state dict; others: further keys.
    """

    path: Path
    state: dict[str, Tensor]
    args: Mapping[str, Any]
    model_type: str = ""
    others: tuple[str, ...] = ()

    @property
    def encoder(self) -> str | None:
        """Whose states a student reads: its "teacher"'s (SID-MLP), those of an encoder of its "own"
        (SID-MLP++), or None where the file does not say.

        The weights are alike, so nothing but these words tells: a model_type of the release, and
        encoder_ckpt, which is the path of the own encoder or None.
        """
        if self.model_type == "SID-MLP++" or self.args.get("encoder_ckpt"):
            return "own"
        if self.model_type == "SID-MLP":
            return "teacher"
        hints = [name for name in (*self.others, *self.args) if "encoder" in str(name).lower()]
        says_none = not self.model_type and hints == ["encoder_ckpt"]
        return "teacher" if says_none else None


def read_published(path: Path) -> Published:
    """Reads a .pth of the release; tensors on the CPU in the file's dtypes.

    Raises ValueError naming the file when it is missing, damaged, holds anything but tensors and
    plain values, or is no state dict of finite floating-point tensors.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; name the .pth file in it") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        # Where torch refuses to unpickle, it advises at length to unpickle all the same.
        lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is never "
            f"loaded ({reason}); fetch it again, or save its state dict alone"
        ) from None
    wrapped = isinstance(content, Mapping) and "model_state_dict" in content
    state = content["model_state_dict"] if wrapped else content
    args = (content.get("args") or {}) if wrapped else {}
    for what, value in (("a state dict", state), ("a dict as args", args)):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{path}: expected {what}, got {type(value).__name__}; name a .pth of the release"
            )
    if not state:
        raise ValueError(f"{path}: expected a state dict, got an empty one; fetch it again")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{path}: {name}: expected a floating-point tensor, got {got}; name a .pth of the "
                "release"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{path}: {name}: expected finite weights, got NaN or Inf; use another checkpoint"
            )
    state = {str(name): tensor for name, tensor in state.items()}
    if not wrapped:
        return Published(path, state, args)
    known = ("model_state_dict", "args", "model_type")
    others = tuple(str(name) for name in content if name not in known)
    return Published(path, state, args, str(content.get("model_type") or ""), others)


def read_semantic_ids(path: Path, codes_per_level: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Reads a .sem_ids file: item -> codes, in the file's order, codes kept as they are.

    The last code counts collisions from 1, so code 0 of the last level stays unused and a level of
    256 codes has room for 255 items on the same first codes.

    Raises ValueError naming the file, and the item whose codes are not integers in 0..C_l - 1.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; name the .sem_ids file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); fetch it again") from None
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno} is not JSON ({error.msg}); fetch "
            "it again"
        ) from None
    except (ValueError, RecursionError):  # integers of thousands of digits, endless brackets
        raise ValueError(f"{path} holds no item and its codes; fetch it again") from None
    if not text.lstrip().startswith("{") or not pairs:
        raise ValueError(
            f'{path}: expected a JSON object of items and their codes, {{"item": [1, 2, 3, 1]}}, '
            "got something else or no item; name the .sem_ids file of the release"
        )
    found: dict[str, tuple[int, ...]] = {}
    for item, codes in pairs:
        if item in found:
            raise ValueError(f"{path}: item {item!r} stands there twice; fetch the file again")
        found[item] = _checked_codes(path, item, codes, codes_per_level)
    return found


def codes_of_items(
    semantic_ids: Mapping[str, tuple[int, ...]], items: Sequence[str], what: str
) -> np.ndarray:
    """Codes int64 [len(items), L] of these items; `what` names the file in messages.

    Raises ValueError naming items that have no semantic ID.
    """
    without = [item for item in items if item not in semantic_ids]
    if without:
        named = ", ".join(map(repr, without[:3])) + (", .." if len(without) > 3 else "")
        raise ValueError(
            f"{what} has no semantic ID for {len(without)} of {len(items)} items: {named}; read "
            "the data of the same category and filter that the IDs were made for"
        )
    return np.asarray([semantic_ids[item] for item in items], dtype=np.int64)


def _checked_codes(
    path: Path, item: str, codes: Any, codes_per_level: Sequence[int]
) -> tuple[int, ...]:
    levels = len(codes_per_level)
    if not isinstance(codes, list) or len(codes) != levels:
        got = len(codes) if isinstance(codes, list) else type(codes).__name__
        raise ValueError(
            f"{path}: item {item!r}: expected a list of {levels} codes, got {got}; say with "
            "--codes how many codes the levels have"
        )
    for level, (code, size) in enumerate(zip(codes, codes_per_level, strict=True), start=1):
        if type(code) is not int or not 0 <= code < size:
            reason = (
                f"; the last code counts from 1, so {size - 1} items fit one ID"
                if level == levels and code == size
                else ""
            )
            raise ValueError(
                f"{path}: item {item!r}: expected a code in 0..{size - 1} at level {level}, got "
                f"{code!r}{reason}; the model has no token for it, so use IDs that fit it"
            )
    return tuple(codes)
