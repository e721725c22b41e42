"""What a training and an evaluation leave for people: logs, curves, tables."""

from .training_log import TrainingLog, read_log

__all__ = ["TrainingLog", "read_log"]
