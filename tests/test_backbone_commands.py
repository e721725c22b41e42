"""The command line with a decoder-only teacher: every step, and what its checkpoint cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sidmlp
import sidmlp_kernels
from sidmlp.cli import main
from sidmlp.teacher import CausalTeacher, read_teacher

SIZES = ["--dim", "16", "--layers", "1", "--heads", "2", "--head-dim", "8", "--ffn", "16"]
TEACHER = ["--backbone", "qwen3", "--kv-heads", "1", *SIZES, "--epochs", "2", "--batch-size", "32"]
STUDENT = ["--hidden", "16", "--heads", "2", "--epochs", "2", "--batch-size", "32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of people who walk round a circle of 30 films, up to the export."""
    directory = tmp_path_factory.mktemp("run")
    lines = ["user,item,timestamp,title"]
    for user in range(24):
        for step in range(7):
            item = (user + step) % 30
            lines.append(f"u{user},{item * 10},{step},Film {item:02}")
    (directory / "events.csv").write_text("\n".join(lines) + "\n")
    where = ["--run", str(directory)]
    assert main(["data", *where, "--table", str(directory / "events.csv")]) == 0
    assert main(["tokenize", *where, "--codes", "4,4", "--dim", "4", "--max-items", "5"]) == 0
    assert main(["train-teacher", *where, *TEACHER]) == 0
    assert main(["distill", *where, *STUDENT]) == 0
    return directory


def test_export_says_how_to_load_it(run, capsys):
    assert main(["export", "--run", str(run)]) == 0
    text = capsys.readouterr().out
    assert "without an encoder" in text
    assert json.loads((run / "student" / "config.json").read_text())["encoder"] is None
    # What it prints is a program.
    teacher = eval(text[text.index("sidmlp.teacher.read_teacher") :], {"sidmlp": sidmlp})
    assert isinstance(teacher, CausalTeacher)
    call = text[text.index("sidmlp_kernels.load") : text.index(" and teacher = ")]
    model = eval(call, {"sidmlp_kernels": sidmlp_kernels, "teacher": teacher})
    assert model.decode(model.batch([[30, 40]]), k=5, num_beams=20).counts.tolist() == [5]


def test_evaluate_and_rescore(run, capsys):
    assert main(["export", "--run", str(run)]) == 0
    names = "teacher,teacher-unconstrained,reference,kernel"
    asked = ["evaluate", "--run", str(run), "--methods", names, "--rescore", "teacher"]
    assert main([*asked, "--beams", "30"]) == 0
    assert "name no item" in capsys.readouterr().out
    found = json.loads((run / "evaluate.json").read_text())["quality"]
    assert found["kernel"] == pytest.approx(found["reference"], abs=1e-4)
    # All 30 items are among 30 beams: the order is that of the teacher's own search.
    assert found["rescore"] == pytest.approx(found["teacher"], abs=1e-4)


def test_speed_is_that_of_its_encoder_and_kernel(run):
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    assert main(["export", "--run", str(run)]) == 0
    assert main(["evaluate", "--run", str(run), "--rescore", "teacher", "--beams", "10"]) == 0
    timing = ["--speed", "--seconds", "0.05", "--batch", "8"]
    assert main(["report", "--run", str(run), *timing]) == 0
    speed = json.loads((run / "report" / "report.json").read_text())["speed"]
    assert set(speed) == {"teacher", "kernel", "rescore"}
    assert all(timed["users_per_s"] > 0 for timed in speed.values())


def test_recommend_needs_the_run_of_the_teacher(run, capsys):
    assert main(["export", "--run", str(run)]) == 0
    checkpoint = str(run / "student")
    capsys.readouterr()
    assert main(["recommend", checkpoint, "Film 03", "40", "--k", "5", "--run", str(run)]) == 0
    assert "after Film 03, Film 04:" in capsys.readouterr().out
    assert main(["recommend", checkpoint, "Film 03", "40"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "holds no encoder" in err
    assert "--run" in err


def test_the_teacher_is_kept_with_its_sizes(run):
    teacher = read_teacher(run / "teacher.pt")
    assert teacher.config.backbone == "qwen3"
    assert teacher.config.kv_heads == 1
    assert teacher.tokens.max_items == 5
    with torch.no_grad():
        states = teacher.encode(*teacher.tokens.batch([], torch.zeros(0, 3).numpy()))
    assert states.shape == (0, 2, 16)


def test_sizes_that_a_backbone_does_not_have(run, capsys):
    capsys.readouterr()
    asked = ["train-teacher", "--run", str(run), *SIZES, "--kv-heads", "1", "--restart"]
    assert main(asked) == 2
    assert "sizes that t5 has, got num_kv_heads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train-teacher", "--run", str(run), "--backbone", "gpt"])
    assert "--backbone" in capsys.readouterr().err
