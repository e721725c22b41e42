"""What keeps a training from overfitting: averaged weights, histories with items left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sidmlp.cli import main
from sidmlp.data import Interactions, TokenSpec, TokenTable, leave_last_out
from sidmlp.teacher.train import train_teacher
from sidmlp.training import LoopOptions, load_tensors, train
from sidmlp.training.average import MovingAverage


def decays(steps: int, decay: float) -> list[float]:
    return [min(decay, (1 + n) / (10 + n)) for n in range(1, steps + 1)]


class TestMovingAverage:
    def test_is_the_recursion(self):
        weight, values = nn.Parameter(torch.tensor([3.0, -1.0])), []
        average, wanted = MovingAverage([weight], 0.5), weight.detach().double()
        for step, decay in enumerate(decays(12, 0.5)):
            with torch.no_grad():
                weight.copy_(torch.tensor([float(step), step**2 / 7]))
            average.update()
            wanted = decay * wanted + (1 - decay) * weight.detach().double()
            with average.applied():
                values.append(weight.detach().clone())
            assert torch.equal(weight.detach(), torch.tensor([float(step), step**2 / 7]))
            torch.testing.assert_close(values[-1].double(), wanted, rtol=1e-5, atol=1e-6)

    def test_weights_return_though_validation_fails(self):
        weight = nn.Parameter(torch.ones(2))
        average = MovingAverage([weight], 0.9)
        with torch.no_grad():
            weight.fill_(5)

        def validate():
            with average.applied():
                assert weight.tolist() == [1, 1]
                raise RuntimeError

        with pytest.raises(RuntimeError):
            validate()
        assert weight.tolist() == [5, 5]

    def train(self, state=None, stop=None, batch_size=4, **changes):
        torch.manual_seed(0)
        model, seen = nn.Linear(2, 1, bias=False), []

        def validate():
            seen.append(model.weight.detach().clone())
            if len(seen) == stop:
                raise KeyboardInterrupt
            return float(len(seen))

        def loss_of(longest, index):
            return (model(torch.ones(1, 2)) - index.sum()).square().sum()

        options = LoopOptions(6, batch_size, learning_rate=0.1, **changes)
        train(model, 12, loss_of, validate, options, name="toy", progress=False, state_file=state)
        return model, seen

    def test_is_validated_and_kept_while_the_weights_train_on(self):
        plain, weights = self.train(batch_size=12)  # a step an epoch
        model, averages = self.train(batch_size=12, ema=0.75)
        assert torch.equal(model.weight, averages[-1])
        assert torch.equal(plain.weight, weights[-1])
        # The weights go the way of a training without it: their average is that of ``weights``.
        torch.manual_seed(0)
        wanted = nn.Linear(2, 1, bias=False).weight.detach()
        for weight, decay, average in zip(weights, decays(6, 0.75), averages, strict=True):
            wanted = decay * wanted + (1 - decay) * weight
            torch.testing.assert_close(average, wanted)

    def test_resumed_equals_uninterrupted(self, tmp_path):
        straight, _ = self.train(ema=0.9)
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "state.pt", ema=0.9, stop=3)
        resumed, seen = self.train(tmp_path / "state.pt", ema=0.9)
        assert len(seen) == 4  # two epochs were done
        assert torch.equal(straight.weight, resumed.weight)

    @pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
    def test_a_decay_out_of_range_is_named(self, ema):
        with pytest.raises(ValueError, match=r"ema must be in \[0, 1\), got"):
            LoopOptions(epochs=1, ema=ema)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of people who walk round a circle of 30 items, tokenised."""
    path = tmp_path_factory.mktemp("walks")
    items = (np.arange(24)[:, None] + np.arange(7)).ravel() % 30
    codes = np.stack(np.unravel_index(np.arange(30), (4, 3, 3)), axis=1)
    np.savez(path / "sequences.npz", items=items.astype(np.int32), offsets=np.arange(0, 169, 7))
    np.savez(path / "semantic_ids.npz", walk=codes.astype(np.int16))
    assert main(["data", "--run", str(path / "run"), "--arrays", str(path)]) == 0
    walk = ["--semantic-ids", str(path), "walk", "--max-items", "4"]
    assert main(["tokenize", "--run", str(path / "run"), *walk]) == 0
    return path / "run"


