"""Import rules: who may import and include what, and that importing sidmlp_kernels is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidmlp_kernels.__main__ import main

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "sidmlp_kernels").rglob("*.py"))
MODEL = sorted((ROOT / "python" / "sidmlp").rglob("*.py"))
TORCH_FREE = sorted(
    file
    for folder in ("cpu", "cuda", "sidmlp")
    for file in (ROOT / "csrc" / folder).rglob("*")
    if file.suffix in {".h", ".cuh", ".cpp", ".cu", ".inl", ".hpp"}
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )


def test_importing_touches_no_gpu_and_loads_no_heavy_package() -> None:
    """Every module but triton kernels; in a process of its own, where nothing else was imported."""
    names = [
        "sidmlp_kernels."
        + ".".join(file.relative_to(ROOT / "sidmlp_kernels").with_suffix("").parts)
        for file in KERNELS
        if file.name not in {"__init__.py", "__main__.py"} and "triton" not in file.parts
    ]
    heavy = ["triton", "transformers", "sidmlp", "faiss", "huggingface_hub", "matplotlib"]
    code = f"""
import importlib, sys
import torch
before = set(sys.modules)
import sidmlp_kernels
assert not torch.cuda.is_initialized(), "CUDA was initialised"
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
for name in {heavy}:
    assert name not in loaded, name + " was imported"
for name in {names}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not {{"triton", "transformers", "sidmlp"}} & set(sys.modules)
sidmlp_kernels.available_backends()  # asks the GPU, if there is one, and then loads triton
assert not {{"transformers", "sidmlp"}} & set(sys.modules)
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(absolute name of an imported package, whether at the top of the module)."""
    tree = ast.parse(file.read_text())
    at_import_time = set()
    pending: list[ast.AST] = [tree]
    while pending:  # everything outside function bodies runs at import
        node = pending.pop()
        at_import_time.add(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        else:
            continue
        for name in names:
            yield name.split(".")[0], node in at_import_time


@pytest.mark.parametrize("file", KERNELS, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_inference_package_never_imports_the_training_package(file: Path) -> None:
    assert "sidmlp" not in {name for name, _ in imports(file)}
    assert "transformers" not in {name for name, _ in imports(file)}
    if "triton" not in file.parts:
        assert ("triton", True) not in set(imports(file))


@pytest.mark.parametrize("file", MODEL, ids=lambda f: str(f.relative_to(ROOT)))
def test_only_commands_import_the_kernels_and_only_when_they_run(file: Path) -> None:
    found = {top for name, top in imports(file) if name == "sidmlp_kernels"}
    assert True not in found, "imported with the module"
    if found:
        assert file.parent.name == "cli", "imported outside sidmlp/cli"


def test_the_rule_sees_what_it_looks_for(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\nif True:\n    from c import d\ndef f():\n    import e\n    from .g import h\n"
    )
    assert set(imports(file)) == {("a", True), ("c", True), ("e", False)}
    assert KERNELS
    assert MODEL
    assert TORCH_FREE


@pytest.mark.parametrize("file", TORCH_FREE, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_never_include_torch(file: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE)
    forbidden = [name for name in included if re.match(r"(torch|ATen|c10|pybind11|Python)\b", name)]
    assert not forbidden


def test_the_version_is_the_distributions() -> None:
    import sidmlp_kernels

    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated
    assert sidmlp_kernels.__version__ == stated[1]


def test_public_names_exist_and_are_documented() -> None:
    import sidmlp_kernels

    for name in sidmlp_kernels.__all__:
        value = getattr(sidmlp_kernels, name)
        assert name.startswith("__") or value.__doc__, name
    assert (ROOT / "sidmlp_kernels" / "py.typed").exists()


def test_doctor_says_what_runs() -> None:
    result = run("-m", "sidmlp_kernels", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("versions", "torch ", "libsidmlp_cpu.so", "instruction sets", "CUDA", "backends"):
        assert part in result.stdout
    assert "cpu, published sizes, 50 beams, float32: yes" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--help"], "which backends run here"), (["doctor", "--help"], "or why not")],
)
def test_help_explains_itself(arguments: list[str], part: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert part in " ".join(capsys.readouterr().out.split())  # whatever the terminal's width


def test_a_command_is_needed(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_doctor_reports_a_build_that_lacks_everything(monkeypatch, tmp_path: Path) -> None:
    from sidmlp_kernels import backends, doctor

    def no_host():
        raise ImportError("cannot be loaded; build it")

    monkeypatch.setattr(doctor, "host_library", no_host)
    monkeypatch.setattr(doctor, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(backends.library, "load", lambda name: f"{name} is not built")
    text = doctor.report()
    assert "no operator library" in text
    assert "cannot be loaded; build it" in text
    assert "no: cpu is not built" in text
    assert not doctor.healthy()
