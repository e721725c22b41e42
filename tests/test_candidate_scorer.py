"""The teacher scores candidates in one forward: against transformers, one candidate at a time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from small_recommender import CODES, SPEC, T5, TOKENS, make_catalogue, make_student
from torch import Tensor, nn

import sidmlp_kernels as sk
from sidmlp.data import TokenSpec
from sidmlp.teacher import CandidateScorer, PrefixTable, Teacher, TeacherConfig, beam_search
from sidmlp_kernels.student import weight_shapes

ROOT = Path(__file__).parent.parent
HISTORIES = [[101, 102], [130], [], [150, 151, 152, 153], [101, 140]]
EXCLUDE = [[101, 102], [130], None, [150, 151, 152, 153], [101, 140]]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    config = TeacherConfig(16, T5.num_layers, T5.num_heads, T5.head_dim, T5.ffn_dim, dropout=0.1)
    made = Teacher(config, TokenSpec.for_codes(CODES, max_items=4))
    with torch.no_grad():
        made.t5.shared.weight.mul_(3)  # spreads the scores
    return made.eval()


@pytest.fixture(scope="module")
def catalogue() -> sk.Catalogue:
    made = make_catalogue()
    assert len(np.unique(made.codes, axis=0)) < len(made.codes)  # some share their codes
    return made


@pytest.fixture(scope="module")
def model(cpu_only: None, teacher: Teacher, catalogue: sk.Catalogue) -> sk.Recommender:
    """A student that reads the teacher's encoder, and knows nothing."""
    encoder = sk.T5Encoder.from_weights(T5, teacher.t5.encoder.state_dict())
    return sk.Recommender(make_student(), catalogue, encoder, "cpu", "float32", tokens=TOKENS)


@torch.no_grad()
def naive(teacher: Teacher, ids: Tensor, mask: Tensor, codes: np.ndarray, over: str) -> Tensor:
    """Scores [B, N] of codes [N, L] for every user, by transformers' own forward for one candidate
    of one user at a time, without padding."""
    items = {tuple(row) for row in codes.tolist()}
    scores = torch.zeros(len(ids), len(codes), dtype=torch.float64)
    for user, own in enumerate(ids):
        encoded = teacher.t5.encoder(input_ids=own[mask[user]][None])
        for n, row in enumerate(codes.tolist()):
            tokens = [code + first for code, first in zip(row, TOKENS.code_offsets, strict=True)]
            logits = teacher.t5(
                encoder_outputs=encoded, decoder_input_ids=torch.tensor([[0, *tokens[:-1]]])
            ).logits[0]
            for level, token in enumerate(tokens):
                first, size = TOKENS.code_offsets[level], CODES[level]
                allowed = list(range(logits.shape[1]))
                if over == "codebook" or (over == "children" and level == 0):
                    allowed = list(range(first, first + size))
                elif over == "children":
                    known = {item[level] for item in items if item[:level] == tuple(row[:level])}
                    allowed = [first + code for code in sorted(known)]
                total = logits[level, allowed].double().logsumexp(0)
                scores[user, n] += logits[level, token].double() - total
    return scores


def scorer_of(teacher: Teacher, over: str, codes: np.ndarray, **options: Any) -> CandidateScorer:
    table = PrefixTable(codes, CODES) if over == "children" else None
    return CandidateScorer(teacher, normalisation=over, table=table, **options)


def everything(codes: np.ndarray, users: int) -> tuple[Tensor, Tensor]:
    """All items as candidates of everybody: codes [B, N, L], counts [B]."""
    wanted = torch.from_numpy(codes.astype(np.int32)).expand(users, -1, -1)
    return wanted, torch.full((users,), len(codes), dtype=torch.int32)


def without_a_first_code(catalogue: sk.Catalogue) -> np.ndarray:
    """Its codes but for one of level 1, which a student's softmax counts all the same."""
    codes = catalogue.codes.astype(np.int64)
    return codes[codes[:, 0] != 2]


