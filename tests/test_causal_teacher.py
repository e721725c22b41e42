"""Decoder-only teachers: against transformers' own forward, one unpadded sequence at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sidmlp.data import TokenSpec
from sidmlp.teacher import (
    CandidateScorer,
    CausalConfig,
    CausalTeacher,
    PrefixTable,
    beam_search,
)

SIZES = (4, 3, 3)
TOKENS = TokenSpec.for_codes(SIZES, max_items=4)
BACKBONES = [("qwen3", None), ("qwen3", 2), ("llama", 1)]


def make(backbone: str = "qwen3", kv_heads: int | None = 2) -> CausalTeacher:
    """Random weights, spread so that scores differ and norms matter."""
    torch.manual_seed(0)
    config = CausalConfig(backbone, 16, 2, 4, 8, 32, dropout=0.1, num_kv_heads=kv_heads)
    model = CausalTeacher(config, TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=BACKBONES, ids=lambda p: f"{p[0]}-{p[1]}", scope="module")
def teacher(request) -> CausalTeacher:
    return make(*request.param)


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """20 items; items 3 and 11 share their codes."""
    every = np.stack(np.unravel_index(np.random.default_rng(1).permutation(36), SIZES), axis=1)[:20]
    every[11] = every[3]
    return every


@pytest.fixture(scope="module")
def batch(codes) -> tuple[Tensor, Tensor]:
    """Histories of 0 to 4 items."""
    rng = np.random.default_rng(2)
    return TOKENS.batch([rng.integers(0, 20, size=size) for size in range(5)], codes)


@torch.no_grad()
def alone(teacher: CausalTeacher, history: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' states [t, D] of a history [t] and logits [L, V] of codes [L] after it."""
    target = (codes + teacher.offsets)[:-1]
    read = torch.cat([history, torch.tensor([TOKENS.pad_id]), target])
    found = teacher.model(input_ids=read[None], output_hidden_states=True)
    return found.hidden_states[-1][0, : len(history)], found.logits[0, len(history) :]


@torch.no_grad()
def brute_force(teacher: CausalTeacher, ids: Tensor, mask: Tensor, codes: np.ndarray) -> Tensor:
    """Score of every item for every request, one at a time, [B, N]."""
    scores = torch.zeros(len(ids), len(codes))
    for user, item in np.ndindex(*scores.shape):
        wanted = torch.from_numpy(codes[item])
        logits = alone(teacher, ids[user][mask[user]], wanted)[1].log_softmax(-1)
        scores[user, item] = logits.gather(1, (wanted + teacher.offsets)[:, None]).sum()
    return scores


