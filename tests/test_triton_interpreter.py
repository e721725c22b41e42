"""The Triton kernels in Triton's interpreter, in a process that sets TRITON_INTERPRET first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FILES = ("interpreted_triton.py", "interpreted_triton_encoders.py")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(tmp_path: Path, name: str) -> None:
    """Runs every test of the file; names those that fail, with what they said."""
    report = tmp_path / "report.xml"
    options = ["-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / name), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert report.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(report).findall(".//testcase")
    failed = [str(case.get("name")) for case in cases if len(case)]  # failures, errors, skips
    assert cases, done.stdout + done.stderr
    if failed or done.returncode:
        text = "\n".join([f"{len(failed)} of {len(cases)}: {', '.join(failed)}", done.stdout])
        pytest.fail(text + done.stderr, pytrace=False)
