"""Training in bf16, compiled, with few shapes: it learns what fp32 training learns."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sidmlp.cli.kernel_validation import kernel_decode
from sidmlp.data import Interactions, Split, TokenSpec, TokenTable, leave_last_out
from sidmlp.distill import (
    DistillOptions,
    distill,
    distillation_loss,
    make_student,
    reference_decode,
    train_student,
)
from sidmlp.distill import recommend as recommend_by_student
from sidmlp.lessons import take_lessons
from sidmlp.metrics import ndcg_at_k
from sidmlp.teacher import Teacher, TeacherConfig
from sidmlp.teacher.train import histories, train_teacher
from sidmlp.training import Execution, LoopOptions, TrainingFailed, load_tensors, train
from sidmlp.training.batches import batches_of, length_edges
from sidmlp.training.features import FeatureTable, compute_features

SIZES = (4, 3, 3)
CODES = np.stack(np.unravel_index(np.arange(30), SIZES), axis=1)
CPU = torch.device("cpu")
BF16, COMPILED = Execution(precision="bf16"), Execution(compile=True)
OPTIONS = {"epochs": 3, "batch_size": 64, "learning_rate": 1e-2, "warmup_steps": 5}


@pytest.fixture(scope="module")
def split() -> Split:
    """Everybody walks round the same circle of items, over lists of different lengths."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 12, size=80)
    lists = [(rng.integers(30) + np.cumsum(rng.integers(1, 3, size=n))) % 30 for n in sizes]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return leave_last_out(
        Interactions(np.concatenate(lists), offsets, np.arange(30, dtype=np.int64))
    )


def new_teacher(dropout: float = 0.0) -> Teacher:
    torch.manual_seed(0)
    config = TeacherConfig(
        dim=16, num_layers=2, num_heads=2, head_dim=8, ffn_dim=32, dropout=dropout
    )
    return Teacher(config, TokenSpec.for_codes(SIZES, max_items=4))


@pytest.fixture(scope="module")
def teacher(split) -> Teacher:
    model = new_teacher()
    options = LoopOptions(**{**OPTIONS, "epochs": 12})
    train_teacher(model, split, CODES, options, progress=False)
    return model


def distilled(teacher, split, execution, **arguments):
    student = make_student(teacher, num_heads=2, ffn_dim=32, hidden_dim=32, dropout=0.0)
    arguments = {"loop": LoopOptions(**OPTIONS), "progress": False, **arguments}
    result = distill(
        student, teacher, split, CODES, DistillOptions(), execution=execution, **arguments
    )
    return student, result


class TestBatches:
    lengths = np.random.default_rng(3).integers(1, 21, size=500)

    def test_every_example_once_and_none_longer_than_said(self):
        order = np.random.default_rng(4).permutation(500)[:333]
        found = batches_of(order, 32, self.lengths, COMPILED, np.random.default_rng(5))
        index = np.concatenate([batch.index for batch in found])
        assert {batch.index.size for batch in found} == {32}
        assert sorted(index[index >= 0]) == sorted(order)
        assert sum(batch.count < 32 for batch in found) == 1
        assert {batch.longest for batch in found} <= {3, 5, 10, 20}
        for batch in found:
            real = batch.index[batch.index >= 0]
            assert batch.count == real.size
            assert self.lengths[real].max() <= batch.longest

    @pytest.mark.parametrize(("longest", "edges"), [(20, [3, 5, 10, 20]), (1, [1]), (3, [1, 2, 3])])
    def test_edges(self, longest, edges):
        assert length_edges(np.arange(longest) + 1) == edges


