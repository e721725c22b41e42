"""What every training has in common: batches, schedule, checkpoints, resuming, early stopping."""

from .compilation import compiled
from .execution import PRECISIONS, Execution
from .loop import Log, LoopOptions, TrainingFailed, TrainingResult, train
from .states import load_tensors, save_tensors, seed_everything

__all__ = [
    "PRECISIONS",
    "Execution",
    "Log",
    "LoopOptions",
    "TrainingFailed",
    "TrainingResult",
    "compiled",
    "load_tensors",
    "save_tensors",
    "seed_everything",
    "train",
]
