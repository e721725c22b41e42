"""SID-MLP++: an encoder of MLPs learns the teacher's states, then the student learns on its own."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from test_distill import CODES, split, teacher

from sidmlp import distill as distill_module
from sidmlp import distill_encoder
from sidmlp.distill import DistillOptions, make_student, train_student
from sidmlp.distill_encoder import make_encoder, state_error, train_encoder
from sidmlp.lessons import take_lessons
from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sidmlp.states_by_role import states_by_role
from sidmlp.training import Execution, LoopOptions, TrainingFailed

__all__ = ["split", "teacher"]  # fixtures

# Compilation as far as the graphs of forward and backward: C++ would take a minute.
AOT = functools.partial(torch.compile, backend="aot_eager")
LOOP = {"batch_size": 64, "learning_rate": 1e-2, "warmup_steps": 5}


@pytest.fixture(scope="module")
def lessons(teacher, split):
    return take_lessons(teacher, split, CODES, dtype="float32", progress=False)


def new_encoder(teacher, **sizes) -> MLPEncoder:
    return make_encoder(teacher, **{"num_layers": 2, "hidden_dim": 32, **sizes})


def first_stage(teacher, lessons, epochs=4, **arguments):
    encoder = new_encoder(teacher)
    loop = LoopOptions(epochs=epochs, **LOOP)
    return encoder, train_encoder(encoder, lessons, loop, progress=False, **arguments)


@pytest.fixture(scope="module")
def encoder(teacher, lessons) -> MLPEncoder:
    """One that has learnt the teacher's states."""
    return first_stage(teacher, lessons, epochs=10)[0]


def second_stage(teacher, lessons, epochs=3, joint=None, **arguments):
    student = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32, dropout=0.1)
    loop = LoopOptions(epochs=epochs, **LOOP)
    result = train_student(
        student,
        lessons,
        DistillOptions(),
        loop,
        together_with=joint,
        progress=False,
        **arguments,
    )
    return student, result


class TestByRole:
    @pytest.mark.parametrize("roles", [1, 3, 4])
    @pytest.mark.parametrize("width", [1, 2, 9, 10, 13])
    def test_is_the_oracle(self, roles, width):
        torch.manual_seed(roles)
        encoder = MLPEncoder(MLPEncoderConfig(2, roles, 8, 12, 20, 16)).double()
        mask = torch.rand(9, width) < 0.7
        mask[0], mask[1] = True, False
        ids = torch.randint(0, 20, mask.shape).masked_fill(~mask, 99)
        wanted = encoder(ids, mask)
        got = states_by_role(encoder, ids, mask)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        for loss in (wanted, got):
            encoder.zero_grad()
            loss.square().sum().backward()
            grads = [p.grad.clone() for p in encoder.parameters()]
            if loss is wanted:
                expected = grads
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)


class TestFirstStage:
    def test_begins_with_the_teacher_s_embeddings(self, teacher):
        encoder = new_encoder(teacher)
        own, theirs = encoder.embed_tokens.weight, teacher.t5.shared.weight
        assert torch.equal(own[1:11], theirs[1:11])
        assert 0 < float(own[11:].detach().abs().max()) < 4 * float(theirs[1:11].detach().std())
        assert encoder.config.max_length == teacher.tokens.max_tokens

    def test_lowers_the_error_of_states(self, teacher, lessons):
        before = state_error(new_encoder(teacher), lessons, Execution())
        encoder, result = first_stage(teacher, lessons, epochs=10)
        after = state_error(encoder, lessons, Execution())
        assert after.mse < 0.2 * before.mse
        assert result.best_score == pytest.approx(after.mse)
        assert result.best_score == min(record["score"] for record in result.history)
        assert after.explained > 0.5 > before.explained
        # As the definition has it, over tokens one by one.
        ids, mask = lessons.tokens.batch_examples(lessons.validation, CODES)
        wanted = teacher.encode(ids, mask)[mask]
        got = encoder(ids, mask)[mask]
        assert after.mse == pytest.approx((got - wanted).square().mean().item(), rel=1e-3)
        variance = float(wanted.var(0, correction=0).mean())
        assert after.explained == pytest.approx(1 - after.mse / variance, rel=1e-3)

    def test_few_shapes_learn_the_same(self, teacher, lessons, monkeypatch):
        monkeypatch.setattr(torch, "compile", AOT)
        _, plain = first_stage(teacher, lessons)
        _, static = first_stage(teacher, lessons, execution=Execution(compile=True))
        assert static.best_score == pytest.approx(plain.best_score, rel=0.3)

    def test_resumed_equals_uninterrupted(self, teacher, lessons, tmp_path):
        class Stopped(Exception):
            pass

        def stop(facts):
            if facts["epoch"] == 3:
                raise Stopped

        state = tmp_path / "encoder.pt"
        straight, wanted = first_stage(teacher, lessons)
        with pytest.raises(Stopped):
            first_stage(teacher, lessons, state_file=state, log=stop)
        resumed, found = first_stage(teacher, lessons, state_file=state)
        assert found == wanted
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_a_loss_that_is_not_finite_ends_it_and_can_be_resumed(
        self, teacher, lessons, tmp_path, monkeypatch
    ):
        error, calls = distill_encoder.squared_error, 0

        def broken(*arguments):
            nonlocal calls
            calls += 1
            return error(*arguments) * (math.nan if calls == 15 else 1)

        state = tmp_path / "encoder.pt"
        monkeypatch.setattr(distill_encoder, "squared_error", broken)
        with pytest.raises(TrainingFailed, match="encoder: the loss is nan in epoch 3; the state"):
            first_stage(teacher, lessons, state_file=state)
        monkeypatch.undo()
        _, found = first_stage(teacher, lessons, state_file=state)
        _, wanted = first_stage(teacher, lessons)
        assert found == wanted

    def test_states_of_another_width_are_refused(self, lessons):
        tokens = lessons.tokens
        config = MLPEncoderConfig(1, 3, 24, 8, tokens.vocab_size, tokens.max_tokens)
        with pytest.raises(ValueError, match="expected width 16, that of the teacher's"):
            train_encoder(MLPEncoder(config), lessons, LoopOptions(epochs=1), progress=False)


