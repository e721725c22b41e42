"""Students of other teachers than TIGER: a third party's model, and decoder-only ones."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sidmlp_kernels as sk
from sidmlp.beam import decode_states
from sidmlp.data import Interactions, Split, TokenSpec, leave_last_out
from sidmlp.distill import DistillOptions, distill, make_student
from sidmlp.evaluate import Quality, Questions, by_reference, by_teacher, encoder_features
from sidmlp.export import export_checkpoint
from sidmlp.student import Student
from sidmlp.teacher import CandidateScorer, CausalConfig, CausalTeacher, PrefixTable, beam_search
from sidmlp.teacher.distillable import check_distillable, device_of, frozen, taught
from sidmlp.teacher.train import train_teacher
from sidmlp.training import LoopOptions
from sidmlp.training.features import compute_features
from sidmlp.trie import Trie

ROOT = Path(__file__).parent.parent
SIZES = (4, 5)
CODES = np.stack(np.divmod(np.arange(20), 5), axis=1)
TOKENS = TokenSpec.for_codes(SIZES, max_items=4)
HISTORIES = [[103, 104], [119], [], [100, 101, 103, 104, 106]]


class Toy:
    """No nn.Module: states of width 6, codes known by vectors of width 3, and a bfloat16 answer."""

    tokens, dim = TOKENS, 6

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(TOKENS.vocab_size, 6, generator=generator)
        self.tables = [torch.randn(size, 3, generator=generator) for size in SIZES]
        self.batches = 0

    def teacher_forced(
        self, ids: Tensor, mask: Tensor, codes: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        assert not torch.is_grad_enabled()
        self.batches += 1
        states = self.rows[ids]
        seen = (states * mask[..., None]).sum(1)[:, None]
        second = seen[..., 3:] + self.tables[0][codes[..., 0]]
        logits = [seen[..., :3] @ self.tables[0].T, second @ self.tables[1].T]
        return states.bfloat16(), [
            values.expand(-1, codes.shape[1], -1).bfloat16() for values in logits
        ]

    def code_embeddings(self) -> list[Tensor]:
        return self.tables


@pytest.fixture(scope="module")
def split() -> Split:
    """Everybody walks round the same circle of 20 items, one or two steps at a time."""
    rng = np.random.default_rng(0)
    lists = [(rng.integers(20) + np.cumsum(rng.integers(1, 3, size=8))) % 20 for _ in range(80)]
    ids = 100 + np.arange(20, dtype=np.int64)
    return leave_last_out(Interactions(np.concatenate(lists), np.arange(81) * 8, ids))


def learn(student: Student, teacher: Any, split: Split, epochs: int = 2) -> Student:
    options = LoopOptions(epochs, batch_size=64, learning_rate=5e-3, validate_every=2)
    distill(student, teacher, split, CODES, DistillOptions(0.9), options, progress=False)
    return student.eval()


class TestHandedOver:
    def test_features_are_what_it_says(self, split):
        toy = Toy()
        features = compute_features(
            toy, split.train, CODES, dtype="float32", batch_size=100, progress=False
        )
        assert toy.batches == -(-len(split.train) // 100)
        index = np.asarray([200, 3])
        examples = split.train.take(index)
        ids, mask = TOKENS.batch_examples(examples, CODES)
        codes = torch.from_numpy(CODES[examples.target_items()])
        with torch.no_grad():
            states, logits = toy.teacher_forced(ids, mask, codes[:, None])
        got, got_mask = features.batch_states(index)
        assert torch.equal(got_mask, mask)
        assert torch.equal(got[mask], states.float()[mask])
        assert torch.equal(features.batch_logits(index), torch.cat(logits, dim=2)[:, 0].float())

    def test_a_student_of_codes_of_another_width(self, split, tmp_path, cpu_only):
        """Distilled, exported, decoded by the kernels with the toy's states."""
        toy = Toy()
        student = make_student(toy, num_heads=2, hidden_dim=32)
        assert (student.config.dim, student.config.embedding_dim) == (6, 3)
        assert torch.equal(student.embeddings[0].weight, toy.tables[0])
        learn(student, toy, split)
        export_checkpoint(
            tmp_path / "s", student, CODES, 100 + np.arange(20), tokens=TOKENS.as_dict()
        )
        model = sk.load(tmp_path / "s", encoder=lambda ids, mask: toy.rows[ids])
        found = model.decode(model.batch(HISTORIES), k=10, num_beams=20)
        ids, mask = TOKENS.batch([np.asarray(h, dtype=np.int64) - 100 for h in HISTORIES], CODES)
        trie = Trie.from_codes(CODES, 100 + np.arange(20), codes_per_level=SIZES)
        with torch.no_grad():
            want = decode_states(student, toy.rows[ids], mask, trie, 10, 20)
        assert torch.equal(found.items, want.items)
        torch.testing.assert_close(found.scores, want.scores.float(), rtol=1e-5, atol=1e-4)

    def test_a_module_is_asked_in_evaluation_mode_and_left_as_it_was(self, split):
        class Watched(nn.Module):
            tokens, dim = TOKENS, 6

            def __init__(self) -> None:
                super().__init__()
                self.toy, self.modes = Toy(), set()
                self.weight = nn.Parameter(torch.zeros(1))
                self.code_embeddings = self.toy.code_embeddings

            def teacher_forced(self, *asked: Tensor) -> tuple[Tensor, list[Tensor]]:
                self.modes.add((self.training, self.weight.requires_grad))
                return self.toy.teacher_forced(*asked)

        watched = Watched()
        learn(make_student(watched, num_heads=2, hidden_dim=8), watched, split)
        assert watched.modes == {(False, False)}
        assert watched.training

    def test_tensors_come_on_its_device(self):
        class Elsewhere(Toy):
            device = "meta"

            def teacher_forced(self, *asked: Tensor) -> tuple[Tensor, list[Tensor]]:
                assert {part.device.type for part in asked} == {"meta"}
                return (
                    torch.zeros(2, 3, 6, device="meta"),
                    [torch.zeros(2, 1, size, device="meta") for size in SIZES],
                )

        zeros = torch.zeros(2, 3, dtype=torch.int64)
        states, _ = taught(Elsewhere(), zeros, zeros > 0, zeros[:, None, :2])
        assert states.device.type == "meta"
        assert device_of(Toy()) == torch.device("cpu")
        assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
        assert device_of(nn.Identity()) == torch.device("cpu")

    def test_an_interruption_leaves_the_mode_as_it_was(self):
        module = nn.Linear(1, 1)
        modes = []

        def interrupted() -> None:
            with frozen(module):
                modes.append(module.training)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert modes == [False]
        assert module.training


