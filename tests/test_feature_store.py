"""Features of many examples: shards that outlive a kill, disks and memories that are too small."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from sidmlp.training import feature_store, features
from sidmlp.training.feature_store import make_in_memory, make_on_disk
from sidmlp.training.memory import available_memory

EXAMPLES, BATCH = 103, 2
OFFSETS = np.concatenate([[0], np.cumsum(np.arange(EXAMPLES) % 4 + 1)])
SHAPES = {"states": (int(OFFSETS[-1]), 3), "logits": (EXAMPLES, 5)}
WANTED = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float16)
    for name, shape in SHAPES.items()
}


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


class Model:
    """Gives rows of WANTED and remembers which batches were asked for."""

    def __init__(self, until: int = EXAMPLES) -> None:
        self.until, self.asked = until, []

    def __call__(self, begin: int, end: int) -> dict[str, np.ndarray]:
        if end > self.until:
            raise Killed
        self.asked.append((begin, end))
        rows = {"states": slice(OFFSETS[begin], OFFSETS[end]), "logits": slice(begin, end)}
        return {name: WANTED[name][part].astype(np.float32) for name, part in rows.items()}


def stored(directory, model, batch=BATCH, **key):
    work = (SHAPES, np.dtype(np.float16), EXAMPLES, batch, "features", False)
    return make_on_disk(model, *work, directory=directory, key={"fingerprint": "a", **key})


def check(arrays) -> None:
    assert set(arrays) == set(WANTED)
    for name, wanted in WANTED.items():
        assert arrays[name].dtype == wanted.dtype
        assert np.array_equal(arrays[name], wanted)


def test_both_ways_give_the_same(tmp_path):
    check(stored(tmp_path / "f", Model()))
    check(make_in_memory(Model(), SHAPES, np.dtype(np.float16), EXAMPLES, BATCH, "f", False))


@pytest.mark.parametrize("until", [0, 1, 31, 32, 33, 64, 70, 102])
def test_a_kill_costs_at_most_a_shard(tmp_path, until):
    with pytest.raises(Killed):
        stored(tmp_path, Model(until))
    again = Model()
    check(stored(tmp_path, again))
    # Shards have 16 batches of 2; the same batches are asked for as in an uninterrupted run.
    first = until // 32 * 32
    assert again.asked == [(b, min(b + 2, EXAMPLES)) for b in range(first, EXAMPLES, 2)]
    read = Model(0)
    check(stored(tmp_path, read))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "features.json",
        "logits.npy",
        "states.npy",
    ]


def test_a_process_that_is_really_killed(tmp_path):
    script = """
import os, pathlib, signal, sys
import test_feature_store as t
def stop(begin, end):
    if end > 70:
        os.kill(os.getpid(), signal.SIGKILL)
    return model(begin, end)
model = t.Model()
t.stored(pathlib.Path(sys.argv[1]), stop)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == -signal.SIGKILL
    again = Model()
    check(stored(tmp_path, again))
    assert again.asked[0][0] == 64


@pytest.mark.parametrize("change", [{"fingerprint": "b"}, {"precision": "bf16"}, {"batch": 4}])
def test_others_are_not_continued(tmp_path, change):
    with pytest.raises(Killed):
        stored(tmp_path, Model(64))
    again = Model()
    check(stored(tmp_path, again, **change))
    assert again.asked[0][0] == 0
    with pytest.raises(Killed):  # nor read, once complete
        stored(tmp_path, Model(0))


def test_what_was_cut_off_is_made_anew(tmp_path):
    with pytest.raises(Killed):
        stored(tmp_path, Model(64))
    os.truncate(tmp_path / "states.npy", 200)
    again = Model()
    check(stored(tmp_path, again))
    assert again.asked[0][0] == 0


def test_a_full_disk_loses_no_complete_shard(tmp_path, monkeypatch):
    calls = 0

    def full(number):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_store.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; 64 of 103 examples are kept") as e:
        stored(tmp_path, Model())
    assert e.value.filename == str(tmp_path)
    assert "run the same again" in e.value.strerror
    monkeypatch.undo()
    again = Model()
    check(stored(tmp_path, again))
    assert again.asked[0][0] == 64


def test_a_disk_without_room_is_found_out_before_anything_is_computed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    model = Model()
    with pytest.raises(OSError, match=r"GiB more are needed, 0.00 GiB are free; 0 of 103"):
        stored(tmp_path, model)
    assert not model.asked


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match="name a directory"):
        make_in_memory(Model(), SHAPES, np.dtype(np.float16), EXAMPLES, BATCH, "features", False)


@pytest.mark.parametrize(("room", "kind"), [(1 << 40, np.ndarray), (100, np.memmap)])
def test_what_is_larger_than_memory_stays_on_disk(tmp_path, monkeypatch, caplog, room, kind):
    monkeypatch.setattr(features, "available_memory", lambda: room)
    caplog.set_level(logging.INFO)
    arrays = features._computed(
        Model(),
        SHAPES,
        "float16",
        EXAMPLES,
        BATCH,
        "features",
        True,
        features.Execution(),
        tmp_path,
        "a",
    )
    check(arrays)
    assert {type(array) for array in arrays.values()} == {kind}
    said = "as they are needed" if kind is np.memmap else "read into memory"
    assert sum(said in line for line in caplog.messages) == len(caplog.messages) == 1


def test_available_memory_is_some_of_the_machine_s():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
