"""The peers of the GPU benchmark, in double precision on the CPU, against the reference."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import GPU_SCRIPTS, scripts

from sidmlp.beam import decode_states
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels.testing import make_problem


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    yield from scripts((*GPU_SCRIPTS,), ("teacher_peer",))


@pytest.mark.parametrize("form", ["definition", "folded", "static"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_items": 3, "num_beams": 10, "k": 5},  # fewer items than k
        {"codes_per_level": (4, 4), "num_items": 60, "num_beams": 12, "k": 12},  # shared leaves
        {"unavailable": 0.4, "blocks_per_head": 2, "attention_dim": 32, "embedding_dim": 24},
        {"codes_per_level": (7, 5, 9, 3), "num_items": 40, "num_beams": 30, "k": 30},
    ],
)
def test_the_peer_decodes_as_the_reference(
    modules: SimpleNamespace, changes: dict[str, Any], form: str
) -> None:
    problem = make_problem(seed=3, batch=6, **changes)
    student = Student(StudentConfig(**problem.spec.to_dict())).eval().requires_grad_(False)
    student.load_state_dict(dict(problem.weights))
    trie = Trie.from_codes(
        problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
    )
    beams = problem.settings.num_beams
    kind = modules.static_peer.StaticPeer if form == "static" else modules.torch_peer.TorchPeer
    peer = kind(
        student,
        trie,
        k=problem.k,
        num_beams=beams,
        dtype=torch.float64,
        device="cpu",
        folded=form != "definition",
    )
    states = problem.states.double()
    found = peer.decode_states(states, problem.mask)
    exact = student.double()
    wanted = decode_states(exact, states, problem.mask, trie, problem.k, beams)
    expected = (wanted.items, wanted.scores, wanted.codes, wanted.counts)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        if want.is_floating_point():
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        else:
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_generates_what_its_own_search_finds(
    modules: SimpleNamespace, dtype: torch.dtype
) -> None:
    pytest.importorskip("transformers", reason="the teacher is a T5 of transformers")
    peers = importlib.import_module("teacher_peer")
    from sidmlp.teacher import PrefixTable, TeacherConfig, beam_search

    codes = np.unique(np.random.default_rng(1).integers(0, (16, 8, 12), (150, 3)), axis=0)
    config = TeacherConfig(dim=32, num_layers=2, num_heads=2, head_dim=16, ffn_dim=32)
    sizes = {"batch": 4, "k": 5, "num_beams": 10, "dtype": dtype, "device": "cpu"}
    peer = peers.TeacherPeer(codes, (16, 8, 12), config=config, **sizes)
    found = peer()
    verified = peer.check(found, 3)
    assert (verified["requests"], verified["requests_scored"]) == (4, 3)
    if dtype == torch.float32:
        picks = np.random.default_rng(0).integers(0, len(codes), (4, peers.MAX_ITEMS))
        ids, mask = peer.tokens.batch(list(picks), peer.codes)
        table = PrefixTable(peer.codes, (16, 8, 12))
        wanted = beam_search(peer.teacher, ids, mask, table, k=5, num_beams=10)
        offsets = torch.tensor(peer.tokens.code_offsets)
        assert torch.equal(found - offsets, torch.from_numpy(peer.codes)[wanted.items])
    wrong = [found[:, :1].expand(-1, 5, -1), found.roll(1, dims=2)]
    if dtype == torch.float32:  # in bf16 scores may be too close to tell their order
        wrong.append(found.flip(1))
    for sequences in wrong:
        with pytest.raises(modules.decode_checks.VerificationError, match="teacher: "):
            peer.check(sequences, 3)
    assert peer.invalid_rate(found.roll(1, dims=2)) == 1


def test_the_librarys_trie_is_the_references(modules: SimpleNamespace) -> None:
    problem = make_problem(seed=2, codes_per_level=(5, 9, 4), num_items=200, unavailable=0.3)
    arguments = (problem.catalogue.snapshot(), problem.codes, problem.item_ids)
    made = modules.library_trie.library_trie(*arguments)
    wanted = Trie.from_codes(
        problem.codes, problem.item_ids, problem.available, problem.spec.codes_per_level
    )
    for field in dataclasses.fields(wanted):
        got, want = getattr(made, field.name), getattr(wanted, field.name)
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype
            assert torch.equal(got, want), field.name
        elif field.name in ("child_begin", "child_codes"):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        else:
            assert got == want
    assert torch.equal(made.leaf_codes().long(), wanted.leaf_codes())
    with pytest.raises(RuntimeError, match="200 of 200 elsewhere"):
        modules.library_trie.library_trie(
            problem.catalogue.snapshot(), (problem.codes + 1) % 4, problem.item_ids
        )


# -- a rehearsal: the CPU backend in place of a GPU's, calls in place of graphs
