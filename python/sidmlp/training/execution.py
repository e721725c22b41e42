"""Where and in which number format a model is trained and asked: device, precision, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PRECISIONS = ("fp32", "bf16")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Execution:
    """Device, precision and compilation.

    precision: "fp32", or "bf16": matrix products in bfloat16 by autocast, while weights, their
    gradients, the optimiser's state and the losses stay fp32. compile: training steps go through
    torch.compile. Raises ValueError for a device that is not here.
    """

    device: torch.device = CPU
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device: expected a GPU that PyTorch can use, got none; use --device cpu, or "
                "install a CUDA build of PyTorch"
            )

    @classmethod
    def choose(
        cls, device: str = "auto", precision: str = "auto", compile: bool | None = None
    ) -> Execution:
        """Of command-line options: "auto" is a GPU if there is one, and on it bf16, elsewhere fp32.

        compile: None is no.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(device)
        if precision == "auto":
            precision = "bf16" if where.type == "cuda" else "fp32"
        return cls(where, precision, bool(compile))

    @property
    def on_gpu(self) -> bool:
        """Training steps are captured as CUDA graphs."""
        return self.device.type == "cuda"

    @property
    def static(self) -> bool:
        """Batches have few shapes: a graph has one, and tensor cores want rows of 16 bytes."""
        return self.on_gpu or self.compile

    def autocast(self) -> torch.autocast:
        """The context in which models run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def as_dict(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one before."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "compile": self.compile,
        }