class TestModel:
    def test_states_and_forced_logits_equal_transformers(self, teacher, codes, batch):
        ids, mask = batch
        targets = torch.from_numpy(codes[:15]).view(5, 3, 3)
        with torch.no_grad():
            states, logits = teacher.teacher_forced(ids, mask, targets)
        for user, target in np.ndindex(5, 3):
            want_states, want = alone(teacher, ids[user][mask[user]], targets[user, target])
            assert torch.allclose(states[user][mask[user]], want_states, atol=1e-5)
            for level, values in enumerate(teacher.level_logits(want)):
                assert torch.allclose(logits[level][user, target], values, atol=1e-5)

    def test_steps_equal_teacher_forcing(self, teacher, codes, batch):
        targets = torch.from_numpy(codes[:15]).view(5, 3, 3)
        tokens = teacher.forced_tokens(targets)
        with torch.no_grad():
            want = teacher.begin(*batch).feed(tokens)
            state = teacher.begin(*batch)
            parts = [state.feed(tokens[..., :2]), state.feed(tokens[..., 2:])]
            assert torch.allclose(torch.cat(parts, dim=2), want, atol=1e-5)
            state = teacher.begin(*batch)
            for level in range(3):
                step = state.feed(tokens[..., level : level + 1])
                assert torch.allclose(step[:, :, 0], want[:, :, level], atol=1e-5), level

    def test_reordered_beams_keep_their_own_past(self, teacher, batch):
        ids, mask = batch
        first, second = (torch.tensor([row]).expand(5, 3) for row in ([0, 1, 2], [1, 0, 2]))
        parents = torch.tensor([[2, 0, 2], [0, 1, 2], [1, 1, 1], [0, 0, 2], [2, 1, 0]])
        with torch.no_grad():
            state = teacher.begin(ids, mask)
            state.feed(torch.zeros(5, 1, 1, dtype=torch.int64))
            state.reorder(torch.zeros(5, 3, dtype=torch.int64))
            state.feed((first + teacher.offsets[0])[..., None])
            state.reorder(parents)
            got = state.feed((second + teacher.offsets[1])[..., None])[:, :, 0]
        for user, beam in np.ndindex(5, 3):
            path = torch.stack([first[user, parents[user, beam]], second[user, beam], second[0, 0]])
            want = alone(teacher, ids[user][mask[user]], path)[1][2]
            assert torch.allclose(got[user, beam], want, atol=1e-5)

    @pytest.mark.parametrize("place", ["right", "left", "scattered"])
    def test_padding_changes_nothing_wherever_it_is(self, teacher, codes, batch, place):
        """Anything may stand where the mask is False, ids that there are not, too."""
        ids, mask = batch
        users, width = ids.shape[0], ids.shape[1] + 3
        generator = torch.Generator().manual_seed(3)
        order = torch.arange(width).expand(users, -1)
        if place == "scattered":
            order = torch.rand(users, width, generator=generator).argsort(1)
        wide_mask = torch.zeros(users, width, dtype=torch.bool)
        wide = torch.randint(-100, 100, (users, width), generator=generator)
        for user in range(users):
            length = int(mask[user].sum())
            at = order[user, -length:] if place == "left" else order[user, :length]
            at = at.sort().values
            wide_mask[user, at] = True
            wide[user, at] = ids[user][mask[user]]
        targets = torch.from_numpy(codes[:5])[:, None]
        with torch.no_grad():
            want_states, want = teacher.teacher_forced(ids, mask, targets)
            states, got = teacher.teacher_forced(wide, wide_mask, targets)
        assert states.isfinite().all()
        assert torch.allclose(states[wide_mask], want_states[mask], atol=1e-5)
        for level in range(3):
            assert torch.allclose(got[level], want[level], atol=1e-5)

    def test_a_history_without_any_token(self, teacher, codes, batch):
        ids, mask = batch
        nothing = torch.zeros_like(mask)
        targets = torch.from_numpy(codes[:5])[:, None]
        with torch.no_grad():
            got = teacher.teacher_forced(ids, nothing, targets)[1]
        for user in range(5):
            want = alone(teacher, ids[user][:0], targets[user, 0])[1]
            for level, values in enumerate(teacher.level_logits(want)):
                assert torch.allclose(got[level][user, 0], values, atol=1e-5)

    def test_loss_and_gradients_equal_transformers(self, teacher, codes, batch):
        ids, mask = batch
        targets = torch.from_numpy(codes[:10]).view(5, 2, 3)
        real = torch.tensor([[True, False], [True, True]] + 3 * [[False, True]])
        teacher.zero_grad()
        loss = teacher(ids, mask, targets, real)
        loss.backward()
        loss = loss.detach()
        got = {name: p.grad.clone() for name, p in teacher.named_parameters()}
        teacher.zero_grad()
        parts = []
        for user, target in real.nonzero().tolist():
            history, wanted = ids[user][mask[user]], targets[user, target] + teacher.offsets
            read = torch.cat([history, torch.tensor([TOKENS.pad_id]), wanted[:-1]])
            logits = teacher.model(input_ids=read[None]).logits[0, len(history) :]
            parts.append(nn.functional.cross_entropy(logits, wanted))
        want = torch.stack(parts).mean()
        want.backward()
        assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
        for name, parameter in teacher.named_parameters():
            assert torch.allclose(got[name], parameter.grad, atol=1e-5, rtol=1e-3), name
        # The first token's row learns, although it is the padding token.
        assert teacher.token_embedding().weight.grad[TOKENS.pad_id].abs().max() > 1e-4

    def test_dropout_acts_in_training_only(self, codes, batch):
        teacher = make()
        targets = torch.from_numpy(codes[:5])[:, None]
        real = torch.ones(5, 1, dtype=torch.bool)
        with torch.no_grad():
            assert teacher(*batch, targets, real) == teacher(*batch, targets, real)
            teacher.train()
            assert teacher(*batch, targets, real) != teacher(*batch, targets, real)

    def test_double_precision_is_kept(self, codes, batch):
        teacher, targets = make().double(), torch.from_numpy(codes[:5])[:, None]
        with torch.no_grad():
            states, logits = teacher.teacher_forced(*batch, targets)
            _, want = alone(teacher, batch[0][4][batch[1][4]], targets[4, 0])
        assert states.dtype == torch.float64
        got = [values[4, 0] for values in logits]
        for mine, theirs in zip(got, teacher.level_logits(want), strict=True):
            # transformers' own softmax and norms are float32 inside
            assert torch.allclose(mine, theirs, atol=1e-6)

    @pytest.mark.parametrize("backbone", ["qwen3", "llama"])
    def test_bfloat16_autocast_stays_near_float32(self, backbone, codes, batch):
        teacher, targets = make(backbone), torch.from_numpy(codes[:5])[:, None]
        real = torch.ones(5, 1, dtype=torch.bool)
        want = teacher(*batch, targets, real)
        with torch.autocast("cpu", torch.bfloat16):
            loss = teacher(*batch, targets, real)
        loss.backward()
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=0.02)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in teacher.parameters())

    def test_compiled_training_computes_the_same(self, codes, batch, monkeypatch):
        """Dynamo's part of torch.compile, without the minutes of a compiler."""
        plain, model = torch.compile, make("llama", 1)
        monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, backend="eager", **how))
        model.config = dataclasses.replace(model.config, dropout=0.0)
        targets, real = torch.from_numpy(codes[:5])[:, None], torch.ones(5, 1, dtype=torch.bool)
        want = model.train()(*batch, targets, real)
        model.compile_training()
        assert model.read_layer is not make().read_layer
        assert model(*batch, targets, real).item() == pytest.approx(want.item(), rel=1e-6)

    def test_tensors_follow_the_module(self, codes, batch):
        """On the meta device every tensor that is made elsewhere ends in an error."""
        teacher = make().to("meta")
        ids, mask = (part.to("meta") for part in batch)
        targets = torch.from_numpy(codes[:10]).view(5, 2, 3).to("meta")
        states, logits = teacher.teacher_forced(ids, mask, targets)
        assert states.device.type == logits[0].device.type == "meta"
        state = teacher.begin(ids, mask)
        state.feed(targets[..., :1])
        state.reorder(torch.zeros(5, 3, dtype=torch.int64, device="meta"))
        assert state.feed(targets[:, :1, :1].expand(5, 3, 1)).shape == (5, 3, 1, TOKENS.vocab_size)


