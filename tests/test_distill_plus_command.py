"""`sidmlp distill --encoder mlp`, beside a SID-MLP student of the same teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distill import CODES

import sidmlp_kernels
from sidmlp import distill as distill_module
from sidmlp import distill_encoder
from sidmlp.beam import decode_states
from sidmlp.cli import main
from sidmlp.cli.artifacts import load_codes, load_data, load_encoder, load_student
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.data import leave_last_out
from sidmlp.trie import Trie

LOOP = ["--dropout", "0", "--batch-size", "32", "--warmup", "2", "--threads", "1"]
SIZES = ["--dim", "16", "--layers", "1", "--heads", "2", "--head-dim", "8", "--ffn", "16"]
TEACHER = [*SIZES, "--epochs", "2", *LOOP]
STUDENT = ["--hidden", "16", "--heads", "2", "--epochs", "2", *LOOP]
ENCODER = ["--encoder", "mlp", "--encoder-layers", "2", "--encoder-hidden", "24"]
PLUS = [*STUDENT, *ENCODER, "--encoder-epochs", "3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run with a teacher and a SID-MLP student, exported."""
    path = tmp_path_factory.mktemp("plus")
    rng = np.random.default_rng(0)
    lists = [(rng.integers(30) + np.arange(n)) % 30 for n in rng.integers(5, 9, 24)]
    np.savez(
        path / "sequences.npz",
        items=np.concatenate(lists).astype(np.int32),
        offsets=np.cumsum([0, *map(len, lists)]),
    )
    np.savez(path / "semantic_ids.npz", walk=CODES.astype(np.int16))
    steps = {
        "data": ["--arrays", str(path)],
        "tokenize": ["--semantic-ids", str(path), "walk", "--max-items", "4"],
        "train-teacher": TEACHER,
        "distill": STUDENT,
        "export": [],
    }
    for command, arguments in steps.items():
        assert main([command, "--run", str(path / "run"), *arguments]) == 0
    return path / "run"


@pytest.fixture(scope="module")
def plus(base) -> Path:
    """The SID-MLP++ student of the same teacher, exported."""
    where = base / "plus"
    assert main(["distill", "--run", str(base), "--into", str(where), *PLUS]) == 0
    assert main(["export", "--run", str(where)]) == 0
    return where


def test_record(base, plus):
    record = json.loads((plus / "distill.json").read_text())
    assert record["encoder"] == "mlp"
    assert not record["joint"]
    assert record["encoder_training"]["epochs"] == 3
    assert record["encoder_training"]["validation_mse"] > 0
    assert record["fingerprint"].count(" ") == 1
    assert (plus / "teacher.pt").is_symlink()
    assert not (plus / "encoder-features").exists()
    assert load_encoder(RunDirectory(base)) is None


def test_the_kernels_decode_from_ids_as_the_reference(plus):
    run = RunDirectory(plus)
    data, (codes, tokens) = load_data(run), load_codes(run)
    assert json.loads((plus / "student" / "config.json").read_text())["encoder"]["kind"] == ("mlp")
    model = sidmlp_kernels.load(plus / "student", device="cpu")
    examples = leave_last_out(data).test
    histories = [examples.history(e) for e in range(len(examples))]
    found = model.decode(model.batch([data.item_ids[h] for h in histories]), k=10)
    ids, mask = tokens.batch_examples(examples, codes)
    encoder, student = load_encoder(run), load_student(run)
    assert encoder is not None
    trie = Trie.from_codes(codes, codes_per_level=(4, 3, 3))
    with torch.no_grad():
        wanted = decode_states(student, encoder(ids, mask), mask, trie, k=10, num_beams=50)
    assert torch.equal(found.items, torch.from_numpy(data.item_ids)[wanted.items])
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)


def test_evaluate_prints_all_three(base, plus, capsys):
    asked = ["--methods", "teacher,kernel", "--plus", str(plus), "--beams", "30"]
    assert main(["evaluate", "--run", str(base), *asked]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("teacher", "kernel", "student++"))
    own = ["--methods", "reference,kernel", "--beams", "30"]
    assert main(["evaluate", "--run", str(plus), *own]) == 0
    found = json.loads((base / "evaluate.json").read_text())["quality"]["student++"]
    alone = json.loads((plus / "evaluate.json").read_text())["quality"]
    assert found == alone["kernel"]
    assert alone["kernel"] == pytest.approx(alone["reference"])