class TestSecondStage:
    def test_reads_the_states_of_its_encoder(self, lessons, encoder, tmp_path):
        own = lessons.read_by(encoder, directory=tmp_path, dtype="float32", progress=False)
        for examples, features in (
            (own.train, own.features),
            (own.validation, own.validation_features),
        ):
            index = np.asarray([2, 50, 0])
            ids, mask = own.tokens.batch_examples(examples.take(index), CODES)
            states, own_mask = features.batch_states(index)
            assert torch.equal(own_mask, mask)
            torch.testing.assert_close(states[mask], encoder(ids, mask)[mask], atol=1e-5, rtol=0)
        assert own.features.logits is lessons.features.logits

    def test_learns_on_them(self, teacher, lessons, encoder):
        own = lessons.read_by(encoder, dtype="float32", progress=False)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        _, result = second_stage(teacher, own, epochs=15)
        _, plain = second_stage(teacher, lessons, epochs=15)
        assert plain.best_score > 0.6
        assert result.best_score > 0.9 * plain.best_score
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("joint", [False, True])
    def test_resumed_equals_uninterrupted(self, teacher, lessons, tmp_path, joint, monkeypatch):
        torch.manual_seed(3)
        start = new_encoder(teacher)
        loss, calls = distill_module.distillation_loss, 0

        def run(**arguments):
            encoder = new_encoder(teacher)
            encoder.load_state_dict(start.state_dict())
            given = lessons if joint else lessons.read_by(encoder, progress=False)
            student, result = second_stage(
                teacher, given, joint=encoder if joint else None, **arguments
            )
            weights = [*student.state_dict().values(), *encoder.state_dict().values()]
            return weights, result, encoder

        def broken(*arguments):
            nonlocal calls
            calls += 1
            return loss(*arguments) * (math.nan if calls == 14 else 1)

        wanted, result, encoder = run()
        moved = not torch.equal(
            encoder.final_layer_norm.weight, torch.ones_like(encoder.final_layer_norm.weight)
        )
        assert moved == joint
        state = tmp_path / "state.pt"
        monkeypatch.setattr(distill_module, "distillation_loss", broken)
        with pytest.raises(TrainingFailed, match=r"student: the loss is nan in epoch 3; the state"):
            run(state_file=state)
        monkeypatch.undo()
        found, again, _ = run(state_file=state)
        assert again == result
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_joint_training_of_few_shapes(self, teacher, lessons, encoder, monkeypatch):
        monkeypatch.setattr(torch, "compile", AOT)
        copy = new_encoder(teacher)
        copy.load_state_dict(encoder.state_dict())
        _, result = second_stage(
            teacher, lessons, epochs=4, joint=copy, execution=Execution(compile=True)
        )
        assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]

    def test_states_of_another_width_are_refused(self, teacher, lessons, encoder):
        tokens = lessons.tokens
        config = MLPEncoderConfig(1, 3, 24, 8, tokens.vocab_size, tokens.max_tokens)
        wide = lessons.read_by(MLPEncoder(config), progress=False)
        with pytest.raises(ValueError, match="student: expected width 24, that of the states"):
            second_stage(teacher, wide)
        with pytest.raises(ValueError, match="student: expected width 24"):
            second_stage(teacher, lessons, joint=MLPEncoder(config))


class TestMixedPrecision:
    def test_no_softmax_of_attention_is_half_precision_on_a_cpu(self, teacher, monkeypatch):
        seen, softmax = [], torch.Tensor.softmax

        def watched(self, *arguments, dtype=None, **more):
            seen.append(dtype or self.dtype)
            return softmax(self, *arguments, dtype=dtype, **more)

        monkeypatch.setattr(torch.Tensor, "softmax", watched)
        student = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32)
        ids = torch.randint(1, 10, (2, 6))
        mask, codes = torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            states = teacher.encode(ids, mask)
            logits = teacher.decoder_logits(states, mask, codes[:, None])
            own = student(states, mask, codes)
        assert logits.dtype == own[0].dtype == torch.bfloat16
        # One each of the encoder, the decoder's own and cross attention, and the student's.
        assert seen == [torch.float32] * 4
