"""Token ids of examples, formed on a device: ``TokenSpec.batch`` as a few gathers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .split import Examples
from .tokens import TokenSpec


class TokenTable:
    """Sequences, codes and positions of examples on one device; nothing waits for the device.

    lengths: int64 [n] on the CPU, the items of each example's history, at most ``spec.max_items``.
    """

    def __init__(
        self,
        spec: TokenSpec,
        examples: Examples,
        codes: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> None:
        """codes: int64 [num_items, L]."""
        self.spec = spec
        self.lengths = np.minimum(examples.targets - examples.starts, spec.max_items)
        self.items = torch.from_numpy(examples.items).to(device)
        self.codes = torch.from_numpy(codes).to(device)
        self.targets = torch.from_numpy(examples.targets).to(device)
        self._lengths = torch.from_numpy(self.lengths).to(device)
        self._tokens = self.codes + torch.tensor(spec.code_offsets, device=device)

    def __len__(self) -> int:
        return int(self.lengths.size)

    def batch(
        self, index: Tensor, longest: int, multiple: int = 1, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, T] and mask bool [B, T] of the examples at index, int64 [B].

        longest: no history has more items; T = 2 + longest L, rounded up to a multiple. dropout:
        share of a history's items left out, at random, but never the latest.
        """
        spec = self.spec
        length = self._lengths[index].clamp(max=longest)[:, None]
        first, thinned = self.targets[index][:, None] - length, None
        if dropout:
            thinned, length = _thinned(length, longest, dropout)
        width = -(-(2 + longest * spec.num_levels) // multiple) * multiple
        place = torch.arange(width, device=index.device)
        slot = torch.div(place - 1, spec.num_levels, rounding_mode="floor").clamp(min=0)
        level = (place - 1) % spec.num_levels
        position = first + (slot if thinned is None else thinned[:, slot.clamp(max=longest)])
        item = self.items[position.clamp(max=len(self.items) - 1)]
        end = 1 + length * spec.num_levels
        ids = self._tokens[item, level].masked_fill(place > end, spec.pad_id)
        ids = ids.masked_fill(place == end, spec.eos_id).masked_fill(place == 0, spec.user_offset)
        return ids, place <= end

    def target_codes(self, index: Tensor) -> Tensor:
        """Codes of the targets, int64 [B, L]."""
        return self.codes[self.items[self.targets[index]]]


def _thinned(length: Tensor, longest: int, dropout: float) -> tuple[Tensor, Tensor]:
    """Which of the first ``length``, int64 [B, 1], places stay: these, int64 [B, longest + 1], and
    their number, int64 [B, 1]."""
    place = torch.arange(longest, device=length.device).expand(len(length), -1)
    stays = torch.rand(place.shape, device=length.device) >= dropout
    stays = (stays | (place == length - 1)) & (place < length)
    # What does not stay goes to the last column, which nobody reads.
    column = torch.where(stays, stays.cumsum(1) - 1, longest)
    kept = length.new_zeros(len(length), longest + 1).scatter_(1, column, place)
    return kept, stays.sum(1, keepdim=True)
