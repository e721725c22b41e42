"""A run's exported student behind sidmlp_kernels, and its teacher that orders the proposals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_directory import RunDirectory

if TYPE_CHECKING:
    from sidmlp.teacher import GenerativeTeacher
    from sidmlp.teacher.scoring import Score
    from sidmlp.training import Execution


def served_student(directory: RunDirectory, execution: Execution) -> tuple[Any, Path]:
    """The Recommender of the student that is exported, and its checkpoint.

    execution: its device, and bfloat16 if its precision is bf16, float32 otherwise.
    """
    import torch

    from .artifacts import load_served

    checkpoint = directory.exported()
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    return load_served(checkpoint, directory, device=execution.device, dtype=dtype), checkpoint


def rescoring(model: Any, checkpoint: Path, teacher: GenerativeTeacher) -> Callable[[Any], Score]:
    """batch -> ``rescore`` of ``model.decode`` for it; the teacher is moved to the model's device.

    The teacher reads the states that the student reads where those are its own and enough for it,
    else the histories.
    """
    from sidmlp.teacher import CandidateModel, CandidateScorer

    from .artifacts import encoder_kind

    scorer = CandidateScorer(teacher.to(model.device).eval())
    # The states are the teacher's own only where the checkpoint has the teacher's encoder.
    if isinstance(teacher, CandidateModel) and encoder_kind(checkpoint) == "t5":
        return lambda batch: scorer
    return lambda batch: scorer.of_requests(batch.ids, batch.mask)