class TestBeamSearch:
    def test_wide_constrained_search_equals_scoring_every_item(self, teacher, codes, batch):
        want = brute_force(teacher, *batch, codes)
        got = beam_search(teacher, *batch, PrefixTable(codes, SIZES), k=20, num_beams=36)
        best = want.sort(dim=1, descending=True, stable=True).values
        assert torch.allclose(got.scores, best, atol=1e-4)
        for row in range(5):
            assert sorted(got.items[row].tolist()) == list(range(20))
            assert torch.allclose(want[row][got.items[row]], got.scores[row], atol=1e-4)

    def test_narrow_searches_score_what_they_find_and_stay_in_the_catalogue(
        self, teacher, codes, batch
    ):
        want = brute_force(teacher, *batch, codes)
        got = beam_search(teacher, *batch, PrefixTable(codes, SIZES), k=4, num_beams=4)
        assert ((got.items >= 0) & (got.items < 20)).all()
        assert torch.allclose(want.gather(1, got.items), got.scores, atol=1e-4)
        assert not got.invalid.any()
        hidden = [row.numpy() for row in got.items]
        other = beam_search(
            teacher, *batch, PrefixTable(codes, SIZES), k=4, num_beams=4, exclude=hidden
        )
        assert not (got.items[:, :, None] == other.items[:, None]).any()

    def test_unconstrained_search_agrees_when_wide(self, codes, batch):
        teacher, table = make(), PrefixTable(codes, SIZES)
        ids, mask = (part[:2] for part in batch)
        every = TOKENS.vocab_size**3
        free = beam_search(teacher, ids, mask, table, k=20, num_beams=every, constrained=False)
        bound = beam_search(teacher, ids, mask, table, k=20, num_beams=36)
        assert torch.equal(free.items, bound.items)
        assert torch.allclose(free.scores, bound.scores, atol=1e-4)
        assert free.invalid.tolist() == [every - 19] * 2
        narrow = beam_search(teacher, ids, mask, table, k=4, num_beams=4, constrained=False)
        assert (narrow.invalid + (narrow.items >= 0).sum(1) >= 4).all()

    @pytest.mark.parametrize("backbone", ["qwen3", "llama"])
    def test_in_bfloat16_scores_stay_near(self, backbone, codes, batch):
        teacher, table = make(backbone), PrefixTable(codes, SIZES)
        want = brute_force(teacher, *batch, codes)
        with torch.autocast("cpu", torch.bfloat16):
            got = beam_search(teacher, *batch, table, k=20, num_beams=36)
        assert got.scores.dtype == torch.float32
        assert (want.gather(1, got.items) - got.scores).abs().max() < 0.1
        assert not torch.allclose(want.gather(1, got.items), got.scores, atol=1e-4)


