"""Loading and saving what a run directory holds: data, codes, teacher, student."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sidmlp.data import Interactions, TokenSpec
from sidmlp.data.files import read_json, sha256_of_bytes, write_atomically
from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sidmlp.student import Student, StudentConfig
from sidmlp.teacher import GenerativeTeacher, read_teacher, write_teacher
from sidmlp.training import load_tensors, save_tensors

from .run_directory import RunDirectory


def load_data(run: RunDirectory) -> Interactions:
    """The item sequences that ``sidmlp data`` left."""
    run.require("data")
    return Interactions.load(run.data)


def data_fingerprint(data: Interactions) -> str:
    """Changes with any interaction or item id."""
    return sha256_of_bytes(data.items.tobytes() + data.offsets.tobytes() + data.item_ids.tobytes())


def save_codes(run: RunDirectory, codes: np.ndarray) -> str:
    """Writes the codes int64 [num_items, L]; returns their fingerprint."""

    def write(path: Path) -> None:
        np.save(path, codes)

    write_atomically(run.codes, write)
    return sha256_of_bytes(codes.tobytes())


def load_codes(run: RunDirectory) -> tuple[np.ndarray, TokenSpec]:
    """The codes int64 [num_items, L] that ``sidmlp tokenize`` left, and the vocabulary."""
    record = run.require("tokenize")
    try:
        codes = np.load(run.codes, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run.codes} is missing or damaged ({error}); tokenize again") from None
    return codes, TokenSpec.for_codes(tuple(record["codes_per_level"]), record["max_items"])


def save_teacher(run: RunDirectory, teacher: GenerativeTeacher) -> None:
    """Writes backbone, sizes and weights of the teacher."""
    write_teacher(run.teacher, teacher)


def load_teacher(run: RunDirectory) -> GenerativeTeacher:
    """The teacher that ``sidmlp train-teacher`` left, in evaluation mode."""
    run.require("train-teacher")
    _, tokens = load_codes(run)
    return read_teacher(run.teacher, tokens)


def save_student(run: RunDirectory, student: Student) -> None:
    """Writes sizes and weights of the student."""
    save_tensors(run.student, {"config": asdict(student.config), "weights": student.state_dict()})


def load_student(run: RunDirectory) -> Student:
    """The student that ``sidmlp distill`` left, in evaluation mode."""
    run.require("distill")
    saved = load_tensors(run.student)
    try:
        student = Student(StudentConfig(**saved["config"]))
        student.load_state_dict(saved["weights"])
    except (KeyError, TypeError, RuntimeError):
        raise ValueError(
            f"{run.student} holds no student; run the command again that made it"
        ) from None
    return student.eval()


def encoder_kind(checkpoint: Path) -> str | None:
    """ "t5", "mlp", or None of an exported student that comes without an encoder."""
    encoder = read_json(checkpoint / "config.json").get("encoder")
    return None if encoder is None else str(encoder["kind"])


def load_served(checkpoint: Path, run: RunDirectory | None, **options: Any) -> Any:
    """A Recommender that serves an exported student; options: of ``sidmlp_kernels.load``.

    Where the checkpoint holds no encoder, the teacher of ``run`` reads the histories; ValueError
    without a run.
    """
    import sidmlp_kernels

    if not (checkpoint / "config.json").is_file() or encoder_kind(checkpoint) is not None:
        return sidmlp_kernels.load(checkpoint, **options)
    if run is None:
        raise ValueError(
            f"{checkpoint} holds no encoder, as its teacher is decoder-only; name the run of that "
            f"teacher with --run"
        )
    teacher = load_teacher(run)
    return sidmlp_kernels.load(
        checkpoint, encoder=lambda ids, mask: teacher.to(ids.device).encode(ids, mask), **options
    )


def save_encoder(run: RunDirectory, encoder: MLPEncoder) -> None:
    """Writes sizes and weights of the encoder that a SID-MLP++ student reads."""
    save_tensors(run.encoder, {"config": asdict(encoder.config), "weights": encoder.state_dict()})


def load_encoder(run: RunDirectory) -> MLPEncoder | None:
    """The student's own encoder, in evaluation mode; None where it reads the teacher's states.

    Raises ValueError for an encoder of an unknown kind, or one that is missing.
    """
    kind = run.require("distill").get("encoder")
    if kind is None:
        return None
    if kind != "mlp":
        raise ValueError(
            f"{run.path / 'distill.json'}: expected the encoder mlp or none, got {kind!r}; run the "
            "command again that made the student"
        )
    try:
        saved = load_tensors(run.encoder)
    except ValueError:
        raise ValueError(
            f"{run.encoder} is missing or damaged; run the command again that made the student"
        ) from None
    encoder = MLPEncoder(MLPEncoderConfig(**saved["config"]))
    encoder.load_state_dict(saved["weights"])
    return encoder.eval()
