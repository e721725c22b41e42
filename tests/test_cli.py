"""The command line: every step on a tiny data set, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sidmlp.cli import COMMANDS, main
from sidmlp.cli.run_directory import PARENTS, RunDirectory
from sidmlp.data import load_table
from sidmlp.training import load_tensors, save_tensors

TEACHER_SIZES = ["--dim", "16", "--layers", "1", "--heads", "2", "--head-dim", "8", "--ffn", "16"]
TEACHER = [*TEACHER_SIZES, "--epochs", "2", "--batch-size", "32"]
STUDENT = ["--hidden", "16", "--heads", "2", "--epochs", "2", "--batch-size", "32"]


def table(path: Path, users: int = 24, items: int = 30) -> Path:
    """Events of users who walk round a circle of items."""
    lines = ["user,item,timestamp,title"]
    for user in range(users):
        for step in range(7):
            item = (user + step) % items
            lines.append(f"u{user},{item * 10},{step},Film {item:02}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory in which every step up to the export has been done."""
    directory = tmp_path_factory.mktemp("run")
    source = table(directory / "events.csv")
    where = ["--run", str(directory)]
    assert main(["data", *where, "--table", str(source)]) == 0
    assert main(["tokenize", *where, "--codes", "4,4", "--dim", "4", "--max-items", "5"]) == 0
    assert main(["train-teacher", *where, *TEACHER]) == 0
    assert main(["distill", *where, *STUDENT]) == 0
    assert main(["export", *where]) == 0
    return directory


