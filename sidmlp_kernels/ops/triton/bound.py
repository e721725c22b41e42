"""Operators bound to weights, catalogue and settings: checked once, then called many times.

A call checks its own tensors, allocates outputs and workspace from torch's caching allocator
(which keeps the order of streams and owns the pools of CUDA graphs) and launches once. Between
calls nothing is kept but what depends on kinds of arguments: any thread may make it, in vain at
worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sidmlp_kernels.ops.library import Results
from sidmlp_kernels.ops.triton import kernels, problem
from sidmlp_kernels.ops.triton.launch import (
    BoundKernel,
    Bytes,
    Multiple,
    is_aligned,
    multiprocessors,
    num_programs,
    shared_kilobytes,
)
from sidmlp_kernels.ops.triton.problem import Settings, Sizes
from sidmlp_kernels.ops.triton.scratch import Layout, layout_of
from sidmlp_kernels.ops.triton.tiles import MAX_DIM, choose_group, choose_tiles

MIN_TILE = 16
MAX_LAYOUTS = 256  # of different batches and tokens that are remembered
MIN_COLUMNS = 128  # of a tile of whole rows: narrow ones share one code
MAX_CANDIDATES = 1 << 18  # beams x codes of a chunk

# Arguments of every kernel that a launch gives anew.
_WORK = ("batch", "group", "workspace", "slice_bytes", "offsets")


def power_of_two(n: int, low: int = MIN_TILE) -> int:
    """The smallest power of two that is at least n and `low`."""
    return max(low, triton.next_power_of_2(n))


def sizes_argument(s: Sizes) -> tuple[int, ...]:
    """The kernels' `sizes`."""
    widths = map(Multiple, (s.dim, s.num_heads, s.head_dim, s.ffn_dim, s.hidden_dim))
    return (s.num_levels, *widths, s.num_blocks)


