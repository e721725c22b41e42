"""`sidmlp evaluate` of an imported SID-MLP++, which reads an encoder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published_assets import CODES, ITEMS, PublishedEncoder, save_all, tiger, token_batch
from test_import_official import command, reference_student

from sidmlp.beam import decode_states
from sidmlp.cli import main
from sidmlp.cli.artifacts import load_data
from sidmlp.cli.run_directory import RunDirectory
from sidmlp.data import leave_last_out
from sidmlp.evaluate import Quality, Questions
from sidmlp.trie import Trie

BEAMS = 10


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> list[str]:
    """A run with the published SID-MLP++ imported and exported."""
    path = tmp_path_factory.mktemp("official")
    names = list(ITEMS)
    rng = np.random.default_rng(0)
    rows = ["user,item,timestamp"]
    for user in range(60):
        rows += [f"u{user},{names[i]},{t}" for t, i in enumerate(rng.permutation(6)[:4])]
    (path / "t.csv").write_text("\n".join(rows))
    where = ["--run", str(path / "run")]
    assert main(["data", *where, "--table", str(path / "t.csv")]) == 0
    files = save_all(path, tiger())
    more = {"student": files["plus"], "encoder": files["encoder"]}
    assert main(command(files, *where, **more)) == 0
    assert main(["export", *where]) == 0
    return where


def test_it_is_scored_on_the_states_of_its_encoder(where, capsys) -> None:
    run = RunDirectory(where_path := Path(where[1]))
    names = "popularity,teacher,reference,kernel"
    assert main(["evaluate", *where, "--methods", names, "--beams", str(BEAMS)]) == 0
    found = json.loads((where_path / "evaluate.json").read_text())["quality"]

    data = load_data(run)
    questions = Questions.of(leave_last_out(data).test)
    histories = [[data.key(i) for i in seen] for seen in questions.exclude]
    ids, mask = token_batch(histories)
    torch.manual_seed(5)
    encoder, table = PublishedEncoder(), tiger().shared.weight
    states = torch.zeros(*ids.shape, table.shape[1])
    with torch.no_grad():
        for row, valid, state in zip(ids, mask, states, strict=True):
            state[valid] = encoder(table[row[valid]])
    codes = [ITEMS[data.key(i)] for i in range(data.num_items)]
    trie = Trie.from_codes(codes, codes_per_level=CODES)
    student = reference_student(where_path.parent / "plus.pth")
    wanted = decode_states(student, states, mask, trie, 10, BEAMS, questions.exclude).items
    for name, value in vars(Quality.of(wanted, questions.targets)).items():
        assert found["reference"][name] == pytest.approx(value)
        assert found["kernel"][name] == pytest.approx(value)
    # The teacher's states give another order, so reading them would have been seen.
    with torch.no_grad():
        states = tiger().encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    other = decode_states(student, states, mask, trie, 10, BEAMS, questions.exclude).items
    assert vars(Quality.of(other, questions.targets)) != vars(Quality.of(wanted, questions.targets))


def test_rescoring_reads_the_teacher_s_own_states(where) -> None:
    arguments = ["--methods", "teacher", "--rescore", "teacher", "--beams", str(BEAMS)]
    assert main(["evaluate", *where, *arguments]) == 0
    path = Path(where[1]) / "evaluate.json"
    found = json.loads(path.read_text())["quality"]
    # Ten beams propose all six items, so the order is that of the teacher's own search.
    for name in ("recall_5", "ndcg_5", "ndcg_10"):
        assert found["rescore"][name] == pytest.approx(found["teacher"][name])
    assert found["kernel"]["ndcg_5"] != pytest.approx(found["teacher"]["ndcg_5"])


def test_report_takes_it_for_a_students_second_row(where) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    assert main(["evaluate", *where, "--methods", "teacher,kernel", "--beams", str(BEAMS)]) == 0
    assert main(["report", *where, "--plus", where[1]]) == 0
    report = json.loads((Path(where[1]) / "report" / "report.json").read_text())
    # Nobody trained it here, so it has quality and no curve.
    assert report["quality"]["student++"] == report["quality"]["kernel"]
    assert report["training"] == {}
