"""What ``sidmlp.training.train`` says of every epoch: a JSON file, and TensorBoard.

A training that goes on where it was interrupted goes on in the same files; one that begins anew
replaces them.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from sidmlp.data.files import read_json, write_json

# Keys of the training loop's facts -> names in TensorBoard.
SCALARS = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "score": "validation NDCG@10",
    "seconds": "seconds per epoch",
}


def scalar_names(measure: str) -> dict[str, str]:
    """SCALARS of a training whose scores are ``measure``."""
    return {**SCALARS, "score": f"validation {measure}"}


class TrainingLog:
    """Callable that ``train(log=..)`` takes: keeps the numbers of every epoch.

    path          JSON list of the epochs' facts; a number that is not finite is left out
    tensorboard   directory of TensorBoard event files; None writes none
    measure       what the scores are

    Raises ModuleNotFoundError at once where ``tensorboard`` is asked for and not installed.
    """

    def __init__(
        self, path: Path, tensorboard: Path | None = None, measure: str = "NDCG@10"
    ) -> None:
        self.path, self.tensorboard = path, tensorboard
        self._tags = scalar_names(measure)
        self._writer: Any = None
        self._make_writer = None if tensorboard is None else summary_writer()

    def __call__(self, facts: dict[str, float]) -> None:
        """Takes an epoch's facts: ``epoch`` and any of SCALARS."""
        epoch = int(facts["epoch"])
        known = {name: float(value) for name, value in facts.items() if math.isfinite(value)}
        earlier = [] if epoch == 1 else read_log(self.path)
        write_json(self.path, [*(past for past in earlier if past["epoch"] < epoch), known])
        if self._make_writer is not None:
            self._write(epoch, facts)

    def _write(self, epoch: int, facts: dict[str, float]) -> None:
        if self._writer is None:
            assert self._make_writer is not None
            assert self.tensorboard is not None
            if epoch == 1:
                shutil.rmtree(self.tensorboard, ignore_errors=True)
            # What an interrupted training wrote of this epoch is superseded.
            self._writer = self._make_writer(str(self.tensorboard), purge_step=epoch)
        for name, tag in self._tags.items():
            if name in facts:
                self._writer.add_scalar(tag, facts[name], epoch)
        self._writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file; the log can be used again all the same."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def summary_writer() -> Any:
    """``torch.utils.tensorboard.SummaryWriter``; ModuleNotFoundError names what is missing."""
    import tensorboard  # noqa: F401 - its absence by its own name; torch words it otherwise
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def read_log(path: Path) -> list[dict[str, float]]:
    """The epochs that a ``TrainingLog`` left, in order; empty where there is no file.

    Raises ValueError for a file of anything else.
    """
    if not path.is_file():
        return []
    epochs = read_json(path)
    if not isinstance(epochs, list) or any(
        not isinstance(facts, dict) or "epoch" not in facts for facts in epochs
    ):
        raise ValueError(f"{path} is no list of epochs; delete it and train again")
    return epochs
