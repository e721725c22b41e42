"""What takes long shows how far it is, on a terminal and nowhere else."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest

from sidmlp.data import Interactions, leave_last_out, load_table
from sidmlp.data import tables as tables_module
from sidmlp.progress import lines_with_bar
from sidmlp.tokenizers import cooccurrence_vectors, residual_kmeans

pytest.importorskip("tqdm", reason="needs the extra `train`")


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


def write_table(path: Path) -> Path:
    rows = [{"user": u, "item": i, "timestamp": i} for u in range(5) for i in range(4)]
    if path.suffix == ".csv":
        lines = ["user,item,timestamp", *("{user},{item},{timestamp}".format(**r) for r in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["events.csv", "events.jsonl"])
def test_reading_a_table(tmp_path: Path, name: str) -> None:
    with redirect_stderr(Terminal()) as terminal:
        data = load_table(write_table(tmp_path / name))
    assert data.items.size == 20
    assert f"{name}:   0%" in terminal.getvalue()


def test_a_large_table_says_that_it_is_sorted(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tables_module, "_MANY", 20)
    with caplog.at_level(logging.INFO):
        load_table(write_table(tmp_path / "events.csv"))
    assert "events.csv: sorting 20 events" in caplog.text


def test_lines_are_counted_in_bytes(monkeypatch) -> None:
    monkeypatch.setattr("sidmlp.progress._BYTES_PER_UPDATE", 50)
    lines = [f"{i:09}\n" for i in range(20)]
    steps: list[int] = []
    monkeypatch.setattr("tqdm.tqdm.update", lambda self, step: steps.append(step))
    with redirect_stderr(Terminal()):
        assert list(lines_with_bar(lines, 200, "text")) == lines
    assert steps == [50] * 4


@pytest.mark.parametrize(
    ("backend", "labels"), [("torch", ["codes", "k-means++", "k-means"]), ("faiss", ["codes"])]
)
def test_tokenising(backend: str, labels: list[str]) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss", reason="needs the extra `train`")
    vectors = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    with redirect_stderr(Terminal()) as terminal:
        residual_kmeans(vectors, (4, 4), backend=backend)
    for label in labels:
        assert f"{label}:   0%" in terminal.getvalue()


def test_nobody_watches(tmp_path: Path) -> None:
    with redirect_stderr(io.StringIO()) as elsewhere:
        load_table(write_table(tmp_path / "events.csv"))
        residual_kmeans(np.eye(4, dtype=np.float32), (2, 2), backend="torch")
    assert elsewhere.getvalue() == ""


def test_the_svd_is_announced(caplog) -> None:
    users = [str(user) for user in range(4) for _ in range(5)]
    items = [str(item) for _ in range(4) for item in range(5)]
    data = Interactions.from_events(users, items, list(range(20)))
    with caplog.at_level(logging.INFO):
        cooccurrence_vectors(data, leave_last_out(data), dim=2)
    assert "SVD of width 2" in caplog.text
