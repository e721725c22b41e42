"""The backbones that a teacher can be trained on, by name, and teachers as files."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sidmlp.data import TokenSpec
from sidmlp.training import load_tensors, save_tensors

from .causal import CAUSAL_BACKBONES, CausalConfig, CausalTeacher
from .generative import GenerativeTeacher
from .model import Teacher, TeacherConfig

T5 = "t5"
BACKBONES = (T5, *CAUSAL_BACKBONES)


def make_teacher(backbone: str, tokens: TokenSpec, **sizes: Any) -> GenerativeTeacher:
    """An untrained teacher on a backbone of BACKBONES.

    sizes: fields of ``TeacherConfig`` ("t5") or ``CausalConfig``. Raises ValueError for an unknown
    backbone and for sizes that it does not have or that do not fit.
    """
    if backbone not in BACKBONES:
        raise ValueError(
            f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}; another model "
            f"plugs in as a sidmlp.teacher.Distillable"
        )
    config = TeacherConfig if backbone == T5 else CausalConfig
    unknown = sorted(set(sizes) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(
            f"backbone: expected sizes that {backbone} has, got {', '.join(unknown)}; leave it out"
        )
    if backbone == T5:
        return Teacher(TeacherConfig(**sizes), tokens)
    return CausalTeacher(CausalConfig(backbone, **sizes), tokens)


def write_teacher(path: Path, teacher: GenerativeTeacher) -> None:
    """Writes backbone, sizes, vocabulary and weights, atomically."""
    config = {"backbone": T5, **asdict(teacher.config)}
    tokens = {"codes_per_level": list(teacher.codes_per_level), **teacher.tokens.as_dict()}
    save_tensors(path, {"config": config, "tokens": tokens, "weights": teacher.state_dict()})


def read_teacher(
    path: str | os.PathLike[str], tokens: TokenSpec | None = None
) -> GenerativeTeacher:
    """Reads what ``write_teacher`` wrote, in evaluation mode, on the CPU.

    tokens: the vocabulary that it must have, and which a file that does not say has. Raises
    ValueError for a file that is missing, damaged or of another vocabulary.
    """
    path = Path(path)
    saved = load_tensors(path)
    try:
        own = saved.get("tokens")
        if own is not None:
            found = TokenSpec.from_dict(own)
        elif tokens is not None:
            found = tokens
        else:
            raise ValueError(f"{path} does not say which vocabulary it has; pass tokens=")
        if tokens not in (None, found):
            raise ValueError(
                f"{path}: expected a teacher of {tokens}, got one of {found}; train it again"
            )
        # Files of before there was a choice do not name the T5.
        teacher = make_teacher(**{"backbone": T5, **saved["config"]}, tokens=found)
        teacher.load_state_dict(saved["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} does not hold a teacher ({reason}); train it again") from None
    return teacher.eval()
