"""Requests for bench_requests: histories, the encoder that reads them, and what it must compute.

    full  20 items each, 82 tokens: the most that a request has
    long  as many items as 1,000 tokens hold, see request_options.long_options
    mlp   as full, for SID-MLP++'s encoder, see request_options.mlp_options
    real  what Beauty's users bought, the newest 20 items at most: 34 tokens on average

Where the data folder lacks Beauty, lengths of about the same mean are drawn and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_catalogues import BEAUTY
from decode_variants import SEED, Contest
from torch import Tensor
from torch.nn import functional

from sidmlp_kernels import (
    MLPEncoder,
    MLPEncoderSpec,
    StudentSpec,
    T5Encoder,
    T5Spec,
    TokenSpec,
)
from sidmlp_kernels.recommender import Recommender

HISTORIES = ("full", "real")
# TIGER's encoder.
T5_SIZES = {"num_layers": 4, "dim": 128, "num_heads": 6, "head_dim": 64, "ffn_dim": 1024}
# SID-MLP++'s.
MLP_SIZES = {"num_layers": 4, "dim": 128, "hidden_dim": 512}
MAX_ITEMS = 20
BEAUTY_ITEMS = 8  # the mean of its users, about

FLOP_PER_S = 790e12  # what an H200 multiplies in bf16, measured 2026-11-22

History = list[int]
Encoder = T5Encoder | MLPEncoder


@dataclass(frozen=True, eq=False)
class Requests:
    """One batch, as a caller has it and as an encoder takes it.

    histories  item ids, oldest first
    ids, mask  int64 and bool [B, T] on the model's device, padded to one T for every batch
    origin     where the histories come from
    """

    histories: list[History]
    ids: Tensor
    mask: Tensor
    origin: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request."""
        found: list[int] = self.mask.sum(dim=1).tolist()
        return found


def random_encoder(tokens: TokenSpec, sizes: dict[str, Any]) -> Encoder:
    """An encoder of these sizes, T5_SIZES or MLP_SIZES by name, with random weights, float32 on
    the CPU."""
    torch.manual_seed(SEED)
    if "ffn_dim" in sizes:
        spec = T5Spec(**sizes, vocab_size=tokens.vocab_size)
        return T5Encoder.from_weights(spec, T5Encoder(spec).state_dict())
    roles = {"num_roles": len(tokens.code_offsets), "max_length": tokens.max_length}
    made = MLPEncoderSpec(**sizes, **roles, vocab_size=tokens.vocab_size)
    return MLPEncoder.from_weights(made, MLPEncoder(made).state_dict())


def histories_of(
    kind: str, contest: Contest, batch: int, data: Path, max_items: int = MAX_ITEMS
) -> tuple[list[History], str]:
    """Seeded histories and their origin; smaller batches begin as larger ones do. The first of the
    real ones is of average length, so that a batch of one is no extreme."""
    rng = np.random.default_rng(SEED)
    item_ids = contest.item_ids.numpy()
    if kind in ("full", "long", "mlp"):
        rows = rng.integers(0, len(item_ids), (batch, max_items))
        return item_ids[rows].tolist(), f"{max_items} random items each, seed {SEED}"
    path = data / BEAUTY / "sequences.npz"
    if path.exists() and contest.items.name == BEAUTY:
        with np.load(path) as arrays:
            items, offsets = arrays["items"], arrays["offsets"]
        lengths = np.minimum(np.diff(offsets), MAX_ITEMS)
        users = np.resize(rng.permutation(len(lengths)), batch)
        users[0] = np.flatnonzero(lengths == BEAUTY_ITEMS)[0]
        newest = [items[offsets[u + 1] - lengths[u] : offsets[u + 1]] for u in users]
        return [item_ids[row].tolist() for row in newest], f"users of {BEAUTY}, seed {SEED}"
    lengths = np.minimum(4 + rng.geometric(0.23, batch), MAX_ITEMS)
    lengths[0] = BEAUTY_ITEMS
    made = [item_ids[rng.integers(0, len(item_ids), n)].tolist() for n in lengths]
    return made, f"random items and lengths of about the mean of {BEAUTY}, seed {SEED}"


def requests_of(
    kind: str, contest: Contest, model: Recommender, batch: int, tokens: int, data: Path
) -> Requests:
    """A batch of `kind`, made by the model from its histories and padded to `tokens`."""
    histories, origin = histories_of(kind, contest, batch, data, model.tokens.max_items)
    made = model.batch(histories)
    missing = tokens - made.ids.shape[1]
    ids = functional.pad(made.ids, (0, missing), value=model.tokens.pad_id)
    return Requests(histories, ids, functional.pad(made.mask, (0, missing), value=False), origin)


def encoder_flop(spec: T5Spec | MLPEncoderSpec, tokens: int) -> float:
    """FLOP of one request of so many tokens; a multiply-add is two. Of SID-MLP++'s, each token in
    its own MLP alone and the mean's half of a first layer once for each role."""
    if isinstance(spec, MLPEncoderSpec):
        products = (2 * tokens + spec.num_roles) * spec.dim * spec.hidden_dim
        return 2.0 * spec.num_layers * products
    width = spec.num_heads * spec.head_dim
    products = 3 if spec.feed_forward.startswith("gated-") else 2
    a_token = 4 * spec.dim * width + products * spec.dim * spec.ffn_dim + 2 * tokens * width
    return 2.0 * spec.num_layers * tokens * a_token


def heads_flop(spec: StudentSpec, num_beams: int) -> float:
    """FLOP of one request's heads: the context's product, and logits of every code for each beam;
    what the codes before add to a first layer is looked up."""
    inner = (spec.blocks_per_head - 1) * spec.hidden_dim**2
    count = spec.num_levels * spec.dim * spec.hidden_dim
    for level, codes in enumerate(spec.codes_per_level):
        count += (num_beams if level else 1) * (inner + spec.hidden_dim * codes)
    return 2.0 * count


def limits_us(
    contest: Contest, spec: T5Spec | MLPEncoderSpec, lengths: list[int], num_beams: int
) -> dict[str, float]:
    """The arithmetic limit of a batch on an H200 in microseconds: FLOP of the encoder, and of heads
    whose first layers are tables, at FLOP_PER_S; 0.48 for a whole request of 82 tokens."""
    encoder = sum(encoder_flop(spec, n) for n in lengths)
    heads = len(lengths) * heads_flop(contest.spec, num_beams)
    flop = {"encoder": encoder, "whole": encoder + heads}
    return {operator: count / FLOP_PER_S * 1e6 for operator, count in flop.items()}