class TestRescoring:
    def test_scores_equal_one_candidate_at_a_time(self, teacher, codes, batch):
        scorer = CandidateScorer(teacher)
        wanted = torch.from_numpy(codes).expand(5, -1, -1)
        counts = torch.tensor([20, 3, 0, 20, 19])
        want = brute_force(teacher, *batch, codes)
        want[torch.arange(20) >= counts[:, None]] = -torch.inf
        got = scorer.of_requests(*batch)(torch.empty(0), torch.empty(0), wanted, counts)
        assert torch.allclose(got, want, atol=1e-4)
        for memory in (1, teacher.forward_bytes(1, 7, batch[0].shape[1])):
            few = CandidateScorer(teacher, memory=memory).of_requests(*batch)
            parts = few(torch.empty(0), torch.empty(0), wanted, counts)
            assert torch.allclose(parts, got, atol=1e-5)

    def test_states_are_not_enough(self, codes, batch):
        ids, mask = batch
        with pytest.raises(ValueError, match=r"from states, got CausalTeacher.*of_requests"):
            CandidateScorer(make())(torch.zeros(5, 6, 16), mask, torch.from_numpy(codes), mask)
        scorer = CandidateScorer(make().train())
        asked = (torch.empty(0), mask, torch.zeros(5, 2, 3, dtype=torch.int64), torch.ones(5))
        with pytest.raises(ValueError, match="teacher: expected evaluation mode"):
            scorer.of_requests(ids, mask)(*asked)
        with pytest.raises(ValueError, match="ids: expected them on cpu, the teacher's"):
            CandidateScorer(make()).of_requests(ids.to("meta"), mask)(*asked)

    @pytest.mark.parametrize(
        ("users", "candidates", "tokens", "ffn"),
        [(3, 50, 82, 64), (1, 7, 300, 16), (4, 9, 5, 2048), (8, 1, 82, 64)],
    )
    def test_forward_bytes_is_a_bound_and_not_a_wild_one(self, users, candidates, tokens, ffn):
        spec = TokenSpec.for_codes((32, 32, 32), max_items=100)
        made = CausalTeacher(CausalConfig("qwen3", 32, 3, 4, 16, ffn, num_kv_heads=2), spec).eval()
        ids = torch.randint(0, spec.vocab_size, (users, tokens))
        codes = torch.randint(0, 32, (users, candidates, 3))
        # Without a fused attention, which a GPU does not have for every mask.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), LiveBytes() as live:
            kept = made.request_logits(ids, torch.ones_like(ids, dtype=torch.bool), codes)
        assert len(kept) == 3
        bound = made.forward_bytes(users, candidates, tokens)
        assert live.peak <= bound < 3 * live.peak


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
def test_on_a_gpu_the_numbers_are_the_cpus(backbone, cuda, codes, batch):
    teacher, table = make(backbone), PrefixTable(codes, SIZES)
    targets = torch.from_numpy(codes[:15]).view(5, 3, 3)
    with torch.no_grad():
        want = teacher.teacher_forced(*batch, targets)
        found = beam_search(teacher, *batch, table, k=10, num_beams=10)
        teacher.to(cuda)
        there = [part.to(cuda) for part in (*batch, targets)]
        got = teacher.teacher_forced(*there)
        again = beam_search(teacher, *there[:2], table, k=10, num_beams=10)
    mask = batch[1]
    assert torch.allclose(got[0].cpu()[mask], want[0][mask], atol=1e-4)
    for own, other in zip(got[1], want[1], strict=True):
        assert torch.allclose(own.cpu(), other, atol=1e-4)
    assert torch.allclose(again.scores, found.scores, atol=1e-3)
