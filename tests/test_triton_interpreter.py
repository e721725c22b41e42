"""The Triton kernels in Triton's interpreter, in a process that sets TRITON_INTERPRET first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parent / "interpreted_triton.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """Runs every test of interpreted_triton.py; names those that fail, with what they said."""
    report = tmp_path / "report.xml"
    options = ["-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert report.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(report).findall(".//testcase")
    failed = [str(case.get("name")) for case in cases if len(case)]  # failures, errors, skips
    assert cases, done.stdout + done.stderr
    if failed or done.returncode:
        text = "\n".join([f"{len(failed)} of {len(cases)}: {', '.join(failed)}", done.stdout])
        pytest.fail(text + done.stderr, pytrace=False)
