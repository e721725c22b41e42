"""Encoders bound to weights: checked and compiled once, then called many times.

A call checks its own tensors, allocates states and workspace from torch's caching allocator and
launches layers + 1 kernels on the current stream (encode_t5.py, encode_mlp.py). A batch whose
workspace would be too large goes in parts, one after another. Any thread may make a call.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sidmlp_kernels.ops.triton import encode_mlp, encode_t5
from sidmlp_kernels.ops.triton import encoder_problem as problem
from sidmlp_kernels.ops.triton.compiler import Pointer
from sidmlp_kernels.ops.triton.encoder_packing import padded_hidden, power_of_two
from sidmlp_kernels.ops.triton.encoder_problem import MlpSizes, T5Sizes
from sidmlp_kernels.ops.triton.encoder_tiles import choose_encoder_tiles
from sidmlp_kernels.ops.triton.launch import (
    MAX_WORKSPACE,
    PROGRAMS_PER_MULTIPROCESSOR,
    BoundKernel,
    Bytes,
    Multiple,
    multiprocessors,
    shared_kilobytes,
)
from sidmlp_kernels.ops.triton.scratch import ALIGNMENT

LISTED_TOKENS = 128  # whose masks are read at a time

# Arguments that a launch gives anew. Batches that are cut elsewhere begin at any address; one code
# for all of them has one order of every sum.
_TOKENS = {"ids": Pointer(torch.int64, False), "mask": Pointer(torch.bool, False)}


def _offsets(sizes: Sequence[int]) -> tuple[list[Bytes], int]:
    """Where arrays of so many bytes begin, one after another, and where the last one ends."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(Bytes(end))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


