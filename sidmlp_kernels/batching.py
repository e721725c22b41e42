"""Item histories -> token ids and mask, without a Python loop.

A request is [user token, codes of each item in order, eos], padded on the right; item i of a
request fills positions 1 + i*L .. (i+1)*L. A request without items is its user and eos. Of a longer
history the newest `max_items` items count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .host_memory import host_memory
from .known_items import KnownItems, id_array
from .spec import TokenSpec, check_choice
from .trie import host_library

UNKNOWN = ("raise", "drop")
_CPU = torch.device("cpu")

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Requests as an encoder takes them: ids int64 [B, T], mask bool [B, T] (True = a token).

    Raises ValueError for other dtypes and for shapes or devices that differ.
    """

    ids: Tensor
    mask: Tensor
    # Smallest and largest id, found once: on a GPU every look at a value waits for the device.
    _id_range: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, dtype in (("ids", torch.int64), ("mask", torch.bool)):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.ndim != 2:
                raise ValueError(
                    f"{name}: expected a {dtype} tensor [batch, tokens], got {describe(tensor)}; "
                    "make batches with Recommender.batch(histories)"
                )
        if self.ids.shape != self.mask.shape or self.ids.device != self.mask.device:
            raise ValueError(
                "mask: expected the shape and device of ids, "
                f"{describe(self.ids)}, got {describe(self.mask)}; build both together"
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """This batch on `device`."""
        return Batch(self.ids.to(device), self.mask.to(device))._with_range(self._id_range)

    def check_vocabulary(self, size: int) -> None:
        """ValueError unless every id is a row of an embedding of `size` tokens, padding too.

        A batch that `Recommender.batch` made knows its ids; of another they are read once.
        """
        if self._id_range is None:
            bounds = [int(i) for i in self.ids.aminmax()] if self.ids.numel() else [0, 0]
            self._with_range((bounds[0], bounds[1]))
        assert self._id_range is not None
        low, high = self._id_range
        if low < 0 or high >= size:
            raise ValueError(
                f"batch: expected token ids 0..{size - 1}, the encoder's vocabulary, got "
                f"{low if low < 0 else high}; make batches with this model's batch(histories)"
            )

    def _with_range(self, id_range: tuple[int, int] | None) -> Batch:
        object.__setattr__(self, "_id_range", id_range)
        return self


def describe(value: object) -> str:
    """What an error message calls `value`: a tensor by dtype, shape and device, else its type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__


def flatten_ids(
    sequences: object, name: str, *, none_is_empty: bool = False
) -> tuple[Int64Array, Int64Array]:
    """One integer sequence per request -> all ids in order int64 [N], lengths int64 [B].

    A request is a list, tuple, 1-D array or tensor (or None, if `none_is_empty`); a 2-D array or
    tensor is a batch of equally long ones. Raises ValueError that names the first wrong request.
    """
    flat_lists = host_library().flatten_lists(sequences, none_is_empty)
    if flat_lists is not None:
        return flat_lists
    # Whatever is no list of lists of plain ints: other sequences, and what is wrong.
    if isinstance(sequences, (np.ndarray, Tensor)) and sequences.ndim == 2:
        matrix = id_array(sequences, name)
        return matrix.reshape(-1), np.full(matrix.shape[0], matrix.shape[1], np.int64)
    if isinstance(sequences, (str, bytes, Mapping)) or not hasattr(sequences, "__iter__"):
        raise ValueError(
            f"{name}: expected one sequence of item ids per request, got "
            f"{describe(sequences)}; pass a list of lists"
        )
    requests: list[Any] = [
        () if none_is_empty and request is None else request for request in sequences
    ]
    rows = [_one_request(request, f"{name}[{i}]") for i, request in enumerate(requests)]
    lengths = np.array([len(row) for row in rows], np.int64)
    return np.concatenate(rows) if rows else np.empty(0, np.int64), lengths


def _one_request(request: Any, name: str) -> Int64Array:
    if isinstance(request, (str, bytes)) or not hasattr(request, "__len__"):
        raise ValueError(
            f"{name}: expected a sequence of item ids, got {request!r}; "
            "pass a list of ids, one list per request"
        )
    ids = id_array(request, name)
    if ids.ndim != 1:
        raise ValueError(
            f"{name}: expected item ids in one dimension, got shape {list(ids.shape)}; "
            "pass a list of ids, one list per request"
        )
    return ids


class RequestMemory:
    """ids int64 [B, T] and mask bool [B, T] in one piece of memory, so that one copy moves both.

    memory  int64 [words(B, T)] on any device; B and T are `batch` and `tokens`
    """

    def __init__(self, memory: Tensor, batch: int, tokens: int) -> None:
        self.memory = memory
        self.ids = memory.as_strided((batch, tokens), (tokens, 1))
        begin = 16 * -(-batch * tokens // 2)
        self.mask = memory.view(torch.bool).as_strided((batch, tokens), (tokens, 1), begin)

    @staticmethod
    def words(batch: int, tokens: int) -> int:
        """ids, then the mask at a multiple of 16 bytes."""
        return 2 * -(-batch * tokens // 2) + -(-batch * tokens // 8)

    @classmethod
    def on_host(cls, batch: int, tokens: int, device: torch.device) -> RequestMemory:
        """Uninitialised, on the CPU, to be copied to `device` (see host_memory)."""
        memory = host_memory((cls.words(batch, tokens),), torch.int64, device)
        return cls(memory, batch, tokens)

    def to(self, device: torch.device) -> RequestMemory:
        """A copy on another device, enqueued on its current stream; see host_memory."""
        memory = self.memory.to(device, non_blocking=True)
        return RequestMemory(memory, *self.ids.shape)

    def batch(self, tokens: TokenSpec) -> Batch:
        """As a Batch of requests that `tokens` laid out."""
        # eos is the largest id of a TokenSpec, and none is negative.
        return Batch(self.ids, self.mask)._with_range((0, tokens.eos_id))


@dataclass
class Histories:
    """Checked histories that are not yet tokens.

    items    int64 [N], of all requests in order, oldest first
    lengths  int64 [B]
    users    int64 [B], each request's user token; None: the one without an id, for all
    """

    items: Int64Array
    lengths: Int64Array
    users: Int64Array | None
    unknown: str

    @classmethod
    def read(
        cls, histories: object, tokens: TokenSpec, users: Sequence[int | None] | None, unknown: str
    ) -> Histories:
        """See make_batch."""
        check_choice(unknown, "unknown", UNKNOWN)
        items, lengths = flatten_ids(histories, "histories")
        given = None if users is None else _user_tokens(users, len(lengths), tokens)
        return cls(items, lengths, given, unknown)

    def __len__(self) -> int:
        return len(self.lengths)

    def longest(self, tokens: TokenSpec) -> int:
        """Tokens of the longest request."""
        most = int(self.lengths.max()) if len(self.lengths) else 0
        return 2 + min(most, tokens.max_items) * len(tokens.code_offsets)

    def place(
        self,
        known: KnownItems,
        tokens: TokenSpec,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_],
    ) -> bool:
        """Fills ids and mask [B, T], T >= longest(tokens), as KnownItems has the items.

        False if unknown items had to be dropped from these Histories: place them again. Raises
        ValueError, which names them, where they are not to be dropped.
        """
        first_unknown = host_library().place_requests(
            self.items,
            self.lengths,
            self.users,
            *_layout(known, tokens),
            ids,
            mask,
        )
        if first_unknown < 0:
            return True
        self.drop_unknown(known)
        return False

    def drop_unknown(self, known: KnownItems) -> None:
        """Forgets items that are not known, where there are some; ValueError for them where they
        are not to be dropped."""
        found = known.lookup(self.items) >= 0
        if found.all():
            return
        request = np.repeat(np.arange(len(self)), self.lengths)
        if self.unknown == "raise":
            _raise_unknown(self.items, request, found)
        self.items = self.items[found]
        self.lengths = np.bincount(request[found], minlength=len(self))


def _layout(known: KnownItems, tokens: TokenSpec) -> tuple[Any, ...]:
    """What the host library takes of both."""
    return (
        *known.index,
        known.codes,
        tokens.code_offsets,
        tokens.user_offset,
        tokens.eos_id,
        tokens.pad_id,
        tokens.max_items,
    )


def place_lists(
    histories: object,
    known: KnownItems,
    tokens: TokenSpec,
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.bool_],
) -> bool:
    """Fills ids and mask [B, T] from lists of plain ints, all known, without users, in one call.

    False where the histories are not of that kind, not B or need more than T tokens: Histories
    takes them or says what is wrong with them.
    """
    placed: bool = host_library().place_lists(histories, *_layout(known, tokens), ids, mask)
    return placed


def make_batch(
    histories: object,
    known: KnownItems,
    tokens: TokenSpec,
    *,
    users: Sequence[int | None] | None = None,
    unknown: str = "raise",
    device: torch.device = _CPU,
) -> Batch:
    """Item id histories, oldest first, one per request -> Batch on `device`.

    known    the items that histories may contain; its codes lie in the tokens' ranges
    users    one id >= 0 (or None) per request: token user_offset + id mod num_user_tokens
    unknown  "raise", or "drop" to skip ids that are not known
    T is the longest request of this batch, at most 2 + max_items * L. The copy to a GPU is enqueued
    on its current stream; nothing waits for it.

    Raises ValueError for unknown items (named with their request), wrong types and wrong lengths.
    """
    read = Histories.read(histories, tokens, users, unknown)
    while True:
        made = RequestMemory.on_host(len(read), read.longest(tokens), device)
        if read.place(known, tokens, made.ids.numpy(), made.mask.numpy()):
            break
    return (made if device.type == "cpu" else made.to(device)).batch(tokens)


def _raise_unknown(flat: Int64Array, request: Int64Array, found: npt.NDArray[np.bool_]) -> None:
    first = int(request[~found][0])
    strange = flat[(request == first) & ~found]
    shown = ", ".join(map(str, strange[:5].tolist())) + (", .." if len(strange) > 5 else "")
    requests = len(np.unique(request[~found]))
    raise ValueError(
        f"histories[{first}]: expected items that the catalogue knows, got unknown item ids "
        f"{shown} ({np.count_nonzero(~found)} unknown in {requests} of the requests); "
        'pass unknown="drop" to skip them, or a catalogue with these known_codes'
    )


def _user_tokens(users: Any, batch: int, tokens: TokenSpec) -> Int64Array:
    if isinstance(users, (str, bytes)) or not hasattr(users, "__len__") or len(users) != batch:
        got = len(users) if hasattr(users, "__len__") else describe(users)
        raise ValueError(
            f"users: expected one id per request, {batch}, got {got}; "
            "pass a list of ids, with None for a user without one"
        )
    # Token 0 of the users is also the one for a request without an id.
    ids = id_array([0 if user is None else user for user in users], "users")
    if ids.shape != (batch,) or ids.min(initial=0) < 0:
        raise ValueError(
            f"users: expected ids >= 0, one per request, got {users!r}; use None for no id"
        )
    return tokens.user_offset + ids % tokens.num_user_tokens
