"""Stock and versions of a catalogue: snapshots stay whole while threads change what is in stock."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from catalogue_cases import SENTENCE, stock_by_id

from sidmlp_kernels.catalogue import Catalogue


def test_set_available():
    catalogue = Catalogue.from_codes(
        [[1, 1], [0, 0], [1, 1], [0, 1]], [5, 6, 7, 8], available=[True, True, False, True]
    )
    assert stock_by_id(catalogue) == {5: 1, 6: 1, 7: 0, 8: 1}
    assert catalogue.available.tolist() == [True, True, False, True]
    old, version = catalogue.snapshot(), catalogue.version

    catalogue.set_available(5, False)
    assert stock_by_id(catalogue) == {5: 0, 6: 1, 7: 0, 8: 1}
    catalogue.set_available([7, 8], [True, False])
    catalogue.set_available(np.array([6]), np.array(False))
    assert stock_by_id(catalogue) == {5: 0, 6: 0, 7: 1, 8: 0}
    assert catalogue.available.tolist() == [False, False, True, False]
    assert catalogue.version > version
    assert old.version == version
    assert old.available.tolist() == [True, True, False, True]

    # Availability is the last tensor alone: the others are not even copied.
    before, after = old.trie_tensors("cpu"), catalogue.snapshot().trie_tensors("cpu")
    assert all(a is b for a, b in zip(before[:-1], after[:-1], strict=True))
    assert before[-1] is not after[-1]


def test_set_available_without_a_change_keeps_the_version():
    catalogue = Catalogue.from_codes([[0], [1]], [3, 4])
    snapshot = catalogue.snapshot()
    catalogue.set_available([3, 4], True)
    catalogue.set_available([], False)
    assert catalogue.snapshot() is snapshot


def test_bad_stock_changes_nothing():
    catalogue = Catalogue.from_codes([[0], [1]], [3, 4], known_codes=[[1]], known_item_ids=[9])
    snapshot = catalogue.snapshot()
    cases: list[tuple[Any, Any, str]] = [
        ([3, 5], False, "got 5"),
        (-1, False, "got -1"),
        (9, True, "got 9"),  # known to histories, never to be recommended
        ([3, 4], [True], "flag"),
        (3, [True, False], "flag"),
        ([[3, 4]], False, "flag"),
        ([3.0], False, "integers"),
        ([3, True], False, "booleans"),
        ([3], 0.5, "booleans"),
        ([3], 2, "booleans"),
        ([3], None, "booleans"),
    ]
    for ids, flags, match in cases:
        with pytest.raises(ValueError, match=match) as caught:
            catalogue.set_available(ids, flags)
        assert SENTENCE.fullmatch(str(caught.value))
    assert catalogue.snapshot() is snapshot


def test_stock_changes_from_threads_are_whole_and_never_lost():
    count = 400
    catalogue = Catalogue.from_codes([[i % 20, i // 20] for i in range(count)])
    stop = threading.Event()
    failures: list[str] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            snapshot = catalogue.snapshot()
            flags = snapshot.available
            if flags[0] == flags[1]:  # each change below flips both at once
                failures.append(f"torn: {flags[:2]}")
            if snapshot.version < last:
                failures.append(f"version {snapshot.version} after {last}")
            last = snapshot.version

    def flip() -> None:
        for step in range(200):
            catalogue.set_available([0, 1], [step % 2 == 0, step % 2 == 1])

    def sell_out(first: int) -> None:
        for item in range(first, count, 4):
            catalogue.set_available(item, False)

    catalogue.set_available([0, 1], [False, True])
    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=sell_out, args=(2 + i,)) for i in range(4)]
    writers.append(threading.Thread(target=flip))
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures, failures[:3]
    assert catalogue.available.tolist() == [False, True] + [False] * (count - 2)


def test_versions_are_unique_over_threads_and_catalogues():
    versions: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        for _ in range(50):
            catalogue = Catalogue.from_codes([[0]])
            mine.append(catalogue.version)
            catalogue.set_available(0, False)
            mine.append(catalogue.version)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in versions)
    assert len({v for mine in versions for v in mine}) == 400


def test_trie_tensors_are_cached_and_lists_are_not_shared():
    snapshot = Catalogue.from_codes([[0, 1], [1, 0]]).snapshot()
    first, second = snapshot.trie_tensors("meta"), snapshot.trie_tensors(torch.device("meta"))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(tensor.device.type == "meta" for tensor in first)
    first.clear()
    assert len(snapshot.trie_tensors("meta")) == 7