def test_commands_hand_them_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = ["--device", "cpu", "--batch-size", "32", "--validation-users", "20", "--beams", "10"]
    few = ["--run", str(run), *loop]
    size = ["--dim", "16", "--layers", "1", "--heads", "2", "--head-dim", "8", "--ffn", "32"]
    teach = ["train-teacher", *few, *size, "--epochs", "1"]
    assert main([*teach, "--ema", "0.8", "--history-dropout", "0.25"]) == 0
    state = load_tensors(run / "teacher-progress.pt")
    assert state["identity"]["ema"] == 0.8
    assert "history_dropout=0.25" in state["identity"]["fingerprint"]
    assert state["average"]["steps"] == state["steps"] > 0
    capsys.readouterr()
    assert main([*teach, "--ema", "0.8"]) == 2
    assert "start afresh (--restart)" in capsys.readouterr().err
    assert main([*teach, "--ema", "0.7", "--history-dropout", "0.25"]) == 2
    assert "ema=0.8, this call has 0.7" in capsys.readouterr().err
    student = ["--hidden", "16", "--heads", "2", "--epochs", "1"]
    own = ["--encoder", "mlp", "--encoder-layers", "1", "--encoder-epochs", "1"]
    assert main(["distill", *few, *student, *own, "--ema", "0.9"]) == 0
    for name in ("encoder", "student"):
        state = load_tensors(run / f"{name}-progress.pt")
        assert state["identity"]["ema"] == 0.9
        assert state["average"]["steps"] == state["steps"] > 0


@pytest.mark.parametrize("option", ["--ema", "--history-dropout"])
@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "x"])
def test_shares_out_of_range_are_named(option, value, run, capsys):
    with pytest.raises(SystemExit):
        main(["train-teacher", "--run", str(run), option, value])
    assert f"argument {option}: expected a number from 0 to below 1, got" in capsys.readouterr().err


class TestHistoryDropout:
    @pytest.mark.parametrize("share", [1.0, -0.5, float("nan")])
    def test_a_share_out_of_range_is_named(self, share):
        with pytest.raises(ValueError, match=r"history_dropout must be in \[0, 1\), got"):
            train_teacher(None, None, self.CODES, LoopOptions(1), history_dropout=share)

    SPEC = TokenSpec.for_codes((40, 40), max_items=6)
    CODES = np.stack(np.divmod(np.arange(1600), 40), axis=1)[:1000]

    def table(self):
        # Every user has items of its own, in ascending order.
        offsets = np.arange(0, 1001, 10)
        data = Interactions(np.arange(1000), offsets, np.arange(1000, dtype=np.int64))
        return TokenTable(self.SPEC, leave_last_out(data).train, self.CODES)

    def items(self, ids, mask):
        """Of every row the items it reads, and a check of its frame."""
        found = []
        for row, valid in zip(ids, mask, strict=True):
            tokens = row[valid].tolist()
            assert tokens[0] == self.SPEC.user_offset
            assert tokens[-1] == self.SPEC.eos_id
            assert (row[~valid] == self.SPEC.pad_id).all()
            codes = np.array(tokens[1:-1]).reshape(-1, 2) - np.array(self.SPEC.code_offsets)
            found.append((codes @ [40, 1]).tolist())
        return found

    def test_leaves_a_history_in_order_without_some_but_with_the_latest(self):
        table, index = self.table(), torch.arange(700)
        full = self.items(*table.batch(index, 6))
        torch.manual_seed(0)
        thinned = self.items(*table.batch(index, 6, dropout=0.4))
        kept = total = 0
        for all_of, some in zip(full, thinned, strict=True):
            assert set(some) <= set(all_of)
            assert some == sorted(some)
            assert some[-1] == all_of[-1]
            kept, total = kept + len(some) - 1, total + len(all_of) - 1
        assert kept / total == pytest.approx(0.6, abs=0.03)

    def test_of_nothing_changes_nothing(self):
        table, index = self.table(), torch.arange(70)
        plain, tiny = table.batch(index, 6), table.batch(index, 6, dropout=1e-12)
        assert all(torch.equal(*pair) for pair in zip(plain, tiny, strict=True))

    def test_draws_anew(self):
        table, index = self.table(), torch.arange(300)
        first, again = (table.batch(index, 6, dropout=0.5)[1] for _ in range(2))
        assert not torch.equal(first, again)