def test_the_report_draws_the_encoder(base, plus, tmp_path):
    for run in (base, plus):
        asked = ["--run", str(run), "--methods", "kernel", "--beams", "30"]
        assert main(["evaluate", *asked]) == 0
    out = tmp_path / "report"
    assert main(["report", "--run", str(base), "--plus", str(plus), "--out", str(out)]) == 0
    record = json.loads((plus / "distill.json").read_text())["encoder_training"]
    facts = json.loads((out / "report.json").read_text())["training"]["student++-encoder"]
    assert facts["validation_mse"] == record["validation_mse"]
    assert (facts["best_epoch"], facts["epochs"]) == (record["best_epoch"], 3)
    page = (out / "report.md").read_text()
    assert f"Best validation MSE {record['validation_mse']:.5f} in epoch" in page
    assert (out / "student++-encoder.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "--run", str(plus), "--out", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own" / "encoder.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_an_older_further_student_is_refused(base, tmp_path, capsys):
    where = tmp_path / "retrained"
    distill = ["distill", "--run", str(base), "--into", str(where), *PLUS]
    assert main(distill) == 0
    assert main(["export", "--run", str(where)]) == 0
    asked = ["--methods", "popularity,teacher,kernel", "--plus", str(where), "--beams", "30"]
    assert main(["evaluate", "--run", str(base), *asked]) == 0
    report = ["report", "--run", str(base), "--out", str(tmp_path / "report")]
    assert main(report) == 0
    assert main([*distill, "--alpha", "0.9", "--restart"]) == 0
    capsys.readouterr()
    assert main(report) == 2
    assert "was measured before `sidmlp distill` ran last" in capsys.readouterr().err


def test_students_that_drop_everything_are_refused(base, tmp_path, capsys):
    where = ["--run", str(base), "--into", str(tmp_path / "nothing")]
    assert main(["distill", *where, "--dropout", "1"]) == 2
    assert "dropout must be in [0, 1), got 1.0" in capsys.readouterr().err


def test_joint_from_another_student(base, tmp_path, capsys):
    where = ["--run", str(base), "--into", str(tmp_path / "joint")]
    more = ["--joint", "--init-from", str(base)]
    assert main(["distill", *where, *PLUS, *more]) == 0
    assert "encoder: validation MSE 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "joint" / "distill.json").read_text())["joint"]
    assert main(["export", "--run", str(tmp_path / "joint")]) == 0


def test_a_second_stage_goes_on(base, tmp_path, monkeypatch):
    where = ["--run", str(base), "--into", str(tmp_path / "own")]
    loss, calls = distill_module.distillation_loss, 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return loss(*arguments)

    run = RunDirectory(tmp_path / "own")
    monkeypatch.setattr(distill_module, "distillation_loss", stop)
    assert main(["distill", *where, *PLUS]) == 130
    assert run.encoder_features.is_dir()
    assert not run.student.exists()
    # The encoder's training is finished and its states are there: neither is asked again.
    monkeypatch.setattr(distill_module, "distillation_loss", loss)
    monkeypatch.setattr(distill_encoder, "squared_error", None)
    assert main(["distill", *where, *PLUS]) == 0
    first = json.loads((run.path / "distill.json").read_text())
    monkeypatch.undo()
    assert main(["distill", *where, *PLUS, "--restart"]) == 0
    assert json.loads((run.path / "distill.json").read_text()) == first


def test_a_second_stage_of_another_encoder_is_forgotten(base, tmp_path, monkeypatch):
    where = ["--run", str(base), "--into", str(tmp_path / "own")]
    run, error = RunDirectory(tmp_path / "own"), distill_encoder.squared_error
    asked = []

    def stop(*arguments):
        asked.append(1)
        if run.encoder_progress.exists():
            raise KeyboardInterrupt
        return error(*arguments)

    monkeypatch.setattr(distill_encoder, "squared_error", stop)
    assert main(["distill", *where, *PLUS]) == 130
    monkeypatch.undo()
    assert len(asked) > 1
    run.student_progress.write_bytes(b"of the encoder before")
    assert main(["distill", *where, *PLUS]) == 0


def fails(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_mistakes(base, plus, tmp_path, capsys):
    where = ["distill", "--run", base]
    assert "say --encoder mlp" in fails(capsys, *where, "--joint")
    assert "--into" in fails(capsys, *where, *PLUS)  # a SID-MLP student lives there
    with pytest.raises(SystemExit):
        main(["distill", "--run", str(base), "--encoder", "gru"])
    text = fails(capsys, *where, "--into", tmp_path / "x", "--init-from", base, *PLUS[2:])
    assert "expected a student of" in text
    text = fails(capsys, *where, "--into", tmp_path / "x", "--init-from", tmp_path / "y")
    assert "has no result of `sidmlp data` yet" in text
    evaluate = ["evaluate", "--run", base, "--methods", "kernel", "--plus"]
    assert "has no result" in fails(capsys, *evaluate, tmp_path / "y")
    shutil.copytree(base, tmp_path / "z", symlinks=True)
    other = RunDirectory(tmp_path / "z")
    record = json.loads((other.path / "data.json").read_text())
    (other.path / "data.json").write_text(json.dumps({**record, "fingerprint": "another"}))
    assert "other data" in fails(capsys, *evaluate, other.path)
    broken = tmp_path / "broken"
    shutil.copytree(plus, broken)
    (broken / "encoder.pt").unlink()
    assert "encoder.pt is missing or damaged" in fails(capsys, "export", "--run", broken)
    record = json.loads((broken / "distill.json").read_text())
    (broken / "distill.json").write_text(json.dumps({**record, "encoder": "gru"}))
    assert "expected the encoder mlp or none, got 'gru'" in fails(capsys, "export", "--run", broken)
