"""What every training has in common: batches, schedule, checkpoints, resuming, early stopping."""

from .loop import LoopOptions, TrainingFailed, TrainingResult, train
from .states import load_tensors, save_tensors, seed_everything

__all__ = [
    "LoopOptions",
    "TrainingFailed",
    "TrainingResult",
    "load_tensors",
    "save_tensors",
    "seed_everything",
    "train",
]
