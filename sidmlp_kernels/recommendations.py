"""What a decode answers, and how it comes to the host in one copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .host_memory import host_memory
from .ops.library import Results
from .trie import host_library


@dataclass(frozen=True)
class PackedResults:
    """items, scores, codes, counts of `size` requests one after the other in one int32 [N]."""

    memory: Tensor
    size: int
    k: int
    levels: int

    @classmethod
    def of(cls, results: Results) -> PackedResults:
        """A copy of `results`, on their device."""
        size, k, levels = results[2].shape
        memory = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in results])
        return cls(memory, size, k, levels)

    @staticmethod
    def words(size: int, k: int, levels: int) -> int:
        """Length of `memory`."""
        return size * (k * (3 + levels) + 1)

    def in_(self, memory: Tensor) -> PackedResults:
        """The same of other memory, which has been or will be filled from this one."""
        return PackedResults(memory, self.size, self.k, self.levels)

    def first(self, batch: int) -> Results:
        """The first `batch` of the requests, as views."""
        size, k, levels = self.size, self.k, self.levels
        scores_at = 2 * size * k
        codes_at = scores_at + size * k
        counts_at = codes_at + size * k * levels
        return (
            self.memory[: 2 * batch * k].view(torch.int64).view(batch, k),
            self.memory.view(torch.float32).as_strided((batch, k), (k, 1), scores_at),
            self.memory.as_strided((batch, k, levels), (k * levels, levels, 1), codes_at),
            self.memory.as_strided((batch,), (1,), counts_at),
        )

    def recommendations(self, batch: int, catalogue_version: int) -> Recommendations:
        """The first `batch` of the requests; they share this memory."""
        made = Recommendations(*self.first(batch), catalogue_version)
        object.__setattr__(made, "_packed", self)
        return made


@dataclass(frozen=True, eq=False)
class Recommendations:
    """What a decode found, best first, for each of B requests.

    items              int64 [B, k] item ids, -1 past counts
    scores             float32 [B, k] weighted log-probabilities, or what `rescore` said; -inf past
                       counts
    codes              int32 [B, k, L] semantic IDs, -1 past counts
    counts             int32 [B] how many of the k are real
    catalogue_version  of the catalogue that all of these come from
    """

    items: Tensor
    scores: Tensor
    codes: Tensor
    counts: Tensor
    catalogue_version: int
    # Where the four lie side by side: that can be copied as one.
    _packed: PackedResults | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.items.shape[0]

    def packed(self) -> PackedResults:
        """The four in one piece of memory, theirs if they lie so already; see PackedResults."""
        if self._packed is not None:
            return self._packed
        return PackedResults.of((self.items, self.scores, self.codes, self.counts))

    def cpu(self) -> Recommendations:
        """These on the CPU: one copy, and one wait for the current stream of their device.

        From a GPU they lie in page-locked memory, as long as they are kept.
        """
        device = self.items.device
        if device.type == "cpu":
            return self
        packed = self.packed()
        memory = host_memory(tuple(packed.memory.shape), torch.int32, device)
        memory.copy_(packed.memory, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
        return packed.in_(memory).recommendations(len(self), self.catalogue_version)

    def item_lists(self) -> list[list[int]]:
        """Item ids of each request, best first, real ones only: counts[b] of them for request b.

        From a GPU these alone are copied, with one wait for its current stream.
        """
        items, counts = self.items, self.counts
        if items.device.type != "cpu":
            at = 2 * items.numel()
            memory = host_memory((at + len(self),), torch.int32, items.device)
            items, counts = memory[:at].view(torch.int64).view(items.shape), memory[at:]
            items.copy_(self.items, non_blocking=True)
            counts.copy_(self.counts, non_blocking=True)
            torch.cuda.current_stream(self.items.device).synchronize()
        return lists_of(items.contiguous().numpy(), counts.contiguous().numpy())


def lists_of(items: npt.NDArray[np.int64], counts: npt.NDArray[np.int32]) -> list[list[int]]:
    """items [B, k], counts [B] -> the first counts[b] of each row."""
    lists: list[list[int]] = host_library().item_lists(items, counts)
    return lists
