"""What is installed, what was built, what runs here, and why not: for people and bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__
from .backends import BACKENDS, DTYPES, resolve, why_not
from .ops.cuda_kernels import tensor_cores_why_not
from .ops.library import LIBRARY_DIR
from .spec import PUBLISHED, DecodeSpec
from .trie import host_library

PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "triton", "transformers")


def report() -> str:
    """Versions, libraries, processor, GPUs, and for each backend whether it runs, as text."""
    sections = (
        ("versions", _versions()),
        ("libraries", _libraries()),
        ("processor", _processor()),
        ("CUDA", _cuda()),
        ("backends", _backends()),
    )
    lines = []
    for title, content in sections:
        lines += [title, *(f"  {line}" for line in content)]
    return "\n".join(lines)


def healthy() -> bool:
    """Whether some backend can run a student of the published sizes."""
    return any(not why_not(backend.name, PUBLISHED) for backend in BACKENDS)


def _versions() -> Iterator[str]:
    yield f"sidmlp_kernels {__version__} in {Path(__file__).parent}"
    yield f"python {sys.version.split()[0]} in {sys.executable}"
    for name in PACKAGES:  # read from metadata: nothing is imported
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} not installed"


def _libraries() -> Iterator[str]:
    try:
        host = host_library()
    except ImportError as error:
        yield f"_host: {error}"
    else:
        yield f"_host: {host.__file__}"
        yield "built with " + ", ".join(
            f"{name} {value}"
            for name, value in host.build_info().items()
            if name != "instruction_sets"
        )
    files = sorted(LIBRARY_DIR.glob("libsidmlp_*.so"))
    yield from (f"{file.name}: {file}" for file in files)
    if not files:
        yield f"no operator library in {LIBRARY_DIR}; build with pip install --no-build-isolation ."


def _processor() -> Iterator[str]:
    yield f"{platform.machine()}, {torch.get_num_threads()} threads"
    try:
        found = host_library().build_info()["instruction_sets"]
        yield "instruction sets: " + (", ".join(found) or "none beyond the base")
    except ImportError:
        yield "instruction sets: unknown without the _host library"


def _cuda() -> Iterator[str]:
    if torch.version.cuda is None:
        yield "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        yield f"torch is built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
    else:
        yield f"torch is built for CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = gpu.total_memory / 2**30
            yield f"cuda:{index} {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"


def _backends() -> Iterator[str]:
    beams = DecodeSpec.for_levels(PUBLISHED.num_levels).num_beams
    sizes = f"published sizes, {beams} beams"
    for backend in BACKENDS:
        for name in DTYPES:
            reason = why_not(backend.name, PUBLISHED, dtype=name, num_beams=beams)
            verdict = f"no: {reason}" if reason else f"yes{_kernel(backend.name, name, beams)}"
            yield f"{backend.name}, {sizes}, {name}: {verdict}"
    for name in DTYPES:
        try:
            choice = resolve("auto", dtype=name, spec=PUBLISHED, num_beams=beams)
        except ValueError:
            yield f"auto, {sizes}, {name}: none"
        else:
            yield f"auto, {sizes}, {name}: {choice.backend.name}, chosen {choice.reason}"


def _kernel(backend: str, dtype: str, beams: int) -> str:
    """Which of its two kernels the CUDA backend would take."""
    if backend != "cuda":
        return ""
    plain = tensor_cores_why_not(PUBLISHED, DTYPES[dtype], beams)
    return f", plain kernel ({plain})" if plain else ", tensor cores"
