"""What the reports of bench_decode_gpu and bench_requests begin with."""

from __future__ import annotations

from typing import Any

import gpu_timing as timing
import torch
from common import machine_facts
from decode_variants import dtype_name
from gpu_options import Left, Options


def new_report(
    kind: str, options: Options, setting: dict[str, Any], left: list[Left], commit: str | None
) -> dict[str, Any]:
    """The report before its first point; `setting` is what a benchmark has beside the rest.

    Raises RuntimeError where a GPU is measured and somebody else uses it.
    """
    on_gpu = torch.device(options.device).type != "cpu" or kind.endswith("-gpu")
    others = timing.other_processes() if on_gpu else None
    if others:
        raise RuntimeError(f"expected to be alone on the GPU, got {others} other processes on it")
    machine = machine_facts()
    if commit:
        machine["commit"] = commit
    report: dict[str, Any] = {
        "kind": kind,
        "complete": False,
        "machine": machine,
        "setting": {
            "sizes": options.sizes,
            "tokens": options.tokens,
            "k": options.k,
            "num_beams": options.num_beams,
            "backends": list(options.backends),
            "dtypes": [dtype_name(dtype) for dtype in options.dtypes],
            "threads": torch.get_num_threads(),
            **setting,
        },
        "catalogues": {},
        "results": [],
        "left_out": left,
    }
    if on_gpu:
        report["gpu"] = torch.cuda.get_device_name()
        report["setting"]["timing"] = (timing.__doc__ or "").split("\n\n", 1)[1]
        report["setting"]["other_processes"] = (
            "not checked: no nvidia-ml-py" if others is None else others
        )
    return report
