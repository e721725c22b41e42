"""A small model for tests of Recommender: its parts, and how the reference answers with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import sidmlp.beam
import sidmlp_kernels as sk
from sidmlp.student import Student as ReferenceStudent
from sidmlp.student import StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels.student import weight_shapes

CODES = (6, 5, 7)
SPEC = sk.StudentSpec(CODES, 16, 24, 4, 32, 20, 16, blocks_per_head=2)
TOKENS = sk.TokenSpec.for_codes(CODES, max_items=4)
T5 = sk.T5Spec(2, 16, 2, 16, 32, TOKENS.vocab_size)  # which CUDA takes, too
ITEMS = 60


def make_student(seed: int = 0) -> sk.Student:
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(SPEC).items()
    return sk.Student(SPEC, {n: 0.5 * torch.randn(s, generator=generator) for n, s in shapes})


def make_catalogue(seed: int = 0, first_id: int = 100, **options) -> sk.Catalogue:
    codes = np.random.default_rng(seed).integers(0, CODES, (ITEMS, 3))
    return sk.Catalogue.from_codes(codes, np.arange(first_id, first_id + ITEMS), CODES, **options)


def make_teacher() -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=T5.vocab_size,
        d_model=T5.dim,
        d_kv=T5.head_dim,
        d_ff=T5.ffn_dim,
        num_layers=T5.num_layers,
        num_heads=T5.num_heads,
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_encoder() -> sk.T5Encoder:
    return sk.T5Encoder.from_weights(T5, make_teacher().encoder.state_dict())


def make_states(batch: int = 5, tokens: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, tokens, SPEC.dim, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    return states, mask


def reference(states: Tensor, mask: Tensor, catalogue: sk.Catalogue, k: int, beams: int, **options):
    student = ReferenceStudent(StudentConfig(**dataclasses.asdict(SPEC)))
    student.load_state_dict(dict(make_student().weights))
    trie = Trie.from_codes(
        torch.tensor(catalogue.codes.astype(np.int64)),
        torch.tensor(catalogue.item_ids),
        torch.tensor(catalogue.available),
        CODES,
    )
    with torch.no_grad():
        return sidmlp.beam.decode_states(
            student.double(), states.double(), mask, trie, k, beams, **options
        )


def assert_same(got: sk.Recommendations, wanted) -> None:
    assert torch.equal(got.items, wanted.items)
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.counts, wanted.counts)
    torch.testing.assert_close(got.scores, wanted.scores.float(), rtol=1e-4, atol=1e-4)


def assert_bits(a: sk.Recommendations, b: sk.Recommendations) -> None:
    for name in ("items", "scores", "codes", "counts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
