"""Models of whole requests whose encoder every backend with a fused one runs, and histories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captured_graphs import SIZES, make
from encoders import module_of

import sidmlp_kernels as sk
from sidmlp_kernels import T5Spec, backends
from sidmlp_kernels.request_graphs import RequestGraphs
from sidmlp_kernels.serving_state import settings_of

MAX_ITEMS = 5
ASK = {"k": 7, "num_beams": 20}


def make_fused(backend: str = "cpu", seed: int = 0, **options: Any) -> sk.Recommender:
    """In bf16, which encoders on a GPU want; the test is skipped where there is none."""
    problem = make(seed)
    tokens = sk.TokenSpec.for_codes(
        problem.spec.codes_per_level, max_items=MAX_ITEMS, num_user_tokens=3
    )
    spec = T5Spec(2, problem.spec.dim, 2, 32, 64, tokens.vocab_size)
    reason = backends.encoder_why_not(backend, spec, torch.bfloat16)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    return sk.Recommender(
        problem.student,
        problem.catalogue,
        module_of(spec),
        backend=backend,
        dtype="bfloat16",
        tokens=tokens,
        **options,
    )


def histories_of(model: sk.Recommender, requests: int, seed: int = 0) -> list[list[int]]:
    """Of 0..7 items each, more than count; smaller batches begin as larger ones do."""
    random = np.random.default_rng(seed)
    items = model.catalogue.item_ids
    return [random.choice(items, random.integers(0, 8)).tolist() for _ in range(requests)]


def capture(model: sk.Recommender, **options: Any) -> RequestGraphs:
    """As model.capture_requests, which refuses models on the CPU."""
    settings = settings_of(model.defaults, *ASK.values(), None, None, None)
    arguments: dict[str, Any] = {"batch_sizes": SIZES, "tokens": None, "max_excluded": 0}
    return RequestGraphs(model, settings, **(arguments | options))