class TestMistakes:
    def test_missing_members(self, split):
        for give in (make_student, lambda model: compute_features(model, split.train, CODES)):
            with pytest.raises(ValueError, match="got Linear without tokens, dim, teacher_forced"):
                give(nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("tables", "got"),
        [
            ([torch.zeros(4, 3)], r"\[\[4, 3\]\]"),
            ([torch.zeros(4, 3), torch.zeros(4, 3)], r"\[\[4, 3\], \[4, 3\]\]"),
            ([torch.zeros(4, 3), torch.zeros(5, 2)], r"\[\[4, 3\], \[5, 2\]\]"),
            ([], r"\[\]"),
        ],
    )
    def test_embeddings_that_do_not_fit(self, tables, got):
        toy = Toy()
        toy.tables = tables
        with pytest.raises(ValueError, match=rf"a matrix \[C_l, E\] for each of \[4, 5\].*{got}"):
            check_distillable(toy)

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda s, own: (s[:, 1:], own), r"states \[7, 10, 6\].*\[7, 9, 6\]"),
            (lambda s, own: (s.long(), own), "states .* got torch.int64"),
            (lambda s, own: (s, own[:1]), r"logits \[\[7, 1, 4\], \[7, 1, 5\]\].* \[\[7, 1, 4\]\]"),
            (lambda s, own: (s, [v[:, 0] for v in own]), r"logits .* \[\[7, 4\], \[7, 5\]\]"),
            (lambda s, own: (s, [v.long() for v in own]), "logits .*torch.int64"),
        ],
    )
    def test_answers_that_do_not_fit(self, split, change, what):
        class Wrong(Toy):
            def teacher_forced(self, *asked: Tensor) -> tuple[Tensor, list[Tensor]]:
                return change(*super().teacher_forced(*asked))

        seven = split.test.take(np.arange(7))
        with pytest.raises(ValueError, match=f"teacher_forced: expected floating {what}"):
            compute_features(Wrong(), seven, CODES, progress=False)


@pytest.fixture(scope="module")
def teacher(split) -> CausalTeacher:
    torch.manual_seed(0)
    teacher = CausalTeacher(CausalConfig("qwen3", 16, 1, 2, 8, 32, 0.0, 1), TOKENS)
    options = LoopOptions(epochs=12, batch_size=64, learning_rate=1e-2, warmup_steps=5)
    train_teacher(teacher, split, CODES, options, progress=False)
    return teacher


@pytest.fixture(scope="module")
def student(teacher, split) -> Student:
    return learn(make_student(teacher, num_heads=2, hidden_dim=32), teacher, split, epochs=20)


@pytest.fixture(scope="module")
def checkpoint(student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("causal") / "student"
    export_checkpoint(path, student, CODES, 100 + np.arange(20), tokens=TOKENS.as_dict())
    return path


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, "float32"), (-math.inf, "float32"), (-1e9, "float16")]
)
@pytest.mark.parametrize("name", ["states", "logits"])
def test_what_is_not_finite_is_refused(split, name, value, dtype):
    class Wrong(Toy):
        def teacher_forced(self, *asked: Tensor) -> tuple[Tensor, list[Tensor]]:
            states, logits = super().teacher_forced(*asked)
            (states if name == "states" else logits[1]).view(-1)[0] = value
            return states, logits

    with pytest.raises(ValueError, match=f"{name} that are finite in {dtype}"):
        compute_features(Wrong(), split.test, CODES, dtype=dtype, progress=False)


