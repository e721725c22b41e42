"""What the frozen teacher says about every example, computed once and kept on disk or in memory.

Encoder states are stored without padding, so that short histories cost what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.data import Examples
from sidmlp.data.files import read_json, write_json
from sidmlp.progress import bar
from sidmlp.teacher import Distillable
from sidmlp.teacher.distillable import check_distillable, frozen, taught

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

    def batch_states(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Encoder states float32 [B, T, D], zero padded, and mask bool [B, T] of some examples."""
        begin = self.token_offsets[index]
        lengths = self.token_offsets[index + 1] - begin
        mask = np.arange(int(lengths.max(initial=0)))[None] < lengths[:, None]
        rows, columns = np.nonzero(mask)
        states = np.zeros((*mask.shape, self.states.shape[1]), dtype=np.float32)
        states[rows, columns] = self.states[begin[rows] + columns]
        return torch.from_numpy(states), torch.from_numpy(mask)

    def batch_logits(self, index: np.ndarray) -> Tensor:
        """Teacher logits float32 [B, C_1 + .. + C_L] of some examples."""
        return torch.from_numpy(self.logits[index].astype(np.float32))


def compute_features(
    teacher: Distillable,
    examples: Examples,
    item_codes: np.ndarray,
    *,
    directory: Path | None = None,
    fingerprint: str = "",
    dtype: str = "float16",
    batch_size: int = 256,
    progress: bool = True,
) -> Features:
    """Runs the teacher in evaluation mode over ``examples``; item_codes: int64 [num_items, L].

    directory: memory-mapped files go there, and are read instead of computed when they are
    complete and of the same fingerprint. dtype: "float32" or "float16", of the stored numbers.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_distillable(teacher)
    key = {"fingerprint": fingerprint, "examples": len(examples), "dtype": dtype}
    if directory is not None and _is_complete(directory, key):
        return _load(directory)
    spec = teacher.tokens
    sizes = np.minimum(examples.targets - examples.starts, spec.max_items)
    offsets = np.concatenate([[0], np.cumsum(2 + sizes * spec.num_levels)])
    shapes = {
        "states": (int(offsets[-1]), teacher.dim),
        "logits": (len(examples), sum(spec.codes_per_level)),
    }
    features = Features(
        token_offsets=offsets,
        codes=item_codes[examples.target_items()],
        **{name: _allocate(directory, name, shape, dtype) for name, shape in shapes.items()},
    )
    batches = range(0, len(examples), batch_size)
    with frozen(teacher):
        for begin in bar(batches, "teacher features", progress):
            end = min(begin + batch_size, len(examples))
            ids, mask = spec.batch_examples(examples.take(np.arange(begin, end)), item_codes)
            codes = torch.from_numpy(features.codes[begin:end])
            states, logits = taught(teacher, ids, mask, codes[:, None])
            # Half-precision teachers are stored as float32 or float16, too: numpy has no bfloat16.
            features.states[offsets[begin] : offsets[end]] = states.float().cpu()[mask].numpy()
            features.logits[begin:end] = torch.cat(logits, dim=2)[:, 0].float().cpu().numpy()
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
