"""What a user gets for a wrong argument of the public functions: a ValueError with a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sidmlp_kernels as sk
from sidmlp_kernels import backends
from sidmlp_kernels.student import weight_shapes

CODES = (4, 3)
SPEC = sk.StudentSpec(CODES, 8, 8, 2, 8, 8, 8)
TOKENS = sk.TokenSpec.for_codes(CODES)
T5 = sk.T5Spec(1, 8, 2, 4, 8, TOKENS.vocab_size)


@pytest.fixture(scope="module")
def model() -> sk.Recommender:
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(SPEC).items()
    student = sk.Student(SPEC, {n: torch.randn(s, generator=generator) for n, s in shapes})
    codes = np.stack(np.unravel_index(np.arange(12), CODES), axis=1)
    torch.manual_seed(0)
    catalogue = sk.Catalogue.from_codes(codes, codes_per_level=CODES)
    return sk.Recommender(student, catalogue, sk.T5Encoder(T5), device="cpu")


@pytest.mark.parametrize("ids", [[1, TOKENS.vocab_size], [-1, 2], [2**40, 1]])
def test_ids_outside_the_vocabulary(model: sk.Recommender, ids: list[int]) -> None:
    batch = sk.Batch(torch.tensor([ids]), torch.ones(1, 2, dtype=torch.bool))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"batch: expected token ids 0\.\.\d+, .*; make"):
            model.decode(batch)


def test_ids_of_the_whole_vocabulary_decode(model: sk.Recommender) -> None:
    ids = torch.arange(TOKENS.vocab_size)[None]
    by_hand = sk.Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    assert model.decode(by_hand, k=3).counts.tolist() == [3]
    assert model.decode(model.batch([[1, 2]]), k=3).counts.tolist() == [3]


@pytest.mark.parametrize("path", [None, 3, b"student", ["student"]])
def test_a_checkpoint_is_named_by_a_string_or_a_path(path: Any) -> None:
    with pytest.raises(ValueError, match=r"path: expected .* got .*; pass it as"):
        sk.load(path)


def test_a_path_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check the path"):
        sk.load(tmp_path / "none")


def test_every_backend_that_may_be_asked_for_is_listed() -> None:
    names = " or ".join(repr(backend.name) for backend in backends.BACKENDS)
    with pytest.raises(ValueError, match=f"expected 'auto' or {re.escape(names)}, got 'tpu'"):
        backends.resolve("tpu")
    with pytest.raises(ValueError, match=f"expected {re.escape(names)}, got 'tpu'"):
        backends.why_not("tpu")