@pytest.mark.parametrize("over", ["model", "codebook", "children"])
def test_scores_equal_one_candidate_at_a_time(model, teacher, catalogue, over) -> None:
    batch, codes = model.batch(HISTORIES), without_a_first_code(catalogue)
    states = model._states(batch.ids, batch.mask)
    got = scorer_of(teacher, over, codes)(states, batch.mask, *everything(codes, len(batch)))
    want = naive(teacher, batch.ids, batch.mask, codes, over)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("beams", [12, 60])
@pytest.mark.parametrize("over", ["model", "children"])
def test_the_order_is_the_teachers(model, teacher, catalogue, over, beams) -> None:
    batch, codes = model.batch(HISTORIES), catalogue.codes.astype(np.int64)
    scorer = scorer_of(teacher, over, codes)
    proposed = model.decode(batch, beams, beams, EXCLUDE)
    found = model.decode(batch, 10, beams, EXCLUDE, rescore=scorer)
    want = naive(teacher, batch.ids, batch.mask, codes, over)
    changed = 0
    for user in range(len(batch)):
        candidates = proposed.items[user, : int(proposed.counts[user])].tolist()
        # Equal codes have equal scores, exactly, in the loop as well.
        ranked = sorted(candidates, key=lambda item: -float(want[user, item - 100]))
        assert found.items[user].tolist() == ranked[:10], user
        changed += ranked[:10] != candidates[:10]
        if beams == 60:
            everybody = set(range(100, 160)) - set(EXCLUDE[user] or [])
            assert set(candidates) == everybody
    assert changed == len(batch)


def test_with_all_items_it_is_the_teachers_own_wide_search(model, teacher, catalogue) -> None:
    batch, codes = model.batch(HISTORIES), catalogue.codes.astype(np.int64)
    hidden = [np.array(items or [], dtype=np.int64) - 100 for items in EXCLUDE]
    table = PrefixTable(codes, CODES)
    want = beam_search(teacher, batch.ids, batch.mask, table, k=10, num_beams=210, exclude=hidden)
    found = model.decode(batch, 10, 60, EXCLUDE, rescore=CandidateScorer(teacher))
    assert torch.equal(found.items, want.items + 100)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-4)


class Recorder:
    """A model that notes the shape of every forward."""

    def __init__(self, teacher: Teacher) -> None:
        self.inner, self.calls = teacher, []
        self.codes_per_level, self.encode = teacher.codes_per_level, teacher.encode
        self.forward_bytes = teacher.forward_bytes

    def code_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        self.calls.append((*codes.shape[:2], mask.shape[1]))
        return self.inner.code_logits(states, mask, codes)


@pytest.mark.parametrize("over", ["model", "children"])
def test_chunks_change_nothing_but_rounding_and_fit_in_memory(
    model, teacher, catalogue, over
) -> None:
    batch, codes = model.batch(HISTORIES), catalogue.codes.astype(np.int64)
    states = model._states(batch.ids, batch.mask)
    asked = (states, batch.mask, *everything(codes, 5))
    whole = scorer_of(teacher, over, codes)(*asked)
    tokens = batch.mask.shape[1]
    one_user = teacher.forward_bytes(1, 60, tokens)
    shapes = set()
    for memory in (1, one_user // 7, one_user, 3 * one_user):
        recorder = Recorder(teacher)
        parts = scorer_of(recorder, over, codes, memory=memory)(*asked)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-5)
        assert torch.equal(parts.argsort(stable=True), whole.argsort(stable=True))
        assert sum(users * n for users, n, _ in recorder.calls) == 5 * 60
        shapes.add(recorder.calls[0])
        for call in recorder.calls:
            assert call[:2] == (1, 1) or teacher.forward_bytes(*call) <= memory
    assert (1, 1, tokens) in shapes
    assert len(shapes) == 4  # several users; many, few, one of the candidates of one


