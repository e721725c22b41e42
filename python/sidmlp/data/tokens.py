"""Histories as token sequences: [user token, codes of each item in order, end], right padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .split import Examples

MAX_LEVELS = 8  # what sidmlp_kernels loads
MAX_CODES = 32_767  # its codes are int16


def check_servable(codes_per_level: Sequence[int]) -> None:
    """ValueError unless sidmlp_kernels can load a student with so many levels and codes."""
    sizes = [int(size) for size in codes_per_level]
    if not 1 <= len(sizes) <= MAX_LEVELS or not all(1 <= size <= MAX_CODES for size in sizes):
        raise ValueError(
            f"codes_per_level: expected 1..{MAX_LEVELS} levels of 1..{MAX_CODES} codes, the level "
            f"for duplicates included, got {len(sizes)} levels of {sizes} codes; sidmlp_kernels "
            f"loads no others, so use fewer codes or levels"
        )


@dataclass(frozen=True)
class TokenSpec:
    """One vocabulary for padding, the codes of every level, user tokens and the end token.

    code_offsets: token of code c at level l is ``code_offsets[l - 1] + c``.
    max_items: a longer history keeps its newest items.
    """

    codes_per_level: tuple[int, ...]
    code_offsets: tuple[int, ...]
    user_offset: int
    num_user_tokens: int
    eos_id: int
    pad_id: int = 0
    max_items: int = 20

    @classmethod
    def for_codes(cls, codes_per_level: tuple[int, ...], max_items: int = 20) -> TokenSpec:
        """The default numbering: padding 0, then the levels one after another, user, end."""
        if not codes_per_level or min(codes_per_level) < 1:
            raise ValueError(f"codes_per_level must be positive counts, got {codes_per_level}")
        if max_items < 1:
            raise ValueError(f"max_items must be at least 1, got {max_items}")
        offsets = np.concatenate([[1], 1 + np.cumsum(codes_per_level)]).tolist()
        return cls(
            codes_per_level=tuple(codes_per_level),
            code_offsets=tuple(offsets[:-1]),
            user_offset=offsets[-1],
            num_user_tokens=1,
            eos_id=offsets[-1] + 1,
            max_items=max_items,
        )

    @property
    def num_levels(self) -> int:
        """L, the number of codes an item has."""
        return len(self.codes_per_level)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the end token is the last."""
        return self.eos_id + 1

    @property
    def max_tokens(self) -> int:
        """Length of the longest token sequence: user, ``max_items`` items, end."""
        return 2 + self.max_items * self.num_levels

    def as_dict(self) -> dict[str, Any]:
        """The ``tokens`` entry of a checkpoint's config.json, less what the student says."""
        fields = asdict(self)
        del fields["codes_per_level"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokenSpec:
        """What ``as_dict`` wrote, with ``codes_per_level`` beside it."""
        values: dict[str, Any] = dict(fields)
        for name in ("codes_per_level", "code_offsets"):
            values[name] = tuple(values[name])
        return cls(**values)

    def batch(self, histories: list[np.ndarray], codes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, T] and mask bool [B, T] (True = valid) of dense item histories.

        codes: int64 [num_items, L]. T is the longest sequence of the batch, 2 for empty histories.
        """
        lengths = np.asarray([min(len(h), self.max_items) for h in histories], dtype=np.int64)
        levels = self.num_levels
        ids = np.full((len(histories), 2 + int(lengths.max(initial=0)) * levels), self.pad_id)
        shift = np.asarray(self.code_offsets)
        for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            ids[row, 0] = self.user_offset
            ids[row, 1 : 1 + length * levels] = (
                codes[history[len(history) - length :]] + shift
            ).reshape(-1)
            ids[row, 1 + length * levels] = self.eos_id
        mask = np.arange(ids.shape[1])[None] < (2 + lengths * levels)[:, None]
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def batch_examples(self, examples: Examples, codes: np.ndarray) -> tuple[Tensor, Tensor]:
        """``batch`` of the histories of ``examples``."""
        return self.batch(
            [examples.history(e, self.max_items) for e in range(len(examples))], codes
        )
