"""`sidmlp import-official`: published files into a run and into a checkpoint, and every misfit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_assets import (
    CODES,
    DIM,
    HISTORIES,
    ITEMS,
    PublishedEncoder,
    save_all,
    save_ids,
    save_teacher,
    tiger,
    token_batch,
)
from transformers import T5ForConditionalGeneration

import sidmlp_kernels
from sidmlp.beam import decode_states
from sidmlp.cli import artifacts, main
from sidmlp.cli.artifacts import load_codes, load_encoder, load_student, load_teacher
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.official import read_published
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie


@pytest.fixture
def teacher() -> T5ForConditionalGeneration:
    return tiger()


@pytest.fixture
def files(tmp_path, teacher) -> dict[str, Path]:
    return save_all(tmp_path, teacher)


def command(files: dict[str, Path], *more: object, **changes: object) -> list[str]:
    options = {name: path for name, path in files.items() if name.startswith("--")}
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [w for name, value in options.items() if value is not None for w in (name, value)]
    return ["import-official", "--codes", ",".join(map(str, CODES)), *map(str, [*words, *more])]


def reference_student(path: Path) -> Student:
    state = read_published(path).state
    found = sidmlp_kernels.Student.from_official(state, num_heads=4)
    student = Student(StudentConfig(**found.spec.to_dict()))
    student.load_state_dict(dict(found.weights))
    return student.eval()


class TestCommand:
    @pytest.mark.parametrize("kind", ["SID-MLP", "SID-MLP++"])
    def test_serves_what_the_release_computes(self, files, teacher, tmp_path, kind, capsys) -> None:
        out = tmp_path / "out"
        changes: dict[str, object] = {"out": out}
        if kind == "SID-MLP++":
            changes |= {"student": files["plus"], "encoder": files["encoder"]}
        assert main(command(files, "--beams", 6, **changes)) == 0
        assert "6 items" in capsys.readouterr().out
        ids, mask = token_batch(HISTORIES)
        with torch.no_grad():
            if kind == "SID-MLP":
                inputs = {"input_ids": ids, "attention_mask": mask}
                states = teacher.encoder(**inputs).last_hidden_state
            else:
                torch.manual_seed(5)
                encoder = PublishedEncoder()
                states = torch.zeros(*ids.shape, DIM)
                for row, valid, state in zip(ids, mask, states, strict=True):
                    state[valid] = encoder(teacher.shared.weight[row[valid]])
        trie = Trie.from_codes(list(ITEMS.values()), codes_per_level=CODES)
        student = reference_student(files["--student"])
        wanted = decode_states(student, states, mask, trie, k=6, num_beams=6)

        model = sidmlp_kernels.load(out, device="cpu")
        names = list(ITEMS)
        found = model.decode(model.batch([[names.index(i) for i in h] for h in HISTORIES]), k=6)
        assert torch.equal(found.items, wanted.items)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)
        titles = json.loads((out / "titles.json").read_text())
        assert list(titles.values()) == names

    def run_directory(self, tmp_path: Path, names=("B00F", "B00A", "0C", "B00D")) -> list[str]:
        rows = [f"u{u},{names[(u + s) % len(names)]},{s}" for u in range(4) for s in range(5)]
        (tmp_path / "t.csv").write_text("\n".join(["user,item,timestamp", *rows]))
        where = ["--run", str(tmp_path / "run")]
        assert main(["data", *where, "--table", str(tmp_path / "t.csv")]) == 0
        return where

    def test_a_run_goes_on_from_there(self, files, teacher, tmp_path, capsys) -> None:
        where = self.run_directory(tmp_path)
        assert main(command(files, *where)) == 0
        assert "4 items: codes, teacher and student" in capsys.readouterr().out
        run = RunDirectory(tmp_path / "run")
        codes, tokens = load_codes(run)
        assert codes.tolist() == [ITEMS[name] for name in ("B00F", "B00A", "0C", "B00D")]
        assert tokens.codes_per_level == CODES
        assert torch.equal(load_teacher(run).t5.shared.weight, teacher.shared.weight)
        wanted = reference_student(files["--student"]).state_dict()
        found = load_student(run).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert main(["export", *where]) == 0
        model = sidmlp_kernels.load(tmp_path / "run" / "student", device="cpu")
        assert model.decode(model.batch([[0, 2]]), k=4).counts.tolist() == [4]

    def test_a_teacher_alone(self, files, tmp_path, capsys) -> None:
        where = self.run_directory(tmp_path)
        assert main(command(files, *where, student=None)) == 0
        assert "4 items: codes and teacher are" in capsys.readouterr().out
        RunDirectory(tmp_path / "run").require("train-teacher")
        sizes = ["--hidden", "8", "--heads", "2", "--epochs", "1", "--batch-size", "4"]
        assert main(["distill", *where, *sizes]) == 0

    def test_a_run_and_a_checkpoint_at_once(self, files, tmp_path) -> None:
        where = self.run_directory(tmp_path)
        out = tmp_path / "out"
        more = {"student": files["plus"], "encoder": files["encoder"], "out": out}
        assert main(command(files, *where, **more)) == 0
        model = sidmlp_kernels.load(out, device="cpu")
        assert model.catalogue.num_items == 4
        encoder = load_encoder(RunDirectory(tmp_path / "run"))
        assert encoder is not None
        theirs = torch.load(files["encoder"], weights_only=True)["pos_embed.weight"]
        assert torch.equal(encoder.embed_positions.weight, theirs)

    def fails(self, capsys, arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    def test_files_that_do_not_fit_each_other(self, files, tmp_path, capsys) -> None:
        out = tmp_path / "out"
        other = save_teacher(tmp_path / "other.pth", tiger(seed=1))
        text = self.fails(capsys, command(files, out=out, teacher=other))
        assert "other values at level 1; name the teacher it was distilled from" in text
        swapped = "7,5,6"  # as many tokens in all, but not the student's levels
        text = self.fails(capsys, [*command(files, out=out), "--codes", swapped])
        assert "a code in 0..4 at level 2" in text
        ids = save_ids(tmp_path / "few", {"B00A": [1, 1, 1]})
        text = self.fails(capsys, [*command(files, out=out, semantic_ids=ids), "--codes", swapped])
        assert "with 7,5,6 codes, got width 12 with 5,7,6" in text
        assert not out.exists()

    def test_an_item_of_the_run_without_an_id(self, files, tmp_path, capsys) -> None:
        where = self.run_directory(tmp_path, ("B00F", "B00X", "0C", "B00D"))
        text = self.fails(capsys, command(files, *where))
        assert "no semantic ID for 1 of 4 items: 'B00X'" in text
        assert not (tmp_path / "run" / "tokenize.json").exists()

    def test_options_that_do_not_go_together(self, files, tmp_path, capsys) -> None:
        out, plus, encoder = tmp_path / "out", files["plus"], files["encoder"]
        where = self.run_directory(tmp_path)
        assert "one of --run and --out" in self.fails(capsys, command(files))
        assert "--out needs --student" in self.fails(capsys, command(files, out=out, student=None))
        text = self.fails(capsys, command(files, out=out, student=plus))
        assert "name that with --encoder" in text
        assert "leave --encoder out" in self.fails(capsys, command(files, out=out, encoder=encoder))
        text = self.fails(capsys, command(files, *where, student=plus, encoder="teacher"))
        assert "name that with --encoder" in text
        text = self.fails(capsys, command(files, out=out, student=None, encoder=encoder))
        assert "--out needs --student" in text
        text = self.fails(capsys, command(files, *where, student=None, encoder=encoder))
        assert "--encoder belongs to a student" in text
        assert "leave --heads out" in self.fails(capsys, command(files, out=out, heads=2))

    def test_a_bare_student_needs_its_heads(self, files, tmp_path, capsys) -> None:
        bare, out = tmp_path / "bare.pth", tmp_path / "out"
        torch.save(read_published(files["--student"]).state, bare)
        reads: dict[str, object] = {"out": out, "encoder": "teacher"}
        assert "say it with --heads" in self.fails(capsys, command(files, student=bare, **reads))
        assert main(command(files, student=bare, heads=4, **reads)) == 0
        reads["out"] = tmp_path / "other"
        text = self.fails(capsys, command(files, student=files["--teacher"], heads=4, **reads))
        assert "tiger.pth: state_dict: expected the published layout" in text

    def test_a_student_that_does_not_say_what_it_reads(self, files, tmp_path, capsys) -> None:
        content = torch.load(files["plus"], weights_only=True)
        args = {k: v for k, v in content["args"].items() if k != "encoder_ckpt"}
        args |= {"mlp_encoder_path": "/data/encoder.pth"}
        torch.save({"model_state_dict": content["model_state_dict"], "args": args}, files["plus"])
        out = tmp_path / "out"
        text = self.fails(capsys, command(files, out=out, student=files["plus"]))
        assert "does not say whose states" in text
        assert "--encoder FILE, or say --encoder teacher" in text
        assert not out.exists()
        more = {"out": out, "student": files["plus"], "encoder": files["encoder"]}
        assert main(command(files, **more)) == 0
        assert json.loads((out / "config.json").read_text())["encoder"]["kind"] == "mlp"

    def test_an_encoder_with_too_few_positions(self, files, tmp_path, capsys) -> None:
        where = self.run_directory(tmp_path)
        more = {"student": files["plus"], "encoder": files["encoder"], "max-items": 23}
        text = self.fails(capsys, command(files, *where, **more))
        assert "expected 71 positions for histories of 23 items, got 70; say --max-items 22" in text
        assert not (tmp_path / "run" / "codes.npy").exists()
        assert main(command(files, *where, **(more | {"max-items": 22}))) == 0
        (tmp_path / "run" / "encoder.pt").write_bytes(b"x")
        text = self.fails(capsys, ["export", *where])
        assert "encoder.pt is missing or damaged; run the command again" in text

    def test_nothing_is_replaced_unasked(self, files, tmp_path, capsys) -> None:
        where = self.run_directory(tmp_path)
        run = RunDirectory(tmp_path / "run")
        assert main(["tokenize", *where, "--codes", "2", "--dim", "2"]) == 0
        before = run.codes.read_bytes()
        text = self.fails(capsys, command(files, *where))
        assert "run has codes.npy, made by earlier commands; say --overwrite" in text
        assert run.codes.read_bytes() == before
        assert main(command(files, *where, "--overwrite", "--out", tmp_path / "out")) == 0
        run.student_progress.write_text("of another training")
        text = self.fails(capsys, command(files, *where, "--out", tmp_path / "out"))
        assert "codes.npy, teacher.pt, student.pt, student-progress.pt and " in text
        assert f"{tmp_path / 'out'} is not empty" in text
        assert main(command(files, *where, "--overwrite", "--out", tmp_path / "out")) == 0
        assert not run.student_progress.exists()

    @pytest.mark.parametrize("broken", ["save_codes", "save_teacher", "save_student"])
    def test_a_full_disk_leaves_the_run_as_it_was(
        self, files, tmp_path, capsys, monkeypatch, broken
    ) -> None:
        where = self.run_directory(tmp_path)
        assert main(["tokenize", *where, "--codes", "2", "--dim", "2"]) == 0
        run = RunDirectory(tmp_path / "run")
        before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
        right = getattr(artifacts, broken)

        def full(*arguments: object) -> None:
            right(*arguments)  # the last of it is what does not fit
            raise OSError(28, "No space left on device", "codes.npy")

        monkeypatch.setattr(artifacts, broken, full)
        assert "No space left" in self.fails(capsys, command(files, *where, "--overwrite"))
        assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before

    def test_a_run_without_data(self, files, tmp_path, capsys) -> None:
        text = self.fails(capsys, command(files, "--run", tmp_path / "none"))
        assert "run `sidmlp data" in text