@pytest.mark.parametrize(
    ("users", "candidates", "tokens", "ffn"), [(3, 50, 82, 64), (1, 7, 500, 16), (4, 9, 5, 2048)]
)
def test_forward_bytes_is_a_bound_and_not_a_wild_one(users, candidates, tokens, ffn) -> None:
    sizes = (32, 32, 32)
    torch.manual_seed(0)
    config = TeacherConfig(32, 3, 2, 16, ffn, dropout=0.0)
    made = Teacher(config, TokenSpec.for_codes(sizes)).eval()
    states, mask = torch.randn(users, tokens, 32), torch.ones(users, tokens, dtype=torch.bool)
    codes = torch.randint(0, 32, (users, candidates, 3))
    with torch.no_grad(), LiveBytes() as live:
        kept = made.code_logits(states, mask, codes)
    assert len(kept) == 3
    bound = made.forward_bytes(users, candidates, tokens)
    assert live.peak <= bound < 4 * live.peak


def test_masked_states_may_hold_anything(model, teacher, catalogue) -> None:
    batch, codes = model.batch(HISTORIES), catalogue.codes
    states = model._states(batch.ids, batch.mask)
    poisoned = states.masked_fill(~batch.mask[..., None], math.nan)
    assert poisoned.isnan().any()
    scorer, asked = CandidateScorer(teacher), everything(codes, 5)
    assert torch.equal(scorer(poisoned, batch.mask, *asked), scorer(states, batch.mask, *asked))


def test_a_request_scores_alike_in_every_batch(model, teacher, catalogue) -> None:
    batch = model.batch(HISTORIES)
    states = model._states(batch.ids, batch.mask)
    scorer, asked = CandidateScorer(teacher), everything(catalogue.codes, 5)
    whole = scorer(states, batch.mask, *asked)
    for user in range(5):
        row, own = slice(user, user + 1), batch.mask[user].sum()
        alone = scorer(states[row, :own], batch.mask[row, :own], *(a[row] for a in asked))
        torch.testing.assert_close(alone, whole[row], rtol=1e-5, atol=1e-5)


def test_past_counts_and_unknown_items(model, teacher, catalogue) -> None:
    batch, codes = model.batch(HISTORIES), catalogue.codes.astype(np.int64)
    states = model._states(batch.ids, batch.mask)
    wanted, _ = everything(codes, 5)
    counts = torch.tensor([60, 3, 0, 1, 59], dtype=torch.int32)
    past = torch.arange(60) >= counts[:, None]
    wanted = wanted.masked_fill(past[..., None], -1)
    got = CandidateScorer(teacher)(states, batch.mask, wanted, counts)
    assert torch.equal(got == -torch.inf, past)
    for known in (codes[:30], without_a_first_code(catalogue)):
        table = PrefixTable(known, CODES)
        few = CandidateScorer(teacher, normalisation="children", table=table)
        got = few(states, batch.mask, *everything(codes, 5))
        lacking = [tuple(row) not in {tuple(r) for r in known} for row in codes]
        assert 0 < sum(lacking) < 60
        assert torch.equal(got == -torch.inf, torch.tensor(lacking).expand(5, -1))
        assert not got.isnan().any()


def test_half_precision_states_are_scored_in_the_teachers_dtype(model, teacher, catalogue) -> None:
    batch = model.batch(HISTORIES)
    states = model._states(batch.ids, batch.mask).bfloat16()
    scorer, asked = CandidateScorer(teacher), everything(catalogue.codes, 5)
    rounded = scorer(states.float(), batch.mask, *asked)
    assert torch.equal(scorer(states, batch.mask, *asked), rounded)


def test_a_student_with_another_encoder(teacher, catalogue, model) -> None:
    """The states are not the teacher's: it encodes the requests itself."""
    table = torch.randn(TOKENS.vocab_size, SPEC.dim, generator=torch.Generator().manual_seed(2))
    other = sk.Recommender(
        make_student(), catalogue, lambda ids, mask: table[ids], "cpu", "float32", tokens=TOKENS
    )
    batch, scorer = other.batch(HISTORIES), CandidateScorer(teacher)
    got = other.decode(batch, 10, 60, rescore=scorer.of_requests(batch.ids, batch.mask))
    want = model.decode(batch, 10, 60, rescore=scorer)
    assert torch.equal(got.items, want.items)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-4)


