"""The teacher: model, cached decoder, beam search, training."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from torch import nn

from sidmlp.data import Interactions, TokenSpec, leave_last_out
from sidmlp.teacher import PrefixTable, Teacher, TeacherConfig, beam_search
from sidmlp.teacher.decoder import DecoderState
from sidmlp.teacher.train import train_teacher
from sidmlp.training import LoopOptions, TrainingFailed, load_tensors, save_tensors, train

SIZES = (4, 3, 3)
TINY = TeacherConfig(dim=16, num_layers=2, num_heads=2, head_dim=8, ffn_dim=32, dropout=0.1)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    model = Teacher(TINY, TokenSpec.for_codes(SIZES, max_items=4))
    with torch.no_grad():
        model.t5.shared.weight.mul_(3)  # spreads the scores
    return model.eval()


@pytest.fixture
def codes() -> np.ndarray:
    """20 items; items 3 and 11 share their codes."""
    rng = np.random.default_rng(1)
    every = np.stack(np.unravel_index(rng.permutation(36), SIZES), axis=1)[:20]
    every[11] = every[3]
    return every


def batch_of(teacher: Teacher, codes: np.ndarray, count: int = 5):
    rng = np.random.default_rng(2)
    histories = [rng.integers(0, len(codes), size=size) for size in range(count)]
    return teacher.tokens.batch(histories, codes)


@torch.no_grad()
def full_logits(teacher: Teacher, states, mask, codes) -> torch.Tensor:
    """What transformers' own forward says under teacher forcing with codes [B, L]: [B, L, V]."""
    ids = torch.nn.functional.pad((codes + teacher.offsets)[:, :-1], (1, 0))
    return teacher.t5(
        encoder_outputs=(states,), attention_mask=mask.long(), decoder_input_ids=ids
    ).logits


@torch.no_grad()
def brute_force(teacher: Teacher, ids, mask, codes: np.ndarray) -> torch.Tensor:
    """Score of every item for every request by full forward passes, [B, N]."""
    wanted = torch.from_numpy(codes)
    scores = []
    for row in range(len(ids)):
        n = len(wanted)
        states = teacher.encode(ids[row : row + 1], mask[row : row + 1]).expand(n, -1, -1)
        logits = full_logits(teacher, states, mask[row : row + 1].expand(n, -1), wanted)
        tokens = (wanted + teacher.offsets)[..., None]
        scores.append(logits.log_softmax(-1).gather(2, tokens).sum((1, 2)))
    return torch.stack(scores)