class Bound:
    """What the bound operators share: sizes, tiles, kernels by kind of arguments, layouts."""

    def __init__(self, sizes: Sequence[int], eps: float, device: torch.device) -> None:
        self.sizes = Sizes.of(sizes)
        problem.check_size(self.sizes.dim, 1, MAX_DIM, "dim")
        self.eps = eps
        self.device = device
        self._kernels: dict[Any, BoundKernel] = {}
        self._layouts: dict[tuple[int, int | None], Layout] = {}

    def _set_tiles(self, dtype: torch.dtype, beams: int) -> None:
        self.dtype = dtype
        shared = shared_kilobytes(self.device)
        self.tiles = choose_tiles(dtype != torch.float32, self.sizes.hidden_dim, beams, shared)
        columns = power_of_two(self.sizes.hidden_dim, MIN_COLUMNS)
        self._head_constants = {
            "FITTED": dtype != torch.float32,
            "FURTHER": self.sizes.num_blocks > 1,
            "DIM_COLUMNS": power_of_two(self.sizes.dim, MIN_COLUMNS),
            "COLUMNS": columns,
            "FULL": columns == self.sizes.hidden_dim,
            "ROWS": min(MIN_TILE, max(1, self.tiles.row_tile // columns)),
        }
        self._product_constants = {
            "N": self.tiles.n,
            "K": self.tiles.k,
            "STAGES": self.tiles.stages,
        }

    def _readout_constants(self, states_dtype: torch.dtype | None) -> dict[str, Any]:
        return {
            "FACTORED": self.factored if states_dtype is not None else False,
            "EXACT": self.dtype == torch.float32 or states_dtype != self.dtype,
            "DIM_COLUMNS": power_of_two(self.sizes.dim, MIN_COLUMNS),
            "EVEN_READOUT": self._even_readout(),
            "TOKENS": self.tiles.tokens,
            "POOL": self.tiles.pool,
        }

    factored = False

    def _even_readout(self) -> bool:
        s, n, k = self.sizes, self.tiles.n, self.tiles.k
        return not self.factored and all(
            width % n == 0 and width % k == 0 for width in (s.dim, s.ffn_dim)
        )

    def _rows(self) -> tuple[int, int]:
        """Rows of hidden vectors in scratch, and beams of a chunk."""
        return 0, 0

    def _work(self, batch: int, tokens: int | None) -> tuple[int, tuple[Any, ...]]:
        """Programs to launch, and values of _WORK."""
        group = choose_group(batch, multiprocessors(self.device))
        layout = self._layouts.get((group, tokens))
        if layout is None:
            rows, chunk = self._rows()
            layout = layout_of(self.sizes, group=group, tokens=tokens, rows=rows, chunk=chunk)
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[group, tokens] = layout
        programs = num_programs(batch, group, layout, self.device)
        workspace = torch.empty(programs * layout.slice_bytes, dtype=torch.int8, device=self.device)
        return programs, (batch, group, workspace, layout.slice_bytes, layout.offsets)

    def _kernel(
        self,
        key: Any,
        kernel: Any,
        arguments: dict[str, Any],
        constants: dict[str, Any],
        varying: Sequence[str],
    ) -> BoundKernel:
        """The kernel for this kind of arguments, made at its first use."""
        found = BoundKernel(
            kernel,
            {
                **arguments,
                "batch": 1,
                "group": 1,
                "slice_bytes": Bytes(0),
                "offsets": tuple(
                    map(Bytes, layout_of(self.sizes, group=1, tokens=None, rows=0, chunk=0).offsets)
                ),
                "sizes": sizes_argument(self.sizes),
                "eps": self.eps,
            },
            constants,
            (*varying, *_WORK),
            warps=self.tiles.warps,
            registers=self.tiles.registers,
            device=self.device,
        )
        self._kernels[key] = found
        return found


class BoundReadout(Bound):
    """`context_readout` for one set of weights."""

    def __init__(
        self, readout: Sequence[Tensor], sizes: Sequence[int], eps: float, device: torch.device
    ) -> None:
        super().__init__(sizes, eps, device)
        self.readout = tuple(readout)
        self.factored = problem.check_readout(self.sizes, readout, device)
        self._set_tiles(readout[0].dtype, MIN_TILE)

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D], mask bool [B, T] -> context float32 [B, D]."""
        problem.check_states(self.sizes, states, mask, self.device)
        batch, tokens = states.shape[0], states.shape[1]
        context = torch.empty((batch, self.sizes.dim), dtype=torch.float32, device=self.device)
        if batch == 0:
            return context
        programs, work = self._work(batch, tokens)
        key = (states.dtype, is_aligned(states), is_aligned(mask))
        kernel = self._kernels.get(key) or self._kernel(
            key,
            kernels.context_readout_kernel,
            {
                "states": states,
                "mask": mask,
                "tokens": tokens,
                "readout": self.readout,
                "context": context,
                "workspace": work[2],
            },
            {**self._readout_constants(states.dtype), **self._product_constants},
            ("states", "mask", "tokens", "context"),
        )
        kernel.launch(programs, (states, mask, tokens, context, *work))
        return context


class BoundLogits(Bound):
    """`level_logits` for one set of weights."""

    def __init__(
        self, heads: Sequence[Tensor], sizes: Sequence[int], eps: float, device: torch.device
    ) -> None:
        super().__init__(sizes, eps, device)
        self.heads = list(heads)
        self._set_tiles(problem.check_heads(self.sizes, heads, device), MIN_TILE)

    def _rows(self) -> tuple[int, int]:
        return MIN_TILE, 0

    def __call__(self, context: Tensor, prefix_codes: Tensor) -> Tensor:
        """context float32 [B, D], prefix_codes int32 [B, l] -> logits float32 [B, C_{l+1}]."""
        s = self.sizes
        if context.dim() != 2 or prefix_codes.dim() != 2:
            problem.fail(
                "context and prefix_codes: expected [rows, dim] and [rows, level], got "
                f"{list(context.shape)} and {list(prefix_codes.shape)}"
            )
        batch, level = context.shape[0], prefix_codes.shape[1]
        if level >= s.num_levels:
            problem.fail(
                f"prefix_codes: expected at most {s.num_levels - 1} codes a row, got {level}"
            )
        problem.check_context(s, context, self.device)
        problem.check_tensor(prefix_codes, "prefix_codes", torch.int32, (batch, level), self.device)
        logits = torch.empty((batch, s.num_codes[level]), dtype=torch.float32, device=self.device)
        if batch == 0:
            return logits
        programs, work = self._work(batch, None)
        key = (level, is_aligned(context), is_aligned(prefix_codes))
        width = problem.padded(s.hidden_dim)
        columns = slice(level * width, (level + 1) * width)
        vectors, table, blocks, out_weight, out_bias = self.heads[2 + 5 * level : 7 + 5 * level]
        kernel = self._kernels.get(key) or self._kernel(
            key,
            kernels.level_logits_kernel,
            {
                "context": context,
                "prefix_codes": prefix_codes,
                "level": level,
                "context_weight": self.heads[0][:, columns],
                "weight_stride": Multiple(s.num_levels * width),
                "context_bias": self.heads[1][columns],
                "vectors": vectors,
                "prefix_table": table,
                "block_weight": blocks,
                "out_weight": out_weight,
                "out_bias": out_bias,
                "logits": logits,
                "num_codes": tuple(map(Multiple, s.num_codes)),
                "workspace": work[2],
            },
            {**self._head_constants, **self._product_constants},
            ("context", "prefix_codes", "logits"),
        )
        kernel.launch(programs, (context, prefix_codes, logits, *work))
        return logits


class BoundDecode(Bound):
    """`beam_decode` and `decode_states` for weights, catalogue and settings."""

    def __init__(
        self,
        readout: Sequence[Tensor] | None,
        heads: Sequence[Tensor],
        catalogue: Sequence[Tensor],
        sizes: Sequence[int],
        eps: float,
        settings: Sequence[Any],
        device: torch.device,
    ) -> None:
        """settings: k, num_beams, codebook, temperatures, level_weights, level_modes."""
        super().__init__(sizes, eps, device)
        s = self.sizes
        if readout is not None:
            self.factored = problem.check_readout(s, readout, device)
            self.readout = tuple(readout)
        dtype = problem.check_heads(s, heads, device)
        if readout is not None and readout[0].dtype != dtype:
            problem.fail(
                "heads: expected matrices of the readout's dtype, got another; pack both at once"
            )
        nodes = problem.check_catalogue(s, catalogue, device)
        self.settings = Settings.of(s, *settings)
        live = min(self.settings.num_beams, max(nodes))
        self._set_tiles(dtype, live)
        self._beams = power_of_two(live)
        self._heads, self._catalogue = list(heads), list(catalogue)

    def _rows(self) -> tuple[int, int]:
        chunk = min(self.tiles.chunk, self._beams)
        while chunk > MIN_TILE and chunk * max(self.sizes.num_codes) > MAX_CANDIDATES:
            chunk //= 2
        return chunk, chunk

    def _even(self) -> dict[str, bool]:
        """Which products need no masks but for rows."""
        s, tiles = self.sizes, self.tiles
        width = problem.padded(s.hidden_dim)
        return {
            "EVEN_CONTEXT": (s.num_levels * width) % tiles.n == 0 and s.dim % tiles.k == 0,
            "EVEN_ROOT": s.num_codes[0] % tiles.n == 0 and width % tiles.k == 0,
            "EVEN_DENSE": width % tiles.k_dense == 0
            and all(codes % tiles.n_dense == 0 for codes in s.num_codes),
        }

    def _static_arguments(self) -> dict[str, Any]:
        s, settings, heads, trie = self.sizes, self.settings, self._heads, self._catalogue
        names = ("vectors", "prefix_table", "block_weight", "out_weight", "out_bias")
        levels = range(s.num_levels)
        of_heads = {
            name: tuple(heads[2 + 5 * level + i] for level in levels)
            for i, name in enumerate(names)
        }
        return {
            "context_weight": heads[0],
            "context_bias": heads[1],
            **of_heads,
            "child_begin": tuple(trie[2 * level] for level in levels),
            "codes": tuple(trie[2 * level + 1] for level in levels),
            "leaf_begin": trie[-3],
            "item_ids": trie[-2],
            "available": trie[-1],
            "num_codes": tuple(map(Multiple, s.num_codes)),
            "dense": tuple(int(settings.codebook or m) for m in settings.level_modes),
            "temperatures": settings.temperatures,
            "level_weights": settings.level_weights,
            "k": settings.k,
            "num_beams": settings.num_beams,
            "codebook": int(settings.codebook),
        }

    def _decode(
        self,
        batch: int,
        tokens: int | None,
        inputs: tuple[Tensor, Tensor, Tensor],
        exclude_ids: Tensor | None,
        exclude_offsets: Tensor | None,
        states_dtype: torch.dtype | None,
    ) -> Results:
        """inputs: context, states, mask; those that are not used are any tensor."""
        device, k = self.device, self.settings.k
        problem.check_exclusion(exclude_ids, exclude_offsets, batch, device)
        results = _empty_results(batch, k, self.sizes.num_levels, device)
        if batch == 0:
            return results
        programs, work = self._work(batch, tokens)
        if exclude_ids is None or exclude_offsets is None or exclude_ids.numel() == 0:
            excluded, offsets, total = results[0], results[0], 0  # never read
        else:
            excluded, offsets, total = exclude_ids, exclude_offsets, exclude_ids.numel()
        kernel = self._bind(states_dtype, inputs, excluded, offsets, results)
        varying = (*inputs, tokens or 0, excluded, offsets, total, *results)
        kernel.launch(programs, (*varying, *work))
        return results

    def _bind(
        self,
        states_dtype: torch.dtype | None,
        inputs: tuple[Tensor, Tensor, Tensor],
        excluded: Tensor,
        offsets: Tensor,
        results: Results,
    ) -> BoundKernel:
        """The kernel for arguments of these kinds."""
        key = (states_dtype, *map(is_aligned, inputs), is_aligned(excluded), is_aligned(offsets))
        kernel = self._kernels.get(key)
        if kernel is not None:
            return kernel
        tiles, (_, chunk) = self.tiles, self._rows()
        examples = (*inputs, 0, excluded, offsets, 0, *results)
        names = (
            *("context", "states", "mask", "tokens"),
            *("excluded", "excluded_offsets", "num_excluded"),
            *("items", "scores", "result_codes", "counts"),
        )
        return self._kernel(
            key,
            kernels.beam_decode_kernel,
            {
                **dict(zip(names, examples, strict=True)),
                **self._static_arguments(),
                "readout": self.readout if states_dtype is not None else (self._heads[1],) * 9,
                "workspace": torch.empty(0, dtype=torch.int8, device=self.device),
            },
            {
                "FROM_STATES": states_dtype is not None,
                "NUM_LEVELS": self.sizes.num_levels,
                **self._even(),
                **self._readout_constants(states_dtype),
                **self._head_constants,
                **self._product_constants,
                "BEAMS": self._beams,
                "CHUNK": chunk,
                "FANOUT": tiles.fanout,
                "NARROW": tiles.narrow,
                "SELECT": max(tiles.select, self._beams),
                "FEW": max(tiles.few, self._beams),
                "PAIRS": tiles.pairs,
                "PART": min(tiles.part, self._head_constants["COLUMNS"]),
                "M_DENSE": chunk,
                "N_DENSE": tiles.n_dense,
                "K_DENSE": tiles.k_dense,
            },
            names,
        )

    def prepare(self) -> None:
        """Compiles and loads `decode_states` for states in the dtype of the weights, so that no
        request waits for it; nothing is launched."""
        dim, k, levels = self.sizes.dim, self.settings.k, self.sizes.num_levels
        states = torch.empty((0, 0, dim), dtype=self.dtype, device=self.device)
        mask = torch.empty((0, 0), dtype=torch.bool, device=self.device)
        results = _empty_results(0, k, levels, self.device)
        inputs = (self._heads[1], states, mask)
        self._bind(self.dtype, inputs, results[0], results[0], results)

    def beam_decode(
        self,
        context: Tensor,
        exclude_ids: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> Results:
        """context float32 [B, D] -> items, scores, codes, counts."""
        problem.check_context(self.sizes, context, self.device)
        nothing = self._heads[1]
        return self._decode(
            context.shape[0], None, (context, nothing, nothing), exclude_ids, exclude_offsets, None
        )

    def decode_states(
        self,
        states: Tensor,
        mask: Tensor,
        exclude_ids: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> Results:
        """states [B, T, D], mask bool [B, T] -> items, scores, codes, counts."""
        problem.check_states(self.sizes, states, mask, self.device)
        return self._decode(
            states.shape[0],
            states.shape[1],
            (self._heads[1], states, mask),
            exclude_ids,
            exclude_offsets,
            states.dtype,
        )


def _empty_results(batch: int, k: int, levels: int, device: torch.device) -> Results:
    return (
        torch.empty((batch, k), dtype=torch.int64, device=device),
        torch.empty((batch, k), dtype=torch.float32, device=device),
        torch.empty((batch, k, levels), dtype=torch.int32, device=device),
        torch.empty((batch,), dtype=torch.int32, device=device),
    )


class BoundPlan:
    """What a DecodePlan calls: `decode` and `readout` for one set of weights and settings."""

    def __init__(
        self,
        readout: Sequence[Tensor],
        heads: Sequence[Tensor],
        catalogue: Sequence[Tensor],
        arguments: Sequence[Any],
        device: torch.device,
    ) -> None:
        """arguments: sizes, layer_norm_eps, then the settings, as operators take them."""
        sizes, eps, *settings, launches, _isa = arguments
        problem.check_launches(launches)
        self.decode = BoundDecode(readout, heads, catalogue, sizes, eps, settings, device)
        self.readout = BoundReadout(readout, sizes, eps, device)
