"""What the frozen teacher says about every example, computed once and kept on disk or in memory.

Encoder states are stored without padding, so that short histories cost what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import Examples, TokenTable
from sidmlp.data.files import read_json, write_json
from sidmlp.progress import bar
from sidmlp.teacher import Teacher
from sidmlp.training.execution import Execution

ARRAYS = ("states", "token_offsets", "logits", "codes")
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

    def batch(self, index: np.ndarray, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, mask, logits and codes int64 [B, L] of some examples."""
        states, mask = self.batch_states(index, longest)
        return states, mask, self.batch_logits(index), torch.from_numpy(self.codes[index])


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
        return states, mask, self.logits[here].float(), self.codes[here]


@torch.no_grad()
def compute_features(
    teacher: Teacher,
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

    directory: memory-mapped files go there, and are read instead of computed when they are
    complete and of the same fingerprint. dtype: "float32" or "float16", of the stored numbers.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    execution = execution or Execution()
    key = {
        "fingerprint": fingerprint,
        "examples": len(examples),
        "dtype": dtype,
        "device": execution.device.type,
        "precision": execution.precision,
    }
    if directory is not None and _is_complete(directory, key):
        return _load(directory)
    teacher.to(execution.device)
    data = TokenTable(teacher.tokens, examples, item_codes, execution.device)
    offsets = np.concatenate([[0], np.cumsum(2 + data.lengths * teacher.tokens.num_levels)])
    shapes = {
        "states": (int(offsets[-1]), teacher.config.dim),
        "logits": (len(examples), sum(teacher.tokens.codes_per_level)),
    }
    features = Features(
        token_offsets=offsets,
        codes=item_codes[examples.target_items()],
        **{name: _allocate(directory, name, shape, dtype) for name, shape in shapes.items()},
    )
    training = teacher.training
    teacher.eval()
    size = batch_size or (1024 if execution.on_gpu else 256)
    for begin in bar(range(0, len(examples), size), "teacher features", progress):
        end = min(begin + size, len(examples))
        index = torch.arange(begin, end, device=execution.device)
        ids, mask = data.batch(index, int(data.lengths[begin:end].max()))
        with execution.autocast():
            states = teacher.encode(ids, mask)
            logits = teacher.decoder_logits(states, mask, data.target_codes(index)[:, None])[:, 0]
        kept = torch.cat(teacher.level_logits(logits), dim=1)
        features.states[offsets[begin] : offsets[end]] = states[mask].float().cpu().numpy()
        features.logits[begin:end] = kept.float().cpu().numpy()
    teacher.train(training)
    if directory is not None:
        np.save(directory / "token_offsets.npy", features.token_offsets)
        np.save(directory / "codes.npy", features.codes)
        for array in (features.states, features.logits):
            assert isinstance(array, np.memmap)
            array.flush()
        # The marker comes last: without it the arrays are taken for unfinished and made anew.
        write_json(directory / "features.json", key)
    return features


def _allocate(directory: Path | None, name: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    if directory is None:
        return np.empty(shape, dtype=DTYPES[dtype])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "features.json").unlink(missing_ok=True)
    return np.lib.format.open_memmap(
        directory / f"{name}.npy", mode="w+", dtype=DTYPES[dtype], shape=shape
    )


def _is_complete(directory: Path, key: dict[str, object]) -> bool:
    marker = directory / "features.json"
    return marker.is_file() and read_json(marker) == key


def _load(directory: Path) -> Features:
    return Features(**{name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS})
