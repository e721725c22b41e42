"""Building a catalogue: seconds, memory and bytes a node, from thousands to millions of items.

    python benchmarks/bench_catalogue.py [--items 4k,12k,48k,1M,20M] [--levels 4] [--codes 256]

Items have uniformly random codes, the worst case for memory (hardly any prefix is shared below the
second level). Each size runs in a process of its own: an independent numpy construction verifies
every array of the trie first, then the build is timed and its peak memory read. Prints a table and
writes results/catalogue-<cpu>.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    cpu_name,
    machine_facts,
    memory_kib,
    parse_count,
    reset_peak,
    results_path,
    write_json,
)
from make_tables import catalogue_tables

from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.trie import host_library

SEED = 0


def verify(codes: np.ndarray, sizes: list[int], trie: dict[str, np.ndarray]) -> None:
    """Compares every array with one made by sorting whole tuples as single integers."""
    key = np.zeros(len(codes), np.int64)
    for level, size in enumerate(sizes):
        key = key * size + codes[:, level]
    order = np.argsort(key, kind="stable")
    np.testing.assert_array_equal(trie["leaf_order"], order)
    np.testing.assert_array_equal(trie["leaf_item_ids"], order)  # ids are positions here
    assert trie["leaf_available"].all()

    prefixes = key[order]
    del key, order
    leaves = True
    for level in range(len(sizes), 0, -1):  # from whole tuples to ever shorter prefixes
        first = np.flatnonzero(np.concatenate([[True], prefixes[1:] != prefixes[:-1]]))
        begin = "leaf_begin" if leaves else f"child_begin_{level + 1}"
        np.testing.assert_array_equal(trie[begin], np.append(first, len(prefixes)))
        nodes = prefixes[first]
        np.testing.assert_array_equal(trie[f"codes_{level}"], nodes % sizes[level - 1])
        prefixes = nodes // sizes[level - 1]
        leaves = False
    assert not prefixes.any()
    np.testing.assert_array_equal(trie["child_begin_1"], [0, len(prefixes)])


def measure(num_items: int, num_levels: int, num_codes: int, repeats: int) -> dict[str, Any]:
    """One size: verify, then time the C++ build and the whole of Catalogue.from_codes."""
    rng = np.random.default_rng(SEED)
    codes = rng.integers(0, num_codes, (num_items, num_levels), dtype=np.int16)
    item_ids = np.arange(num_items)
    sizes = [num_codes] * num_levels
    build_trie = host_library().build_trie

    trie = build_trie(codes, item_ids, None, sizes)
    verify(codes, sizes, trie)
    del trie

    build_seconds, catalogue_seconds = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        build_trie(codes, item_ids, None, sizes)
        build_seconds.append(time.perf_counter() - started)
    growth = 0
    for _ in range(repeats):
        before = memory_kib("VmRSS")
        reset_peak()
        started = time.perf_counter()
        catalogue = Catalogue.from_codes(codes, None, sizes)
        catalogue_seconds.append(time.perf_counter() - started)
        growth = max(growth, (memory_kib("VmHWM") - before) * 1024)
        shape = catalogue.statistics()
        del catalogue

    return {
        "items": num_items,
        "build_trie_seconds": statistics.median(build_seconds),
        "from_codes_seconds": statistics.median(catalogue_seconds),
        "peak_rss_growth_bytes": growth,
        "nodes_per_level": [level.nodes for level in shape.levels],
        "node_bytes": shape.node_bytes,
        "bytes_per_node": shape.bytes_per_node,
        "item_bytes": shape.item_bytes,
        "verified": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", default="4k,12k,48k,1M,20M", help="numbers of items")
    parser.add_argument("--levels", type=int, default=4, help="codes of an item (1..8)")
    parser.add_argument("--codes", type=int, default=256, help="codes of a level (1..32767)")
    parser.add_argument("--out", type=Path, help="JSON file; default results/catalogue-<cpu>.json")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the process of one size
    args = parser.parse_args()
    if args.one is not None:
        repeats = 5 if args.one <= 1_000_000 else 1
        print(json.dumps(measure(args.one, args.levels, args.codes, repeats)))
        return
    if args.codes**args.levels >= 2**63:
        parser.error("codes ** levels must stay below 2^63 for the check by whole tuples")

    machine = machine_facts()
    rows = []
    for num_items in map(parse_count, args.items.split(",")):
        command = [sys.executable, __file__, "--one", str(num_items)]
        command += ["--levels", str(args.levels), "--codes", str(args.codes)]
        print(f"{num_items:,} items: verifying, then timing", file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))

    report = {
        "kind": "catalogue",
        "machine": machine,
        "setting": {
            "threads": machine["cores"],
            "levels": args.levels,
            "codes_per_level": args.codes,
            "codes": "uniformly random",
            "seed": SEED,
        },
        "results": rows,
    }
    path = args.out or results_path("catalogue", cpu_name())
    write_json(path, report)
    for table in catalogue_tables(report).values():
        print(table)
    print(f"\nwritten to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