def fails(capsys, *arguments: str) -> str:
    """The sentence that a mistake gets; fails the test when it is no mistake or several lines."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


class TestHelp:
    def test_overview_names_every_command(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for name in COMMANDS:
            assert name in text

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_explains_itself_with_defaults(self, name, capsys):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "default:" in text
        assert "default: None" not in text
        assert "(default" in text.replace("\n", " ")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            [],
            ["data"],
            ["tokenize", "--codes", "64,x"],
            ["train-teacher", "--dim", "0"],
            ["distill", "--alpha", "2"],
            ["evaluate", "--methods", "magic"],
            ["evaluate", "--run", "r", "--rescore", "nobody"],
        ],
    )
    def test_argparse_refuses(self, arguments, capsys):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "error:" in capsys.readouterr().err


class TestSteps:
    def test_every_step_leaves_a_record(self, run):
        for name in PARENTS:
            assert (run / f"{name}.json").is_file(), name
        tokens = json.loads((run / "tokenize.json").read_text())
        assert tokens["unique_ids"] == 30
        assert tokens["codes_per_level"][:2] == [4, 4]
        config = json.loads((run / "student" / "config.json").read_text())
        assert config["tokens"]["max_items"] == 5
        assert config["encoder"]["kind"] == "t5"
        titles = json.loads((run / "student" / "titles.json").read_text())
        assert titles["290"] == "Film 29"

    def test_evaluate_prints_and_records_a_table(self, run, capsys):
        names = "popularity,teacher,teacher-unconstrained,reference"
        assert main(["evaluate", "--run", str(run), "--methods", names]) == 0
        text = capsys.readouterr().out
        found = json.loads((run / "evaluate.json").read_text())["quality"]
        assert list(found) == names.split(",")
        for name, values in found.items():
            assert name in text
            assert 0 <= values["ndcg_10"] <= values["recall_10"] <= 1
        assert "name no item" in text

    def test_the_kernel_scores_as_the_reference(self, run):
        names = "reference,kernel"
        assert main(["evaluate", "--run", str(run), "--methods", names]) == 0
        found = json.loads((run / "evaluate.json").read_text())["quality"]
        assert found["kernel"] == pytest.approx(found["reference"], abs=1e-4)

    def test_the_teacher_rescores_the_kernels_items(self, run, capsys):
        asked = ["evaluate", "--run", str(run), "--methods", "kernel", "--rescore", "teacher"]
        assert main([*asked, "--beams", "30"]) == 0
        assert "rescore" in capsys.readouterr().out
        found = json.loads((run / "evaluate.json").read_text())["quality"]
        assert list(found) == ["kernel", "teacher", "rescore"]
        # All 30 items are among 30 beams: the order is that of the teacher's own search.
        assert found["rescore"] == pytest.approx(found["teacher"], abs=1e-4)

    def test_recommend_by_title_and_id(self, run, capsys):
        checkpoint = str(run / "student")
        assert main(["recommend", checkpoint, "Film 03", "40", "--k", "5"]) == 0
        text = capsys.readouterr().out
        assert "after Film 03, Film 04:" in text
        assert text.count("Film") == 7
        assert text.count("Film 03") == text.count("Film 04") == 1

    def test_recommend_takes_as_many_beams_as_results(self, run, capsys):
        checkpoint = str(run / "student")
        assert main(["recommend", checkpoint, "Film 03", "--k", "60"]) == 0  # its default is 50
        text = capsys.readouterr().out
        assert text.count("log-probability") == 29  # every other film
        few = fails(capsys, "recommend", checkpoint, "Film 03", "--k", "60", "--beams", "8")
        assert "num_beams=8" in few

    def test_training_again_continues(self, run, capsys, caplog):
        with caplog.at_level("INFO"):
            assert main(["train-teacher", "--run", str(run), *TEACHER]) == 0
        assert "epoch" not in caplog.text  # all epochs are done, so none runs again
        assert "in epoch" in capsys.readouterr().out

    def test_a_copied_run_evaluates_its_own_student(self, run, tmp_path, capsys):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "student")
        asked = ["evaluate", "--methods", "kernel"]
        assert "student" in fails(capsys, *asked, "--run", copy)
        assert main(["export", "--run", str(copy), "--out", str(tmp_path / "out")]) == 0
        assert RunDirectory(copy).exported() == (tmp_path / "out").resolve()
        assert main([*asked, "--run", str(copy)]) == 0

    def test_ready_made_ids(self, run, tmp_path):
        np.savez(
            tmp_path / "sequences.npz",
            items=np.tile(np.arange(6, dtype=np.int32), 4),
            offsets=np.arange(0, 25, 6),
        )
        codes = np.stack(np.unravel_index(np.arange(6), (2, 3)), axis=1).astype(np.int16)
        np.savez(tmp_path / "semantic_ids.npz", grid=codes)
        where = ["--run", str(tmp_path / "run")]
        assert main(["data", *where, "--arrays", str(tmp_path)]) == 0
        assert main(["tokenize", *where, "--semantic-ids", str(tmp_path), "grid"]) == 0
        assert np.array_equal(np.load(tmp_path / "run" / "codes.npy"), codes)


class TestDemo:
    def test_prints_people_quality_and_speed(self, tmp_path, capsys, monkeypatch):
        import sidmlp.data
        from sidmlp.cli import demo

        data = load_table(table(tmp_path / "events.csv"))
        monkeypatch.setattr(sidmlp.data, "load_movielens", lambda cache, wheel: data)
        monkeypatch.setattr(demo, "TOKENIZE", "--codes 4,4 --dim 4 --max-items 5")
        monkeypatch.setattr(demo, "TEACHER", " ".join(TEACHER))
        monkeypatch.setattr(demo, "STUDENT", " ".join(STUDENT))
        where = str(tmp_path / "run")
        assert main(["demo", "--run", where, "--batch", "4", "--compile-limit", "1"]) == 0
        text = capsys.readouterr().out
        assert shlex.split(text.splitlines()[-1])[:5] == [
            demo._from_here(Path(sys.executable)),
            "-m",
            "sidmlp",
            "recommend",
            str(tmp_path / "run" / "student"),
        ]
        assert text.count("saw last: Film") == 3
        assert "not compiled within 1 s" in text
        announced = text.index("torch.compile of the reference takes up to 1 s")
        assert announced < text.index("# Student decode")
        assert "Parity: 100.00%" in text
        found = json.loads((tmp_path / "run" / "demo.json").read_text())
        assert list(found["quality"]) == ["popularity", "teacher", "reference", "kernel"]
        speed = found["speed"]
        assert speed["agreeing"] == 1
        assert speed["largest_score_difference"] < 1e-4
        assert speed["compiled_us"] is None
        assert 0 < speed["kernel_us"] < speed["eager_us"]

    def test_paths_to_type_are_relative_where_they_can_be(self, tmp_path, monkeypatch):
        from sidmlp.cli.demo import _from_here

        (tmp_path / "my runs").mkdir()
        monkeypatch.chdir(tmp_path / "my runs")
        assert _from_here(tmp_path / "my runs" / "a" / "student") == "a/student"
        assert _from_here(Path("a b")) == "'a b'"
        assert shlex.split(_from_here(tmp_path)) == [str(tmp_path)]

    def test_a_failed_compilation_says_why(self, tmp_path):
        from sidmlp.cli.timing import compiled_microseconds

        taken, note = compiled_microseconds(RunDirectory(tmp_path), 4, 60)
        assert taken is None
        assert "torch.compile failed" in note
        assert "sidmlp data" in note

    def test_parity_counts_items_and_compares_scores_of_the_same(self):
        from sidmlp.beam import Decoded
        from sidmlp.cli.timing import Parity

        reference = Decoded(
            items=torch.tensor([[5, 6, -1], [7, 8, 9]]),
            scores=torch.tensor([[-1.0, -2.0, -torch.inf], [-1.0, -2.0, -3.0]]),
            codes=torch.zeros(2, 3, 1, dtype=torch.int32),
            counts=torch.tensor([2, 3]),
        )
        items = torch.tensor([[6, 5, -1], [7, 8, 4]])
        scores = torch.tensor([[-2.0, -1.25, -torch.inf], [-1.0, -2.5, -9.0]])
        parity = Parity.of(reference, items, scores)
        assert parity.agreeing == pytest.approx(4 / 5)
        assert parity.largest_difference == pytest.approx(0.5)


class TestMistakes:
    def test_steps_out_of_order(self, capsys, tmp_path):
        where = ["--run", str(tmp_path / "none")]
        assert "run `sidmlp data --run" in fails(capsys, "tokenize", *where)
        assert "sidmlp data" in fails(capsys, "export", *where)

    def test_an_outdated_result_is_refused(self, run, capsys, tmp_path):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        where = ["--run", str(copy)]
        assert main(["tokenize", *where, "--codes", "5,4", "--dim", "4"]) == 0
        assert "before `sidmlp tokenize` ran last" in fails(capsys, "distill", *where, *STUDENT)
        message = fails(capsys, "train-teacher", *where, *TEACHER)
        assert "--restart" in message
        assert main(["train-teacher", *where, *TEACHER, "--restart"]) == 0

    def test_other_settings_do_not_continue(self, run, capsys):
        message = fails(capsys, "train-teacher", "--run", run, *TEACHER, "--beams", "30")
        assert "validation than this call's" in message
        assert "--restart" in message
        message = fails(capsys, "distill", "--run", run, *STUDENT, "--lr", "0.5")
        assert "learning_rate" in message
        assert "--restart" in message

    def test_bad_data(self, capsys, tmp_path):
        where = ["--run", str(tmp_path / "run")]
        none = str(tmp_path / "none.csv")
        assert "does not exist" in fails(capsys, "data", *where, "--table", none)
        assert "sequences.npz does not exist" in fails(
            capsys, "data", *where, "--arrays", str(tmp_path)
        )
        short = tmp_path / "short.csv"
        short.write_text("user,item,timestamp\na,1,1\na,2,2\n")
        assert "at least 4" in fails(capsys, "data", *where, "--table", short)
        assert "--movielens" in fails(
            capsys, "data", *where, "--table", short, "--wheel", "recbole.whl"
        )

    def test_more_clusters_than_items(self, run, capsys, tmp_path):
        where = ["--run", str(tmp_path / "run")]
        source = table(tmp_path / "events.csv", users=5)
        assert main(["data", *where, "--table", str(source)]) == 0
        assert "number of items" in fails(capsys, "tokenize", *where, "--codes", "64,64")

    def test_codes_that_cannot_be_served(self, run, capsys, tmp_path, monkeypatch):
        import sidmlp.tokenizers

        def too_late(*_, **__):
            raise AssertionError("clustered before the sizes were checked")

        with monkeypatch.context() as patch:
            patch.setattr(sidmlp.tokenizers, "residual_kmeans", too_late)
            patch.setattr(sidmlp.tokenizers, "cooccurrence_vectors", too_late)
            for codes in ("2,2,2,2,2,2,2,2", "4,32768"):
                message = fails(capsys, "tokenize", "--run", run, "--codes", codes)
                assert "expected 1..8 levels of 1..32767 codes" in message
                assert "use fewer codes or levels" in message
        large = np.stack([np.zeros(30, dtype=np.int64), np.arange(30) + 32_740], axis=1)
        np.savez(tmp_path / "semantic_ids.npz", large=large)
        message = fails(capsys, "tokenize", "--run", run, "--semantic-ids", tmp_path, "large")
        assert "got 2 levels of [1, 32770] codes" in message

    def test_few_beams(self, run, capsys):
        assert "--beams" in fails(capsys, "evaluate", "--run", run, "--beams", "3")

    def test_recommend_unknown_items_and_no_checkpoint(self, run, capsys, tmp_path):
        assert "no item has" in fails(capsys, "recommend", run / "student", "Casablanca")
        assert "matches" in fails(capsys, "recommend", run / "student", "Film")
        assert "none" in fails(capsys, "recommend", tmp_path / "none", "Film 01")

    def test_damaged_files(self, run, capsys, tmp_path):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        directory = RunDirectory(copy)
        good = load_tensors(directory.student)
        save_tensors(directory.student, {"weights": {}})
        assert "student.pt holds no student" in fails(capsys, "export", "--run", copy)
        save_tensors(directory.student, good)
        save_tensors(directory.teacher_progress, {"result": {}})
        message = fails(capsys, "train-teacher", "--run", copy, *TEACHER)
        assert "teacher-progress.pt holds no state of a training" in message
        (copy / "distill.json").write_text("[]")
        message = fails(capsys, "export", "--run", copy)
        assert "distill.json is no record of a command; run `sidmlp distill" in message
        shutil.copy2(run / "distill.json", copy)
        directory.teacher.write_bytes(b"nonsense")
        assert "teacher.pt is damaged" in fails(capsys, "export", "--run", copy)
        directory.codes.write_bytes(b"nonsense")
        assert "codes.npy" in fails(capsys, "export", "--run", copy)

    @pytest.mark.parametrize(
        "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
    )
    def test_out_of_memory(self, run, capsys, monkeypatch, error):
        def greedy(_):
            raise error

        monkeypatch.setattr("sidmlp.cli.evaluate.run", greedy)
        assert "out of memory" in fails(capsys, "evaluate", "--run", run)

    def test_errors_of_ours_keep_their_traceback(self, run, monkeypatch):
        def wrong(_):
            raise RuntimeError("a bug")

        monkeypatch.setattr("sidmlp.cli.evaluate.run", wrong)
        with pytest.raises(RuntimeError, match="a bug"):
            main(["evaluate", "--run", str(run)])

    def test_a_missing_package_is_named(self, run, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "sidmlp_kernels", None)
        message = fails(capsys, "recommend", run / "student", "Film 01")
        assert "sidmlp_kernels" in message
        assert "`pip install --no-build-isolation -e .` in the repository" in message
        monkeypatch.setitem(sys.modules, "sidmlp.export", None)
        message = fails(capsys, "export", "--run", run)
        assert "`pip install --no-build-isolation -e '.[train]'` in the repository" in message