def test_impossible_codes_and_padding_may_be_anything(split):
    class Masked(Toy):
        def teacher_forced(
            self, ids: Tensor, mask: Tensor, codes: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            states, logits = super().teacher_forced(ids, mask, codes)
            logits[0][..., 1] = -1e4
            return states.masked_fill(~mask[..., None], math.nan), logits

    student = learn(make_student(Masked(), num_heads=2, hidden_dim=8), Masked(), split)
    assert all(bool(p.isfinite().all()) for p in student.parameters())


class TestDecoderOnly:
    def test_its_student_recovers_it(self, teacher, student, split):
        questions = Questions.of(split.test)
        slow = Quality.of(by_teacher(teacher, CODES, questions).items, questions.targets)
        features = encoder_features(teacher, CODES, questions)
        fast = Quality.of(by_reference(student, features, CODES, questions), questions.targets)
        # Two steps are possible: guessing the order of the two gives about 0.8.
        assert slow.ndcg_10 > 0.6
        assert fast.ndcg_10 > 0.95 * slow.ndcg_10

    def test_decodes_from_ids_with_its_encoder(self, cpu_only, teacher, checkpoint):
        model = sk.load(checkpoint, encoder=teacher.encode)
        batch = model.batch(HISTORIES)
        with torch.no_grad():
            states = teacher.encode(batch.ids, batch.mask)
        found = model.decode(batch, k=5, num_beams=20, exclude=HISTORIES)
        want = sk.load(checkpoint).decode_states(states, batch.mask, 5, 20, exclude=HISTORIES)
        assert torch.equal(found.items, want.items)
        assert torch.equal(found.scores, want.scores)
        assert found.counts.tolist() == [5, 5, 5, 5]

    def test_says_what_is_missing_without(self, cpu_only, checkpoint):
        model = sk.load(checkpoint)
        with pytest.raises(ValueError, match=r"batch: expected a model with an encoder.*encoder= "):
            model.batch(HISTORIES)

    def test_rescores_as_its_own_wide_search(self, cpu_only, teacher, checkpoint):
        model = sk.load(checkpoint, encoder=teacher.encode)
        batch, scorer = model.batch(HISTORIES), CandidateScorer(teacher)
        found = model.decode(
            batch, k=10, num_beams=20, rescore=scorer.of_requests(batch.ids, batch.mask)
        )
        table = PrefixTable(CODES, SIZES)
        want = beam_search(teacher, batch.ids, batch.mask, table, k=10, num_beams=20)
        assert torch.equal(found.items, want.items + 100)
        torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-4)
        with pytest.raises(ValueError, match=r"rescore=scorer\.of_requests"):
            model.decode(batch, k=10, num_beams=20, rescore=scorer)


def test_an_encoder_takes_the_place_of_the_checkpoints(cpu_only, tmp_path):
    from small_recommender import SPEC, TOKENS, make_catalogue, make_encoder, make_student

    parts = (make_student(), make_catalogue(), make_encoder())
    sk.Recommender(*parts, "cpu", "float32", tokens=TOKENS).save_pretrained(tmp_path)
    calls = []

    def encoder(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(ids.shape)
        return torch.ones(*ids.shape, SPEC.dim)

    model = sk.load(tmp_path, encoder=encoder)
    batch = model.batch([[100, 101]])
    found = model.decode(batch, 5, 20)
    want = model.decode_states(torch.ones(*batch.ids.shape, SPEC.dim), batch.mask, 5, 20)
    assert calls == [batch.ids.shape]
    assert torch.equal(found.scores, want.scores)
    own = sk.load(tmp_path)
    assert not torch.equal(own.decode(batch, 5, 20).scores, found.scores)


def test_the_documents_program(capsys) -> None:
    """docs/teachers.md: its model, its student and the numbers that it prints."""
    text = (ROOT / "docs" / "teachers.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(program, scope)
    assert "Recall@5" in capsys.readouterr().out
    mine, model, recs = (scope[name] for name in ("mine", "model", "recs"))
    assert set(recs.items.flatten().tolist()) <= set(range(1000, 1060))
    with torch.no_grad():
        batch = model.batch([[1003, 1004, 1006], [1059]])
        states = mine.encode(batch.ids, batch.mask)
    want = model.decode_states(states, batch.mask, 5, 20)
    assert torch.equal(recs.items, want.items)
    assert {1007, 1008} == set(recs.items[0, :2].tolist())
    assert scope["quality"].recall_5 > 0.9 > 0.5 > scope["popular"].recall_5
