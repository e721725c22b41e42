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
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.trie import host_library

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 0


def parse_count(text: str) -> int:
    """12k -> 12000, 20M -> 20000000."""
    match = re.fullmatch(r"(\d+)([kM]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected counts such as 500, 12k or 20M, got {text!r}")
    return int(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak since `reset_peak`) of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1])


def reset_peak() -> None:
    """Sets VmHWM to what is in use now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


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


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| items | build_trie s | from_codes s | peak RSS growth MB | nodes per level "
        "| bytes a node |",
        "|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        nodes = " / ".join(f"{n:,}" for n in row["nodes_per_level"])
        lines.append(
            f"| {row['items']:,} | {row['build_trie_seconds']:.4f} "
            f"| {row['from_codes_seconds']:.4f} | {row['peak_rss_growth_bytes'] / 1e6:,.1f} "
            f"| {nodes} | {row['bytes_per_node']:.2f} |"
        )
    return "\n".join(lines)


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

    rows = []
    for num_items in map(parse_count, args.items.split(",")):
        command = [sys.executable, __file__, "--one", str(num_items)]
        command += ["--levels", str(args.levels), "--codes", str(args.codes)]
        print(f"{num_items:,} items: verifying, then timing", file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))

    info = host_library().build_info()
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = args.out or RESULTS / f"catalogue-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {
        "cpu": cpu_name(),
        "threads": len(os.sched_getaffinity(0)),
        "compiler": info["compiler"],
        "flags": info["flags"],
        "numpy": np.__version__,
        "commit": commit(),
        "levels": args.levels,
        "codes_per_level": args.codes,
        "codes": "uniformly random",
        "seed": SEED,
    }
    path.write_text(json.dumps({**setting, "results": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"\nwritten to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
