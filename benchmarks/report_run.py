"""A long measurement whose finished points survive whatever stops it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_json
from decode_checks import VerificationError

Report = dict[str, Any]


def run_into(
    program: str,
    out: Path,
    new_report: Callable[[], Report],
    run: Callable[[Report, Callable[[], None], Callable[[str], None]], None],
) -> int:
    """Runs `run(report, save, say)` and writes `out` at its end; returns the exit status.

    Until then `save` keeps what there is in `<out>.partial`. A result that does not verify leaves
    no file at all; any other RuntimeError leaves the partial one.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        report = new_report()
        with torch.no_grad():
            run(report, lambda: write_json(partial, report), lambda line: print(line, flush=True))
    except VerificationError as error:
        partial.unlink(missing_ok=True)
        print(f"{program}: nothing is reported: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(
            f"{program}: stopped: {error}; what was measured, if anything: {partial}",
            file=sys.stderr,
        )
        return 1
    report["complete"] = True
    write_json(partial, report)
    partial.replace(out)
    print(out)
    return 0
