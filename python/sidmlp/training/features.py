"""What the frozen teacher says about every example, computed once and kept on disk or in memory.

Encoder states are stored without padding, so that short histories cost what they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import Examples, TokenSpec, TokenTable
from sidmlp.mlp_encoder import MLPEncoder
from sidmlp.states_by_role import states_by_role
from sidmlp.teacher import Distillable
from sidmlp.teacher.distillable import check_distillable, frozen, place, taught
from sidmlp.training.execution import Execution
from sidmlp.training.feature_store import Make, make_in_memory, make_on_disk
from sidmlp.training.memory import GIB, available_memory

logger = logging.getLogger(__name__)

DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Features:
    """Frozen teacher outputs of n examples.

    states: [tokens, D], valid encoder states of all examples, one example after another;
    token_offsets: int64 [n + 1]; logits: [n, C_1 + .. + C_L], the decoder's logits of each level's
    own codes under teacher forcing; codes: int64 [n, L], the target items' codes.
    """

    states: np.ndarray
    token_offsets: np.ndarray
    logits: np.ndarray
    codes: np.ndarray

    def __len__(self) -> int:
        return int(self.codes.shape[0])

    @property
    def lengths(self) -> np.ndarray:
        """How many states each example has, int64 [n]."""
        return np.diff(self.token_offsets)

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays."""
        arrays = (self.states, self.token_offsets, self.logits, self.codes)
        return sum(array.nbytes for array in arrays)

    def batch_states(self, index: np.ndarray, longest: int = 0) -> tuple[Tensor, Tensor]:
        """Encoder states float32 [B, T, D], zero padded, and mask bool [B, T] of some examples.

        T is at least ``longest``; no example has states where the index is -1.
        """
        begin = self.token_offsets[index]
        lengths = np.where(index >= 0, self.token_offsets[index + 1] - begin, 0)
        width = max(longest, int(lengths.max(initial=0)))
        mask = np.arange(width)[None] < lengths[:, None]
        rows, columns = np.nonzero(mask)
        states = np.zeros((*mask.shape, self.states.shape[1]), dtype=np.float32)
        states[rows, columns] = self.states[begin[rows] + columns]
        return torch.from_numpy(states), torch.from_numpy(mask)

    def batch_logits(self, index: np.ndarray) -> Tensor:
        """Teacher logits float32 [B, C_1 + .. + C_L] of some examples."""
        return torch.from_numpy(self.logits[index].astype(np.float32))

    def batch_targets(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits and codes int64 [B, L] of some examples."""
        return self.batch_logits(index), torch.from_numpy(self.codes[index])

    def batch(self, index: np.ndarray, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, mask, logits and codes of some examples."""
        return *self.batch_states(index, longest), *self.batch_targets(index)

    def without_states(self) -> Features:
        """The logits and codes alone, for who makes states anew each time."""
        return replace(self, states=self.states[:1])


class FeatureTable:
    """``Features`` on a GPU, whose batches are gathers there; nothing waits for the device."""

    def __init__(self, features: Features, device: torch.device) -> None:
        self.states, self.logits, self.codes, self._offsets = (
            torch.from_numpy(np.array(array)).to(device)
            for array in (features.states, features.logits, features.codes, features.token_offsets)
        )

    @staticmethod
    def fits(features: Features, device: torch.device) -> bool:
        """Whether the features take at most half of the GPU's free memory."""
        free, _ = torch.cuda.mem_get_info(device)
        return 2 * features.num_bytes <= free

    def batch(self, index: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``Features.batch``, index int64 [B] on the device; T = longest, and no example has
        more states."""
        here = index.clamp(min=0)
        begin = self._offsets[here][:, None]
        place = torch.arange(longest, device=index.device)
        mask = (begin + place < self._offsets[here + 1][:, None]) & (index >= 0)[:, None]
        rows = (begin + place).clamp(max=len(self.states) - 1)
        states = self.states[rows].float() * mask[..., None]
        return states, mask, *self.batch_targets(index)

    def batch_targets(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Features.batch_targets``, index int64 [B] on the device."""
        here = index.clamp(min=0)
        return self.logits[here].float(), self.codes[here]


def compute_features(
    teacher: Distillable,
    examples: Examples,
    item_codes: np.ndarray,
    *,
    directory: Path | None = None,
    fingerprint: str = "",
    dtype: str = "float16",
    execution: Execution | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Features:
    """Runs the teacher in evaluation mode over ``examples``; item_codes: int64 [num_items, L].

    execution: the teacher is moved to its device. batch_size: by default 256, on a GPU 1024.

    directory: files go there, and are read instead of computed, as far as they are there, when they
    are of the same fingerprint; without it everything is in memory. Arrays that take more than half
    of the memory available stay on disk, memory-mapped. dtype: "float32" or "float16", of the
    stored numbers. Raises OSError on a full disk, which loses no complete shard, and ValueError
    where memory is too small and there is no directory.
    """
    check_distillable(teacher)
    execution = execution or Execution()
    place(teacher, execution.device)
    data = TokenTable(teacher.tokens, examples, item_codes, execution.device)
    offsets = np.concatenate([[0], np.cumsum(2 + data.lengths * teacher.tokens.num_levels)])

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        index = torch.arange(begin, end, device=execution.device)
        ids, mask = data.batch(index, int(data.lengths[begin:end].max()))
        with execution.autocast():
            states, logits = taught(teacher, ids, mask, data.target_codes(index)[:, None])
        kept = {"states": states[mask.to(states.device)], "logits": torch.cat(logits, dim=2)[:, 0]}
        return {name: _kept(rows, name, dtype) for name, rows in kept.items()}

    with frozen(teacher):
        arrays = _computed(
            make,
            {
                "states": (int(offsets[-1]), teacher.dim),
                "logits": (len(examples), sum(teacher.tokens.codes_per_level)),
            },
            dtype,
            len(examples),
            batch_size,
            "teacher features",
            progress,
            execution,
            directory,
            fingerprint,
        )
    return Features(token_offsets=offsets, codes=item_codes[examples.target_items()], **arrays)


def _kept(values: Tensor, name: str, dtype: str, who: str = "teacher") -> np.ndarray:
    """Values in their number format; ValueError where they are not finite in it."""
    with np.errstate(over="ignore"):
        found = values.float().cpu().numpy().astype(DTYPES[dtype])
    if not np.isfinite(found).all():
        raise ValueError(
            f"{who}: expected {name} that are finite in {found.dtype}, got NaN, infinity or "
            f"something beyond its range; give codes that cannot be a logit of -1e4, not of "
            f"-infinity, or keep features in float32"
        )
    return found


@torch.no_grad()
def own_states(
    encoder: MLPEncoder,
    tokens: TokenSpec,
    examples: Examples,
    item_codes: np.ndarray,
    features: Features,
    *,
    directory: Path | None = None,
    fingerprint: str = "",
    dtype: str = "float16",
    execution: Execution | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Features:
    """``features`` of ``examples`` with the encoder's states in the place of the teacher's.

    The encoder is in evaluation mode on execution's device; everything else as in
    ``compute_features``. fingerprint: of the encoder's weights, too.
    """
    execution = execution or Execution()
    data = TokenTable(tokens, examples, item_codes, execution.device)

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        index = torch.arange(begin, end, device=execution.device)
        ids, mask = data.batch(index, int(data.lengths[begin:end].max()))
        with execution.autocast():
            states = states_by_role(encoder, ids, mask)
        return {"states": _kept(states[mask], "states", dtype, who="encoder")}

    arrays = _computed(
        make,
        {"states": (int(features.token_offsets[-1]), encoder.config.dim)},
        dtype,
        len(examples),
        batch_size,
        "encoder states",
        progress,
        execution,
        directory,
        fingerprint,
    )
    return replace(features, states=arrays["states"])


def _computed(
    make: Make,
    shapes: dict[str, tuple[int, int]],
    dtype: str,
    examples: int,
    batch_size: int | None,
    label: str,
    progress: bool,
    execution: Execution,
    directory: Path | None,
    fingerprint: str,
) -> dict[str, np.ndarray]:
    """The arrays of all examples, in memory or memory-mapped."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    size = batch_size or (1024 if execution.on_gpu else 256)
    work = (make, shapes, np.dtype(DTYPES[dtype]), examples, size, label, progress)
    if directory is None:
        return make_in_memory(*work)
    key = {
        "fingerprint": fingerprint,
        "dtype": dtype,
        "device": execution.device.type,
        "precision": execution.precision,
    }
    arrays = make_on_disk(*work, directory=directory, key=key)
    needed, room = sum(array.nbytes for array in arrays.values()), available_memory()
    resident = 2 * needed <= room
    if progress:
        logger.info(
            "%s: %.2f GiB, %s, as %.2f GiB of memory are available",
            label,
            needed / GIB,
            "read into memory" if resident else f"read from {directory} as they are needed",
            room / GIB,
        )
    return {name: np.array(array) for name, array in arrays.items()} if resident else arrays
