"""The benchmark of decoding: verified first, then timed beside PyTorch, on a CPU or on a GPU.

    python benchmarks/bench_decode.py [--device cpu]   see bench_decode_cpu.py
    python benchmarks/bench_decode.py --device cuda    see bench_decode_gpu.py

All other arguments belong to the device's benchmark; `--device cuda --help` lists them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {"cpu": "bench_decode_cpu", "cuda": "bench_decode_gpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark of --device with all other arguments; its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=list(BENCHMARKS), default="cpu")
    chosen, others = parser.parse_known_args(arguments)
    if any(word in ("-h", "--help") for word in others):
        print(__doc__)
    return importlib.import_module(BENCHMARKS[chosen.device]).main(others)


if __name__ == "__main__":
    sys.exit(main())
