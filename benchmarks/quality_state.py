"""Carries quality.py's results between machines: what is finished, small, in few files.

A bundle is a tar file of everything that later stages read and cannot make anew in seconds, cut
into parts of at most PART_BYTES: <experiment>.tar.00, .01, ... A training that is under way is
packed on request, its numbers rounded to half precision, so that it goes on but not bit by bit as
it would have.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sidmlp.data.files import write_atomically
from sidmlp.training import load_tensors, save_tensors

PART_BYTES = (16 << 20) - (1 << 16)
RESULTS = (
    "data.json",
    "tokenize.json",
    "codes.npy",
    "train-teacher.json",
    "teacher.pt",
    "distill.json",
    "student.pt",
    "logs/teacher.json",
    "logs/student.json",
    "plus/distill.json",
    "plus/student.pt",
    "plus/encoder.pt",
    "plus/logs/encoder.json",
    "plus/logs/student.json",
    "stages.json",
    "answers.json",
    "ranks.npz",
    "speed.json",
    "evaluate.json",
    "plus/evaluate.json",
)
PROGRESS = (
    "teacher-progress.pt",
    "student-progress.pt",
    "plus/encoder-progress.pt",
    "plus/student-progress.pt",
)


def halve_weights(path: Path) -> None:
    """Rounds a saved model's float32 weights to float16; ValueError where one would overflow."""

    def half(tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.half()
        if bool((rounded.isinf() & tensor.isfinite()).any()):
            raise ValueError(
                f"{path}: expected weights within float16's range, got {float(tensor.abs().max())}"
            )
        return rounded

    save_tensors(path, _mapped(load_tensors(path), half))


def pack(run: Path, out: Path, name: str, *, progress: bool = False) -> list[Path]:
    """Writes a run directory's bundle into ``out``; the parts, whose older ones are removed."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in RESULTS:
            if (run / member).is_file():
                archive.add(run / member, arcname=member, recursive=False)
        for member in PROGRESS if progress else ():
            if (run / member).is_file():
                small = run / f"{member}.small"
                save_tensors(small, _mapped(load_tensors(run / member), _rounded))
                archive.add(small, arcname=member)
                small.unlink()
    content = buffer.getvalue()
    for old in out.glob(f"{name}.tar.*"):
        old.unlink()
    parts = []
    for number, begin in enumerate(range(0, len(content), PART_BYTES)):
        part = out / f"{name}.tar.{number:02}"
        part.write_bytes(content[begin : begin + PART_BYTES])
        parts.append(part)
    return parts


def unpack(folder: Path, name: str, run: Path) -> bool:
    """Brings a bundle's files into a run directory; False where there is no bundle.

    Raises ValueError where a part is missing or damaged.
    """
    parts = sorted(folder.glob(f"{name}.tar.*"))
    if not parts:
        return False
    numbers = [part.suffix for part in parts]
    content = b"".join(part.read_bytes() for part in parts)
    try:
        if numbers != [f".{n:02}" for n in range(len(parts))]:
            raise tarfile.TarError(f"parts {', '.join(numbers)}")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {entry.name: archive.extractfile(entry) for entry in archive}
            files = {key: file.read() for key, file in members.items() if file is not None}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{folder}/{name}.tar.*: a part is missing or damaged ({error})") from None
    strange = sorted(set(files) - {*RESULTS, *PROGRESS})
    if strange:
        raise ValueError(f"{folder}/{name}.tar.*: holds {strange[0]!r}, no file of an experiment")
    for key, data in files.items():
        write_atomically(run / key, lambda path, data=data: _write(path, data))
        if key in PROGRESS:
            save_tensors(run / key, _mapped(load_tensors(run / key), _widened))
    return True


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every floating tensor of at least one dimension changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() and value.ndim else value
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    # The optimiser's second moments are below float16's range.
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