class TestDecoder:
    @pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
    def test_many_targets_at_once_equal_transformers(self, codes, feed_forward):
        torch.manual_seed(0)
        config = dataclasses.replace(TINY, feed_forward=feed_forward)
        teacher = Teacher(config, TokenSpec.for_codes(SIZES, max_items=4)).eval()
        ids, mask = batch_of(teacher, codes)
        rng = np.random.default_rng(4)
        targets = torch.from_numpy(codes[rng.integers(len(codes), size=(len(ids), 3))])
        with torch.no_grad():
            states = teacher.encode(ids, mask)
            got = teacher.decoder_logits(states, mask, targets)
        for k in range(3):
            want = full_logits(teacher, states, mask, targets[:, k])
            assert torch.allclose(got[:, k], want, atol=1e-4), k

    def test_cached_steps_equal_transformers(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        target = torch.from_numpy(codes[: len(ids)])
        start = torch.zeros(len(ids), 1, dtype=torch.int64)
        tokens = torch.cat([start, (target + teacher.offsets)[:, :2]], dim=1)
        with torch.no_grad():
            states = teacher.encode(ids, mask)
            want = full_logits(teacher, states, mask, target)
            state = DecoderState(teacher, states, mask)
            for level in range(3):
                step = state.feed(tokens[:, None, level : level + 1])[:, 0, 0]
                assert torch.allclose(step, want[:, level], atol=1e-4), level

    def test_reordered_beams_keep_their_own_past(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        with torch.no_grad():
            states = teacher.encode(ids, mask)
            state = DecoderState(teacher, states, mask)
            state.feed(torch.zeros(len(ids), 1, 1, dtype=torch.int64))
            state.reorder(torch.zeros(len(ids), 3, dtype=torch.int64))
            first = torch.tensor([0, 1, 2]).expand(len(ids), 3)
            state.feed((first + teacher.offsets[0])[..., None])
            parents = torch.tensor([2, 0, 2]).expand(len(ids), 3)
            state.reorder(parents)
            second = torch.tensor([1, 0, 2]).expand(len(ids), 3)
            got = state.feed((second + teacher.offsets[1])[..., None])[:, :, 0]
        for beam in range(3):
            path = [first.gather(1, parents)[:, beam], second[:, beam], second[:, beam]]
            want = full_logits(teacher, states, mask, torch.stack(path, dim=1))[:, 2]
            assert torch.allclose(got[:, beam], want, atol=1e-4), beam

    def test_gradients_equal_transformers(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        target = torch.from_numpy(codes[: len(ids)])
        teacher(ids, mask, target[:, None], torch.ones(len(ids), 1, dtype=torch.bool)).backward()
        got = {name: p.grad.clone() for name, p in teacher.named_parameters()}
        teacher.zero_grad()
        labels = target + teacher.offsets
        teacher.t5(
            input_ids=ids,
            attention_mask=mask.long(),
            decoder_input_ids=nn.functional.pad(labels[:, :-1], (1, 0)),
            labels=labels,
        ).loss.backward()
        for name, parameter in teacher.named_parameters():
            assert torch.allclose(got[name], parameter.grad, atol=1e-5, rtol=1e-3), name

    def test_unreal_targets_do_not_count(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        targets = torch.from_numpy(codes[:10]).view(5, 2, 3)
        real = torch.tensor([[True, False]] * 5)
        with torch.no_grad():
            both = teacher(ids, mask, targets, real)
            alone = teacher(ids, mask, targets[:, :1], real[:, :1])
        assert float(both) == pytest.approx(float(alone), rel=1e-5)

    def test_masked_positions_do_not_matter(self, teacher, codes):
        ids, mask = batch_of(teacher, codes, count=3)
        table = PrefixTable(codes, SIZES)
        alone = beam_search(teacher, ids[:1, :2], mask[:1, :2], table, k=5, num_beams=20)
        together = beam_search(teacher, ids, mask, table, k=5, num_beams=20)
        assert torch.equal(alone.items[0], together.items[0])
        assert torch.allclose(alone.scores[0], together.scores[0], atol=1e-4)


class TestBeamSearch:
    def test_wide_constrained_search_equals_scoring_every_item(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        want = brute_force(teacher, ids, mask, codes)
        got = beam_search(teacher, ids, mask, PrefixTable(codes, SIZES), k=20, num_beams=36)
        best = want.sort(dim=1, descending=True, stable=True)
        assert torch.allclose(got.scores, best.values, atol=1e-4)
        for row in range(len(ids)):
            assert sorted(got.items[row].tolist()) == list(range(20))
            assert torch.allclose(want[row][got.items[row]], got.scores[row], atol=1e-4)

    def test_narrow_search_is_greedy_level_by_level(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        got = beam_search(teacher, ids, mask, PrefixTable(codes, SIZES), k=1, num_beams=1)
        with torch.no_grad():
            states = teacher.encode(ids, mask)
            for row in range(len(ids)):
                prefix: list[int] = []
                for level in range(3):
                    known = torch.tensor([[*prefix, 0, 0, 0][:3]])
                    logits = full_logits(teacher, states[row][None], mask[row][None], known)
                    level_logits = teacher.level_logits(logits)[level][0]
                    here = codes[(codes[:, :level] == prefix).all(1), level]
                    prefix.append(max(sorted(set(here)), key=lambda c: float(level_logits[c])))
                assert codes[got.items[row, 0]].tolist() == prefix

    def test_items_of_one_leaf_come_together(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        got = beam_search(teacher, ids, mask, PrefixTable(codes, SIZES), k=20, num_beams=20)
        for row in got.items.tolist():
            assert row.index(11) == row.index(3) + 1

    def test_excluded_items_make_room(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        table = PrefixTable(codes, SIZES)
        free = beam_search(teacher, ids, mask, table, k=20, num_beams=36)
        exclude = [row[:4].numpy() for row in free.items]
        got = beam_search(teacher, ids, mask, table, k=16, num_beams=36, exclude=exclude)
        assert torch.equal(got.items, free.items[:, 4:])
        assert torch.allclose(got.scores, free.scores[:, 4:])

    def test_exclusion_acts_before_the_last_cut(self, teacher, codes):
        codes = np.unique(codes, axis=0)
        ids, mask = batch_of(teacher, codes)
        table = PrefixTable(codes, SIZES)
        first = beam_search(teacher, ids, mask, table, k=1, num_beams=4)
        got = beam_search(
            teacher, ids, mask, table, k=4, num_beams=4, exclude=list(first.items.numpy())
        )
        assert (got.items >= 0).all()
        assert not (got.items == first.items).any()

    def test_fewer_items_than_asked_for(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        got = beam_search(teacher, ids, mask, PrefixTable(codes[:2], SIZES), k=5, num_beams=9)
        assert (got.items[:, 2:] == -1).all()
        assert (got.scores[:, 2:] == -torch.inf).all()
        assert (got.items[:, :2] >= 0).all()

    def test_unconstrained_search_finds_the_same_when_wide_and_counts_the_rest(
        self, teacher, codes
    ):
        ids, mask = batch_of(teacher, codes, count=2)
        table = PrefixTable(codes, SIZES)
        vocabulary = teacher.tokens.vocab_size
        free = beam_search(
            teacher, ids, mask, table, k=20, num_beams=vocabulary**3, constrained=False
        )
        bound = beam_search(teacher, ids, mask, table, k=20, num_beams=36)
        assert torch.equal(free.items, bound.items)
        assert torch.allclose(free.scores, bound.scores, atol=1e-4)
        assert free.invalid.tolist() == [vocabulary**3 - 19] * 2
        assert bound.invalid.tolist() == [0, 0]
        narrow = beam_search(teacher, ids, mask, table, k=4, num_beams=4, constrained=False)
        valid = (narrow.items >= 0).sum(1)
        assert (narrow.invalid >= 4 - valid).all()

    def test_bad_k(self, teacher, codes):
        ids, mask = batch_of(teacher, codes)
        with pytest.raises(ValueError, match="k must be between 1 and num_beams"):
            beam_search(teacher, ids, mask, PrefixTable(codes, SIZES), k=5, num_beams=4)


def cyclic_data(num_items: int = 20) -> Interactions:
    """Everybody walks round the same circle of items."""
    lists = [(start + np.arange(8)) % num_items for start in range(num_items)] * 2
    return Interactions(
        np.concatenate(lists), np.arange(len(lists) + 1) * 8, np.arange(num_items, dtype=np.int64)
    )


class TestTraining:
    def train(self, codes, tmp_path=None, epochs=3, log=None, **changes):
        split = leave_last_out(cyclic_data())
        torch.manual_seed(3)
        model = Teacher(TINY, TokenSpec.for_codes(SIZES, max_items=4))
        options = {"epochs": epochs, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 5}
        result = train_teacher(
            model,
            split,
            codes,
            LoopOptions(**{**options, **changes}),
            state_file=None if tmp_path is None else tmp_path / "state.pt",
            progress=False,
            log=log,
        )
        return model, result

    def test_learns_a_rule(self, codes):
        unique = np.stack(np.unravel_index(np.arange(20), SIZES), axis=1)
        _, result = self.train(unique, epochs=25, learning_rate=1e-2)
        # A blind guess at 10 of 20 items scores about 0.23.
        assert result.best_score > 0.8

    def test_resumed_equals_uninterrupted(self, codes, tmp_path, monkeypatch):
        straight, result = self.train(codes)
        calls = 0
        encode = Teacher.encode

        def interrupted(self, ids, mask):
            nonlocal calls
            calls += 1
            if calls == 15:
                raise KeyboardInterrupt
            return encode(self, ids, mask)

        monkeypatch.setattr(Teacher, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.train(codes, tmp_path)
        monkeypatch.undo()
        done = load_tensors(tmp_path / "state.pt")["result"]["epochs"]
        assert 1 <= done < 3
        resumed, again = self.train(codes, tmp_path)
        assert again == result
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_a_state_of_before_an_option_resumes(self, codes, tmp_path):
        _, result = self.train(codes, tmp_path, epochs=1)
        state = load_tensors(tmp_path / "state.pt")
        del state["identity"]["ema"], state["average"]
        save_tensors(tmp_path / "state.pt", state)
        assert self.train(codes, tmp_path, epochs=1)[1] == result
        with pytest.raises(ValueError, match=r"ema=0\.0, this call has 0\.9"):
            self.train(codes, tmp_path, epochs=1, ema=0.9)

    def test_other_settings_do_not_resume(self, codes, tmp_path):
        self.train(codes, tmp_path, epochs=1)
        with pytest.raises(ValueError, match="learning_rate"):
            self.train(codes, tmp_path, epochs=1, learning_rate=1.0)

    def test_a_damaged_state_file_is_named(self, codes, tmp_path):
        self.train(codes, tmp_path, epochs=1)
        path = tmp_path / "state.pt"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            self.train(codes, tmp_path, epochs=1)

    def test_state_files_run_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (print, ("pwned",))

        torch.save({"x": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="damaged"):
            load_tensors(tmp_path / "evil.pt")

    def test_a_loss_that_is_nan_keeps_the_last_good_state(self, tmp_path):
        model = nn.Linear(1, 1)
        state = tmp_path / "state.pt"
        calls = 0

        def loss_of(longest, index):
            nonlocal calls
            calls += 1
            return model.weight.sum() * (torch.nan if calls == 3 else 1)

        with pytest.raises(TrainingFailed, match="loss is nan in epoch 3") as error:
            train(
                model,
                4,
                loss_of,
                lambda: 0.5,
                LoopOptions(epochs=5, batch_size=4),
                name="toy",
                state_file=state,
                progress=False,
            )
        assert "lower learning rate" in str(error.value)
        kept = load_tensors(state)
        assert kept["result"]["epochs"] == 2
        assert torch.isfinite(kept["model"]["weight"]).all()

    def test_every_epoch_is_logged(self, codes):
        seen: list[dict[str, float]] = []
        _, result = self.train(codes, epochs=3, validate_every=2, log=seen.append)
        assert [facts["epoch"] for facts in seen] == [1, 2, 3]
        assert [facts["loss"] for facts in seen] == [r["loss"] for r in result.history]
        assert ["score" in facts for facts in seen] == [False, True, True]
        assert seen[-1]["learning_rate"] < seen[0]["learning_rate"] <= 5e-3
        assert all(facts["gradient_norm"] > 0 and facts["seconds"] > 0 for facts in seen)

    def test_early_stopping_returns_the_best(self):
        model = nn.Linear(1, 1)
        scores = iter([0.1, 0.3, 0.2, 0.2, 0.9])
        weights = []

        def validate():
            weights.append(model.weight.item())
            return next(scores)

        result = train(
            model,
            4,
            lambda longest, index: model.weight.sum(),
            validate,
            LoopOptions(epochs=9, patience=2),
            name="toy",
            progress=False,
        )
        assert (result.best_score, result.best_epoch, result.epochs) == (0.3, 2, 4)
        assert model.weight.item() == weights[1]

    def test_saved_tensors_return(self, tmp_path):
        value = {"a": torch.arange(3), "b": [1, 2.5, "x"], "c": {"d": None}}
        save_tensors(tmp_path / "x.pt", value)
        again = load_tensors(tmp_path / "x.pt")
        assert torch.equal(again.pop("a"), value.pop("a"))
        assert again == value

    def test_another_process_saves_the_same_bytes(self, tmp_path, monkeypatch):
        # Records name models by the hash of their files: a finished command that is run again must
        # not outdate what was made from its result.
        saved = []
        for process in (11, 222):
            monkeypatch.setattr(os, "getpid", lambda process=process: process)
            save_tensors(tmp_path / "x.pt", {"a": torch.arange(3), "b": torch.ones(2)})
            saved.append((tmp_path / "x.pt").read_bytes())
        assert saved[0] == saved[1]

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"epochs": 0}, "epochs"),
            ({"epochs": 1, "learning_rate": 0.0}, "learning_rate"),
            ({"epochs": 1, "examples_per_epoch": 0}, "examples_per_epoch"),
        ],
    )
    def test_bad_options(self, changes, word):
        with pytest.raises(ValueError, match=word):
            LoopOptions(**changes)
