"""Problems whose scores are exact in float32, so that ties abound and rounding hides nothing.

Every feature is +1 or -1, in pairs of both signs: a hidden vector has mean 0 and variance 1, so
LayerNorm leaves it and a shift of 64 rounds away what its square root cost. GELU(64 +- 1) is
64 +- 1. From there the output layer makes

    logit(c) = 64 * (c xor h) - constant,    h = bits that the user and earlier codes set

A softmax over multiples of 64 has exactly one winner (exp(-64) vanishes beside 1 in float32, and
exp(-32) does, at temperature 2), so a log-probability is 64 times an integer and sums of them are
exact in any order. Different beams reach the same score all the time; any two correct decodes agree
in every bit, and a wrong tie rule shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sidmlp_kernels.spec import DecodeSpec, StudentSpec
from sidmlp_kernels.student import weight_shapes

from .problems import Problem

STEP = 64.0  # of the logits
SHIFT = 64.0  # of the hidden values


def make_grid_problem(
    codes: Tensor,
    codes_per_level: Sequence[int],
    *,
    settings: DecodeSpec,
    k: int,
    seed: int = 0,
    batch: int = 3,
    blocks_per_head: int = 1,
    available: Tensor | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
    multiples: tuple[int, int] = (1, 2),
) -> tuple[Problem, Tensor]:
    """A problem as the module docstring says, and contexts float32 [batch, D] for `beam_decode`.

    codes int64 [N, L]; item ids are 0..N-1. multiples: of dim and of hidden_dim, which grow by
    features that say nothing; kernels choose by such sizes. Stay exact: temperatures 0.5, 1 or 2;
    level weights of a few bits; at most 32 codes a level.
    """
    sizes, levels = tuple(codes_per_level), len(codes_per_level)
    bits = max(1, (max(sizes) - 1).bit_length())
    dim = -(-bits // multiples[0]) * multiples[0]
    generator = torch.Generator().manual_seed(seed)
    spec = StudentSpec(
        codes_per_level=sizes,
        dim=dim,
        attention_dim=bits,
        num_heads=1,
        ffn_dim=bits,
        hidden_dim=-(-2 * bits * levels // multiples[1]) * multiples[1],
        embedding_dim=bits,
        blocks_per_head=blocks_per_head,
        layer_norm_eps=1e-12,
    )
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(spec).items()}
    for name, weight in weights.items():
        if name.startswith("embeddings."):
            weight.copy_(_signs(weight.shape, generator))
        elif name.startswith("heads.") and name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif name.startswith("heads.") and name.endswith("norm.bias"):
            weight.fill_(SHIFT)
    for level, size in enumerate(sizes):
        head = f"heads.{level}."
        # Features of the user, then of each earlier code; those of later codes are constant.
        used = bits * (level + 1)
        linear, bias = (weights[f"{head}blocks.0.linear.{p}"] for p in ("weight", "bias"))
        feature = torch.arange(used)
        column = feature + (dim - bits) * (feature >= bits)  # the user's, then the codes'
        linear[2 * feature, column] = 1.0
        linear[2 * feature + 1, column] = -1.0
        bias[2 * used :: 2], bias[2 * used + 1 :: 2] = 1.0, -1.0
        for block in range(1, blocks_per_head):
            weights[f"{head}blocks.{block}.linear.weight"].copy_(torch.eye(spec.hidden_dim))
            weights[f"{head}blocks.{block}.linear.bias"].fill_(-SHIFT)
        output, out_bias = weights[f"{head}output.weight"], weights[f"{head}output.bias"]
        code = torch.arange(size)
        for bit in range(bits):
            source = int(torch.randint(0, level + 1, (1,), generator=generator))
            sign = 1.0 - 2.0 * ((code >> bit) & 1)  # +1 for a bit that is 0
            output[:, 2 * (source * bits + bit)] = -STEP / 2 * 2**bit * sign
            out_bias += STEP / 2 * 2**bit * sign * SHIFT
    states = torch.randn(batch, 2, dim, generator=generator)
    items = len(codes)
    problem = Problem(
        seed=seed,
        spec=spec,
        weights=MappingProxyType(weights),
        codes=codes,
        item_ids=torch.arange(items),
        available=torch.ones(items, dtype=torch.bool) if available is None else available,
        states=states,
        mask=torch.ones(states.shape[:2], dtype=torch.bool),
        exclude=((),) * batch if exclude is None else tuple(tuple(row) for row in exclude),
        settings=settings,
        k=k,
    )
    return problem, _signs((batch, dim), generator)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, tuple(shape), generator=generator) - 1.0
