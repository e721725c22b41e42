"""Distillation: the loss, the frozen teacher's features, and what a student learns from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sidmlp.data import Interactions, Split, TokenSpec, leave_last_out
from sidmlp.distill import DistillOptions, distill, distillation_loss, make_student
from sidmlp.evaluate import (
    Quality,
    Questions,
    by_popularity,
    by_reference,
    by_teacher,
    encoder_features,
)
from sidmlp.teacher import Teacher, TeacherConfig
from sidmlp.teacher.train import train_teacher
from sidmlp.training import LoopOptions, load_tensors
from sidmlp.training.features import compute_features

SIZES = (4, 3, 3)
CODES = np.stack(np.unravel_index(np.arange(30), SIZES), axis=1)


@pytest.fixture(scope="module")
def split() -> Split:
    """Everybody walks round the same circle of items, one or two steps at a time."""
    rng = np.random.default_rng(0)
    lists = [(rng.integers(30) + np.cumsum(rng.integers(1, 3, size=9))) % 30 for _ in range(60)]
    return leave_last_out(
        Interactions(np.concatenate(lists), np.arange(61) * 9, np.arange(30, dtype=np.int64))
    )


@pytest.fixture(scope="module")
def teacher(split) -> Teacher:
    torch.manual_seed(0)
    config = TeacherConfig(dim=16, num_layers=1, num_heads=2, head_dim=8, ffn_dim=32, dropout=0.0)
    model = Teacher(config, TokenSpec.for_codes(SIZES, max_items=4))
    options = LoopOptions(epochs=15, batch_size=64, learning_rate=1e-2, warmup_steps=5)
    train_teacher(model, split, CODES, options, progress=False)
    return model


def run(teacher, split, tmp_path=None, epochs=2, **changes):
    student = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32, dropout=0.2)
    options = {"epochs": epochs, "batch_size": 64, "learning_rate": 5e-3, "warmup_steps": 5}
    result = distill(
        student,
        teacher,
        split,
        CODES,
        DistillOptions(alpha=0.7, tau=2.0),
        LoopOptions(**{**options, **changes}),
        state_file=None if tmp_path is None else tmp_path / "state.pt",
        feature_directory=None if tmp_path is None else tmp_path / "features",
        progress=False,
    )
    return student, result


class TestLoss:
    @pytest.mark.parametrize(("alpha", "tau"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.5)])
    def test_is_the_formula(self, alpha, tau):
        rng = np.random.default_rng(1)
        own, wanted = ([rng.normal(size=(5, c)) for c in SIZES] for _ in range(2))
        codes = CODES[:5]

        def log_softmax(x):
            return x - np.log(np.exp(x).sum(1, keepdims=True))

        expected = 0.0
        for level, (s, t) in enumerate(zip(own, wanted, strict=True)):
            p, q = log_softmax(t / tau), log_softmax(s / tau)
            expected += alpha * tau**2 * (np.exp(p) * (p - q)).sum(1).mean()
            expected -= (1 - alpha) * log_softmax(s)[np.arange(5), codes[:, level]].mean()
        got = distillation_loss(
            [torch.from_numpy(s) for s in own],
            [torch.from_numpy(t) for t in wanted],
            torch.from_numpy(codes),
            DistillOptions(alpha, tau),
        )
        assert float(got) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"tau": 0.0}])
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            DistillOptions(**options)


class TestFeatures:
    def test_are_what_the_teacher_says(self, teacher, split):
        features = compute_features(
            teacher, split.train, CODES, dtype="float32", batch_size=50, progress=False
        )
        index = np.asarray([3, 200, 0])
        examples = split.train.take(index)
        ids, mask = teacher.tokens.batch_examples(examples, CODES)
        target = torch.from_numpy(CODES[examples.target_items()])
        with torch.no_grad():
            states = teacher.encode(ids, mask)
            logits = teacher.level_logits(teacher.decoder_logits(states, mask, target[:, None]))
        got, got_mask = features.batch_states(index)
        assert torch.equal(got_mask, mask)
        assert torch.allclose(got[mask], states[mask], atol=1e-5)
        assert not got[~mask].any()
        assert torch.allclose(features.batch_logits(index), torch.cat(logits, 2)[:, 0], atol=1e-4)
        assert np.array_equal(features.codes[index], target.numpy())

    def test_are_kept_until_something_changes(self, teacher, split, tmp_path, monkeypatch):
        def features(fingerprint: str):
            return compute_features(
                teacher,
                split.validation,
                CODES,
                directory=tmp_path / "f",
                fingerprint=fingerprint,
                progress=False,
            )

        first = np.array(features("a").states)
        calls = []
        monkeypatch.setattr(
            Teacher,
            "encode",
            lambda self, ids, mask: calls.append(1) or torch.zeros(*ids.shape, 16),
        )
        assert np.array_equal(features("a").states, first)
        assert not calls
        assert not np.array_equal(features("b").states, first)
        assert calls

    def test_what_a_kill_left_is_gone_on_with_bit_by_bit(
        self, teacher, split, tmp_path, monkeypatch
    ):
        arguments = {"batch_size": 8, "dtype": "float32", "progress": False}
        arguments["directory"] = tmp_path
        work = (teacher, split.train, CODES)
        encode, calls = Teacher.encode, 0

        def killed_at(number):
            def call(*given):
                nonlocal calls
                calls += 1
                if calls == number:
                    raise KeyboardInterrupt
                return encode(*given)

            return call

        monkeypatch.setattr(Teacher, "encode", killed_at(40))
        with pytest.raises(KeyboardInterrupt):
            compute_features(*work, **arguments)
        calls = 0
        monkeypatch.setattr(Teacher, "encode", killed_at(-1))
        got = compute_features(*work, **arguments)
        # Two shards of 16 batches were there.
        assert calls == -(-len(split.train) // 8) - 32 > 0
        want = compute_features(*work, **{**arguments, "directory": None})
        for name in ("states", "logits", "codes", "token_offsets"):
            assert np.array_equal(getattr(got, name), getattr(want, name)), name

    def test_unfinished_ones_are_made_anew(self, teacher, split, tmp_path, monkeypatch):
        decoder_logits = Teacher.decoder_logits

        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Teacher, "decoder_logits", fail)
        arguments = (teacher, split.validation, CODES)
        with pytest.raises(KeyboardInterrupt):
            compute_features(*arguments, directory=tmp_path, progress=False)
        monkeypatch.setattr(Teacher, "decoder_logits", decoder_logits)
        got = compute_features(*arguments, directory=tmp_path, progress=False)
        want = compute_features(*arguments, progress=False)
        assert np.array_equal(got.logits, want.logits)


class TestDistillation:
    def test_starts_from_the_teachers_embeddings(self, teacher):
        student = make_student(teacher)
        rows = teacher.t5.shared.weight
        assert torch.equal(student.embeddings[0].weight, rows[1:5])
        assert torch.equal(student.embeddings[1].weight, rows[5:8])
        assert len(student.embeddings) == 2

    def test_freezes_teacher_and_embeddings_and_moves_the_rest(self, teacher, split):
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        start = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32).state_dict()
        student, _ = run(teacher, split)
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[name]), name
        for name, value in student.state_dict().items():
            assert torch.equal(value, start[name]) == name.startswith("embeddings."), name

    def test_student_recovers_its_teacher(self, teacher, split):
        student, result = run(teacher, split, epochs=25, validate_every=5)
        questions = Questions.of(split.test)
        features = encoder_features(teacher, CODES, questions)
        slow = Quality.of(by_teacher(teacher, CODES, questions).items, questions.targets)
        fast = Quality.of(by_reference(student, features, CODES, questions), questions.targets)
        # Two steps are possible, so 1 and 1/log2(3) are what a perfect model alternates between.
        assert slow.ndcg_10 > 0.6
        assert fast.ndcg_10 > 0.95 * slow.ndcg_10
        assert result.best_score > 0.6

    def test_resumed_equals_uninterrupted(self, teacher, split, tmp_path, monkeypatch):
        straight, result = run(teacher, split, tmp_path / "one", epochs=3)
        calls = 0
        from sidmlp import distill as module

        loss = module.distillation_loss

        def interrupted(*arguments):
            nonlocal calls
            calls += 1
            if calls == 14:
                raise KeyboardInterrupt
            return loss(*arguments)

        monkeypatch.setattr(module, "distillation_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(teacher, split, tmp_path / "two", epochs=3)
        monkeypatch.undo()
        assert 1 <= load_tensors(tmp_path / "two" / "state.pt")["result"]["epochs"] < 3
        resumed, again = run(teacher, split, tmp_path / "two", epochs=3)
        assert again == result
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


class TestQuality:
    def test_popularity_skips_what_the_user_had(self):
        items = np.asarray([0, 1, 2, 9, 9, 0, 1, 2, 8, 8, 0, 3, 4, 8, 9])
        data = Interactions(items, np.arange(0, 16, 5), np.arange(10))
        split = leave_last_out(data)
        found = by_popularity(data, split, Questions.of(split.test), k=3)
        # Counts in training: item 0 three times, 1 and 2 twice, 3 and 4 once.
        assert found.tolist() == [[3, 4, 5], [3, 4, 5], [1, 2, 5]]

    def test_numbers(self):
        items = torch.tensor([[7, *range(20, 29)], [*range(20, 26), 7, 26, 27, 28]])
        quality = Quality.of(items, torch.tensor([7, 7]))
        assert (quality.recall_5, quality.recall_10) == (0.5, 1.0)
        assert quality.ndcg_5 == pytest.approx(0.5)
        assert quality.ndcg_10 == pytest.approx((1 + 1 / math.log2(8)) / 2)