class TestTables:
    def test_tokens_are_those_of_the_specification(self, split):
        spec = TokenSpec.for_codes(SIZES, max_items=4)
        table = TokenTable(spec, split.train, CODES)
        index = np.random.default_rng(1).permutation(len(split.train))[:50]
        longest = int(table.lengths[index].max())
        ids, mask = table.batch(torch.from_numpy(index), longest)
        want_ids, want_mask = spec.batch_examples(split.train.take(index), CODES)
        assert torch.equal(mask, want_mask)
        assert torch.equal(ids, want_ids)
        wide, wide_mask = table.batch(torch.from_numpy(index), longest, multiple=8)
        assert wide.shape[1] == 16
        assert torch.equal(wide[:, : ids.shape[1]], ids)
        assert not wide_mask[:, ids.shape[1] :].any()
        assert (wide[:, ids.shape[1] :] == spec.pad_id).all()

    def test_features_on_a_device_are_those_in_memory(self, teacher, split):
        features = compute_features(teacher, split.train, CODES, progress=False)
        index = np.asarray([5, 0, -1, 77])
        longest = int(features.lengths.max())
        got = FeatureTable(features, CPU).batch(torch.from_numpy(index), longest)
        for own, want in zip(got, features.batch(index, longest), strict=True):
            assert own.dtype == want.dtype
            assert torch.equal(own[[0, 1, 3]], want[[0, 1, 3]])
        assert not got[1][2].any()
        assert not got[0][2].any()

    def test_a_loss_counts_real_rows_only(self):
        generator = torch.Generator().manual_seed(0)
        own, wanted = ([torch.randn(6, c, generator=generator) for c in SIZES] for _ in range(2))
        codes = torch.from_numpy(CODES[:6])
        real = torch.tensor([True, True, False, True, False, False])
        got = distillation_loss(own, wanted, codes, DistillOptions(), real)
        cut = [[rows[real] for rows in levels] for levels in (own, wanted)]
        want = distillation_loss(*cut, codes[real], DistillOptions())
        assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.fixture