class TestMistakes:
    def test_settings(self, teacher, catalogue) -> None:
        table = PrefixTable(catalogue.codes.astype(np.int64), CODES)
        with pytest.raises(ValueError, match="model: expected codes_per_level, encode"):
            CandidateScorer(nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="normalisation: expected one of model, codebook"):
            CandidateScorer(teacher, normalisation="softmax")
        with pytest.raises(ValueError, match="table: expected a PrefixTable"):
            CandidateScorer(teacher, normalisation="children")
        with pytest.raises(ValueError, match="table: expected a PrefixTable"):
            CandidateScorer(teacher, table=table)
        with pytest.raises(ValueError, match="memory: expected bytes >= 1"):
            CandidateScorer(teacher, memory=0)
        wide = PrefixTable(catalogue.codes.astype(np.int64), (6, 5, 9))
        with pytest.raises(ValueError, match=r"table: expected \(6, 5, 7\) codes per level"):
            CandidateScorer(teacher, normalisation="children", table=wide)

    def test_a_teacher_in_training(self, model, teacher) -> None:
        teacher.train()
        try:
            with pytest.raises(ValueError, match="teacher: expected evaluation mode"):
                model.decode(model.batch(HISTORIES), 5, 20, rescore=CandidateScorer(teacher))
        finally:
            teacher.eval()

    def test_states_and_codes_of_another_student(self, teacher) -> None:
        scorer = CandidateScorer(teacher)
        mask, counts = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, dtype=torch.int32)
        codes = torch.zeros(2, 1, 3, dtype=torch.int32)
        with pytest.raises(ValueError, match="states: expected width 16 on cpu, the teacher's"):
            scorer(torch.zeros(2, 4, 8), mask, codes, counts)
        with pytest.raises(ValueError, match="codes: expected 3 levels, the model's, got 2"):
            scorer(torch.zeros(2, 4, 16), mask, codes[..., :2], counts)

    @pytest.mark.parametrize(
        ("answer", "what"),
        [
            (lambda right: right[:2], "expected 3 tensors, one per level, got 2"),
            (lambda right: [right[0], right[1], right[2][:, :1]], r"\[5, 20, 7\] for level 3"),
            (lambda right: [right[0].long(), *right[1:]], "expected floating .* for level 1"),
        ],
    )
    def test_logits_that_do_not_fit(self, model, teacher, answer, what) -> None:
        class Wrong(Recorder):
            def code_logits(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
                return answer(super().code_logits(states, mask, codes))

        with pytest.raises(ValueError, match=what):
            model.decode(model.batch(HISTORIES), 5, 20, rescore=CandidateScorer(Wrong(teacher)))


def test_the_documents_model_of_ones_own() -> None:
    """The program of docs/rescoring.md, against a loop over candidates without any batch."""
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "rescoring.md").read_text(), re.DOTALL
    )
    scope: dict[str, Any] = {}
    exec(program, scope)
    gru, model, batch, recs = (scope[name] for name in ("gru", "model", "batch", "recs"))
    assert set(weight_shapes(scope["spec"])) == set(model.student.weights)
    exclude = [[12, 87, 40], [7, 19]]
    proposed = model.decode(batch, k=50, num_beams=50, exclude=exclude)
    offsets = model.tokens.code_offsets
    for user in range(2):
        history = batch.ids[user, batch.mask[user]]
        scored = []
        for item, codes in zip(proposed.items[user], proposed.codes[user], strict=True):
            tokens = torch.tensor([c + o for c, o in zip(codes.tolist(), offsets, strict=True)])
            with torch.no_grad():
                read = torch.cat([history, tokens[:-1]])
                hidden = gru.gru(gru.embedding(read)[None])[0][0, -3:]
                logits = gru.output(hidden)
            score = 0.0
            for level, first in enumerate(offsets):
                own = logits[level, first : first + 16].log_softmax(0)
                score += float(own[codes[level]])
            scored.append((score, int(item)))
        scored.sort(key=lambda pair: -pair[0])
        assert recs.items[user].tolist() == [item for _, item in scored[:5]]
        want = torch.tensor([score for score, _ in scored[:5]])
        torch.testing.assert_close(recs.scores[user], want, rtol=1e-5, atol=1e-5)
    assert recs.counts.tolist() == [5, 5]