class _Bound(abc.ABC):
    """What both encoders share: states, parts of a batch, kernels."""

    def __init__(self, tensors: Sequence[Tensor], eps: float, device: torch.device) -> None:
        self.eps = problem.check_eps(eps)
        self.tensors = tuple(tensors)
        self.device = device

    def _set_tiles(self, dtype: torch.dtype, dim: int, head_dim: int = 16) -> None:
        self.dtype, self.dim, self.wide = dtype, dim, power_of_two(dim)
        half = dtype != torch.float32
        head = power_of_two(head_dim)
        shared = shared_kilobytes(self.device)
        self.tiles = choose_encoder_tiles(half, self.wide, head, shared)
        self.element = dtype.itemsize
        # Rows that products read in parts pass through memory.
        self.kept = self.element if self.tiles.inner < self.wide else 0

    def _kernel(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        varying: Mapping[str, Any],
    ) -> BoundKernel:
        workspace = torch.empty(0, dtype=torch.int8, device=self.device)
        given = {"tokens": 1, "blocks": 1, "first_request": 0, "workspace": workspace, **varying}
        tiles = {"DP": self.wide, **constants}
        return BoundKernel(
            kernel,
            {**arguments, **given},
            tiles,
            list(given),
            warps=self.tiles.warps,
            registers=255,
            device=self.device,
        )

    def _states(self) -> Tensor:
        """Stands for the states."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _encode(self, ids: Tensor, mask: Tensor, most: int | None) -> Tensor:
        problem.check_tokens(ids, mask, self.device, most)
        batch, tokens = ids.shape
        states = torch.empty((batch, tokens, self.dim), dtype=self.dtype, device=self.device)
        if states.numel() == 0:
            return states
        part = min(batch, max(1, MAX_WORKSPACE // self._request_bytes(tokens)))
        for first in range(0, batch, part):
            self._launch(ids, mask, states, first, min(part, batch - first), tokens)
        return states

    @abc.abstractmethod
    def _request_bytes(self, tokens: int) -> int:
        """How much scratch memory a request takes."""

    @abc.abstractmethod
    def _launch(
        self, ids: Tensor, mask: Tensor, states: Tensor, first: int, requests: int, tokens: int
    ) -> None:
        """Encodes `requests` requests from `first` on into states."""


class BoundT5(_Bound):
    """`encode_t5` for one set of weights."""

    def __init__(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], eps: float, device: torch.device
    ) -> None:
        super().__init__(tensors, eps, device)
        s = self.sizes = T5Sizes.of(sizes)
        self._set_tiles(problem.check_t5(s, tensors, device), s.dim, s.head_dim)
        tiles, layers = self.tiles, [tensors[i : i + 7] for i in range(3, len(tensors), 7)]
        constants = {
            "ROWS": tiles.rows,
            "INNER": tiles.inner,
            "COLUMNS": tiles.columns,
            "STAGES": tiles.stages,
        }
        shared = {
            "dim": Multiple(s.dim),
            "width": Multiple(s.width),
            "eps": self.eps,
        }
        anew = {"states": self._states(), "offsets": (Bytes(0),) * 9}
        self._embed = self._kernel(
            encode_t5.t5_embed_kernel,
            {
                **shared,
                "embedding": tensors[0],
                "norms": tensors[2],
                **dict(zip(("query", "key", "value"), layers[0][:3], strict=True)),
                "vocab_size": s.vocab_size,
            },
            {**constants, "TOKENS": LISTED_TOKENS},
            {**_TOKENS, **anew},
        )
        self._layers = []
        for i, (*_, output, ffn_in, ffn_up, ffn_out) in enumerate(layers):
            following = layers[min(i + 1, s.num_layers - 1)][:3]
            self._layers.append(
                self._kernel(
                    encode_t5.t5_layer_kernel,
                    {
                        **shared,
                        "norms": tensors[2][2 * i + 1 :],
                        "position_bias": tensors[1],
                        "output": output,
                        "ffn_in": ffn_in,
                        "ffn_up": ffn_up,
                        "ffn_out": ffn_out,
                        **dict(zip(("query", "key", "value"), following, strict=True)),
                        "num_heads": s.num_heads,
                        "ffn_dim": Multiple(padded_hidden(s.ffn_dim)),
                        "bias_tokens": s.bias_tokens,
                        "last": int(i == s.num_layers - 1),
                    },
                    {
                        **constants,
                        "ACTIVATION": s.activation,
                        "FITTED": self.dtype != torch.float32,
                        "KEYS": tiles.keys,
                        "HEAD": power_of_two(s.head_dim),
                        "HIDDEN": tiles.hidden,
                    },
                    anew,
                )
            )

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] -> states [B, T, D]."""
        return self._encode(ids, mask, None)

    def _arrays(self, requests: int, tokens: int) -> list[int]:
        """Bytes of counts, positions, residual, normed, query and twice keys and values."""
        rows, width = requests * tokens, self.sizes.width * self.element
        sizes = [4 * requests, 4 * rows, 4 * rows * self.wide, rows * self.wide * self.kept]
        return sizes + [rows * width] * 5

    def _request_bytes(self, tokens: int) -> int:
        return sum(self._arrays(1, tokens))

    def _launch(
        self, ids: Tensor, mask: Tensor, states: Tensor, first: int, requests: int, tokens: int
    ) -> None:
        offsets, end = _offsets(self._arrays(requests, tokens))
        odd = (*offsets[:5], *offsets[7:], *offsets[5:7])  # places of a layer and the next swapped
        workspace = torch.empty(end, dtype=torch.int8, device=self.device)
        blocks = -(-tokens // self.tiles.rows)
        work = (tokens, blocks, first, workspace)
        self._embed.launch(requests * blocks, (*work, ids, mask, states, odd))
        for i, layer in enumerate(self._layers):
            layer.launch(requests * blocks, (*work, states, odd if i % 2 else tuple(offsets)))


class BoundMlp(_Bound):
    """`encode_mlp` for one set of weights."""

    def __init__(
        self, tensors: Sequence[Tensor], sizes: Sequence[int], eps: float, device: torch.device
    ) -> None:
        super().__init__(tensors, eps, device)
        s = self.sizes = MlpSizes.of(sizes)
        self._set_tiles(problem.check_mlp(s, tensors, device), s.dim)
        tiles, layers = self.tiles, [tensors[i : i + 5] for i in range(3, len(tensors), 5)]
        self._width = padded_hidden(s.hidden_dim)
        shared = {"num_roles": s.num_roles, "dim": Multiple(s.dim)}
        anew = {"states": self._states(), "offsets": (Bytes(0),) * 6}
        self._embed = self._kernel(
            encode_mlp.mlp_embed_kernel,
            {
                **shared,
                "embedding": tensors[0],
                "embedding_positions": tensors[1],
                "vocab_size": s.vocab_size,
            },
            {"TOKENS": LISTED_TOKENS, "ROWS": tiles.role_rows},
            {**_TOKENS, **anew},
        )
        names = ("token_weight", "mean_weight", "vectors", "out_weight", "out_bias")
        self._layers = [
            self._kernel(
                encode_mlp.mlp_layer_kernel,
                {
                    **shared,
                    "norm": tensors[2],
                    **dict(zip(names, layer, strict=True)),
                    "hidden_dim": s.hidden_dim,
                    "width": Multiple(self._width),
                    "last": int(i == s.num_layers - 1),
                    "eps": self.eps,
                },
                {
                    "FITTED": self.dtype != torch.float32,
                    "ROWS": tiles.role_rows,
                    "HIDDEN": tiles.hidden,
                    "INNER": tiles.inner,
                    "STAGES": tiles.stages,
                },
                {**anew, "roles": 1},
            )
            for i, layer in enumerate(layers)
        ]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] -> states [B, T, D]; T at most max_length."""
        return self._encode(ids, mask, self.sizes.max_length)

    def _arrays(self, requests: int, tokens: int, programs: int) -> list[int]:
        """Bytes of counts, lists, twice x, and hidden and rounded rows of each program."""
        roles, rows = requests * self.sizes.num_roles, requests * tokens
        own = self.tiles.role_rows
        sizes = [4 * roles, 4 * roles * tokens, *(2 * [4 * rows * self.wide])]
        return [
            *sizes,
            4 * programs * own * self._width,
            programs * (own + 1) * self.wide * self.kept,
        ]

    def _request_bytes(self, tokens: int) -> int:
        return sum(self._arrays(1, tokens, 0))

    def _launch(
        self, ids: Tensor, mask: Tensor, states: Tensor, first: int, requests: int, tokens: int
    ) -> None:
        s, roles = self.sizes, requests * self.sizes.num_roles
        longest = min(tokens, -(-tokens // s.num_roles) + 1)  # of one role
        blocks = -(-longest // self.tiles.role_rows)
        slice_bytes = 4 * self.tiles.role_rows * self._width
        most = min(
            PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(self.device),
            max(1, MAX_WORKSPACE // slice_bytes),
        )
        programs = min(roles * blocks, most)
        offsets, end = _offsets(self._arrays(requests, tokens, programs))
        places = (
            tuple(offsets),
            (*offsets[:2], offsets[3], offsets[2], *offsets[4:]),  # x of a layer and the next
        )
        workspace = torch.empty(end, dtype=torch.int8, device=self.device)
        work = (tokens, blocks, first, workspace)
        self._embed.launch(roles * blocks, (*work, ids, mask, states, places[1]))
        for i, layer in enumerate(self._layers):
            layer.launch(programs, (*work, states, places[i % 2], roles))


BoundEncoder = BoundT5 | BoundMlp


def bind_encoder(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    eps: float,
    form: int,
    device: torch.device,
) -> BoundEncoder:
    """The encoder that sizes of this length belong to: 8 of encode_t5, 6 of encode_mlp."""
    problem.check_form(form)
    if len(sizes) not in (6, 8):
        problem.fail(
            "encoder_sizes: expected 8 numbers (of encode_t5) or 6 (of encode_mlp), got "
            f"{len(sizes)}"
        )
    return (BoundT5 if len(sizes) == 8 else BoundMlp)(tensors, sizes, eps, device)