def _without_code_generation(monkeypatch):
    """Compilation as far as the graphs of forward and backward: C++ would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("_without_code_generation")
class TestPrecision:
    @pytest.mark.parametrize("execution", [BF16, COMPILED], ids=["bf16", "compiled"])
    def test_teacher_learns_as_in_fp32(self, split, execution):
        model, plain = new_teacher(), new_teacher()
        options = LoopOptions(**OPTIONS)
        arguments = (split, CODES, options)
        found = train_teacher(model, *arguments, execution=execution, progress=False).history
        want = train_teacher(plain, *arguments, progress=False).history
        assert found[-1]["loss"] < 0.9 * found[0]["loss"]
        assert found[-1]["loss"] == pytest.approx(want[-1]["loss"], rel=0.1)

    def test_bf16_keeps_fp32_weights_and_moments(self, split, tmp_path):
        seen = set()
        model = new_teacher()
        model.t5.encoder.block[0].layer[0].SelfAttention.o.register_forward_hook(
            lambda module, inputs, output: seen.add(output.dtype)
        )
        state = tmp_path / "state.pt"
        train_teacher(
            model,
            split,
            CODES,
            LoopOptions(**{**OPTIONS, "epochs": 1}),
            execution=BF16,
            state_file=state,
            progress=False,
        )
        assert seen == {torch.bfloat16}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        saved = load_tensors(state)["optimizer"]["state"]
        moments = {value.dtype for entry in saved.values() for value in entry.values()}
        assert moments == {torch.float32}

    @pytest.mark.parametrize("execution", [BF16, COMPILED], ids=["bf16", "compiled"])
    def test_student_learns_as_in_fp32(self, teacher, split, execution):
        student, result = distilled(teacher, split, execution)
        _, want = distilled(teacher, split, Execution())
        losses = [record["loss"] for record in result.history]
        assert losses[-1] < 0.9 * losses[0]
        assert losses[-1] == pytest.approx(want.history[-1]["loss"], rel=0.1)
        assert {p.dtype for p in student.parameters()} == {torch.float32}

    def test_another_precision_does_not_resume(self, teacher, split, tmp_path):
        state = tmp_path / "state.pt"
        distilled(teacher, split, Execution(), state_file=state)
        with pytest.raises(ValueError, match="precision='fp32'"):
            distilled(teacher, split, BF16, state_file=state)

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [({"precision": "fp8"}, "precision"), ({"device": torch.device("meta")}, "device")],
    )
    def test_what_does_not_exist_is_refused(self, arguments, word):
        with pytest.raises(ValueError, match=word):
            Execution(**arguments)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_missing_gpu_is_named(self):
        with pytest.raises(ValueError, match="--device cpu"):
            Execution.choose("cuda")
        assert Execution.choose() == Execution()


class TestValidation:
    def test_kernels_measure_what_the_reference_measures(self, teacher, split):
        student, _ = distilled(teacher, split, Execution())
        features = compute_features(teacher, split.test, CODES, progress=False)
        targets, seen = torch.from_numpy(split.test.target_items()), histories(split.test)
        scores = []
        for make in (reference_decode(CODES), kernel_decode(CODES)):
            items = recommend_by_student(make(student), features, seen, 10, 10)
            assert not any(np.isin(row, had).any() for row, had in zip(items, seen, strict=True))
            scores.append(ndcg_at_k(items, targets, 10).mean)
        assert scores[0] > 0.3
        assert scores[1] == pytest.approx(scores[0], abs=5e-5)

    def test_early_stopping_by_the_kernels_is_that_by_the_reference(self, teacher, split):
        results = [
            distilled(teacher, split, Execution(), decode=make)[1]
            for make in (reference_decode(CODES), kernel_decode(CODES))
        ]
        for own, want in zip(results[1].history, results[0].history, strict=True):
            assert own["loss"] == want["loss"]
            assert own["score"] == pytest.approx(want["score"], abs=5e-5)


class TestEncoder:
    @pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
    def test_states_are_those_of_transformers(self, split, feed_forward):
        torch.manual_seed(1)
        config = TeacherConfig(16, 2, 2, 8, 32, feed_forward=feed_forward)
        model = Teacher(config, TokenSpec.for_codes(SIZES, max_items=4)).eval()
        ids, mask = model.tokens.batch_examples(split.train.take(np.arange(9)), CODES)
        with torch.no_grad():
            got = model.encode(ids, mask)
            want = model.t5.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert torch.allclose(got[mask], want[mask], atol=1e-5)

    def test_dropout_acts_in_training_only(self, split):
        model = new_teacher(dropout=0.5)
        ids, mask = model.tokens.batch_examples(split.train.take(np.arange(9)), CODES)
        with torch.no_grad():
            assert not torch.equal(model.train().encode(ids, mask), model.encode(ids, mask))
            assert torch.equal(model.eval().encode(ids, mask), model.encode(ids, mask))


class TestFailures:
    def test_nan_in_the_middle_of_an_epoch_ends_it(self, tmp_path):
        model, calls = nn.Linear(1, 1), 0

        def loss_of(longest, index):
            nonlocal calls
            calls += 1
            return model.weight.sum() * (math.nan if calls == 130 else 1)

        with pytest.raises(TrainingFailed, match="loss is nan in epoch 2") as error:
            train(
                model,
                300,
                loss_of,
                lambda: 0.5,
                LoopOptions(epochs=5, batch_size=3),
                name="toy",
                state_file=tmp_path / "state.pt",
                progress=False,
            )
        # 100 steps are an epoch; step 130 is found out at the end of the check at step 64.
        assert calls == 164
        assert "after epoch 1 is kept" in str(error.value)

    def test_a_gradient_that_is_nan_in_the_last_step_spoils_no_state(self, tmp_path):
        model, calls = nn.Linear(1, 1), 0

        def loss_of(longest, index):
            nonlocal calls
            calls += 1
            # At 0 a root is finite and its slope is not.
            at = model.weight * 0 if calls == 6 else model.weight.abs() + 1
            return at.sum().sqrt()

        with pytest.raises(TrainingFailed, match="gradient norm is nan in epoch 2"):
            train(
                model,
                9,
                loss_of,
                lambda: 0.5,
                LoopOptions(epochs=5, batch_size=3),
                name="toy",
                state_file=tmp_path / "state.pt",
                progress=False,
            )
        kept = load_tensors(tmp_path / "state.pt")
        assert kept["result"]["epochs"] == 1
        assert torch.isfinite(kept["model"]["weight"]).all()


def test_more_models_are_compiled_than_dynamo_keeps(teacher, split, monkeypatch):
    """As a sweep does, in one process; without the minutes of a compiler."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, backend="eager", **how))
    loop = LoopOptions(1, batch_size=64, examples_per_epoch=64)
    lessons = take_lessons(teacher, split, CODES, progress=False)
    for hidden in range(8, 8 + torch._dynamo.config.recompile_limit + 2):
        student = make_student(teacher, num_heads=2, ffn_dim=16, hidden_dim=hidden)
        result = train_student(
            student, lessons, DistillOptions(), loop, execution=COMPILED, progress=False
        )
        assert result.epochs == 1
