"""The release's files with small random models, and what its models compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_student_official import Published as PublishedStudent
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

CODES = (5, 7, 6)
DIM, LEVELS = 12, len(CODES)
VOCABULARY = 1 + sum(CODES) + 2  # padding, codes, one user token, the end
ITEMS = {
    "B00A": [0, 0, 1],
    "B00B": [0, 0, 2],
    "0C": [4, 6, 1],
    "B00D": [0, 3, 1],
    "B00E": [4, 6, 5],
    "B00F": [2, 2, 1],
}


def tiger(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """A T5 as the release configures it, small, with weights that tell every token apart."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "d_model": DIM, "d_kv": 6, "d_ff": 20}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
    names = {"pad_token_id": 0, "eos_token_id": VOCABULARY - 1, "decoder_start_token_id": 0}
    config = T5Config(**{**sizes, **layers, **names, "feed_forward_proj": "relu", **changes})
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name == "shared.weight" else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    return model


class PublishedEncoder(nn.Module):
    """A module whose state dict has the published names, computing the paper's equations."""

    def __init__(self, hidden: int = 10, layers: int = 2, positions: int = 70) -> None:
        super().__init__()
        self.pos_embed = nn.Embedding(positions, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Linear(2 * DIM, hidden),
                    nn.LayerNorm(hidden),
                    nn.GELU(),
                    nn.Dropout(0.1),
                    nn.Linear(hidden, DIM),
                )
                for _ in range(LEVELS)
            )
            for _ in range(layers)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.eval()

    def forward(self, embedded: Tensor) -> Tensor:
        """Raw embeddings [T, D] of one request without padding -> states [T, D]."""
        x = embedded + self.pos_embed.weight[: len(embedded)]
        for roles in self.layers:
            mean = x.mean(dim=0)
            special = (0, len(x) - 1)
            chosen = [LEVELS - 1 if t in special else (t - 1) % LEVELS for t in range(len(x))]
            moved = [roles[r](torch.cat([x[t], mean])) for t, r in enumerate(chosen)]
            x = x + torch.stack(moved)
        return self.norm(x)


def save_teacher(path: Path, model: nn.Module) -> Path:
    torch.save({f"t5.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return path


def save_student(path: Path, table: Tensor, kind: str = "SID-MLP", seed: int = 3) -> Path:
    torch.manual_seed(seed)
    student = PublishedStudent(CODES, dim=DIM, blocks=2, rows=2)
    with torch.no_grad():
        student.embedding.weight.copy_(table)
    args = {"num_heads": 4, "head_layers": 2, "attn_dim": 16, "dropout": 0.1, "tag": None}
    args["encoder_ckpt"] = "/data/encoder.pth" if kind == "SID-MLP++" else None
    content = {"epoch": 9, "model_state_dict": student.state_dict(), "args": args}
    torch.save(content | {"model_type": kind}, path)
    return path


def save_ids(path: Path, items: Any = ITEMS) -> Path:
    path.write_text(items if isinstance(items, str) else json.dumps(items))
    return path


def save_all(directory: Path, teacher: T5ForConditionalGeneration) -> dict[str, Path]:
    """The release's files and the options that name them; those without -- are not always named."""
    torch.manual_seed(5)
    torch.save(PublishedEncoder().state_dict(), directory / "encoder.pth")
    table = teacher.shared.weight.detach()
    return {
        "--semantic-ids": save_ids(directory / "a.sem_ids"),
        "--teacher": save_teacher(directory / "tiger.pth", teacher),
        "--student": save_student(directory / "student.pth", table),
        "plus": save_student(directory / "plus.pth", table, "SID-MLP++"),
        "encoder": directory / "encoder.pth",
    }


def token_batch(histories: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask by the release's numbering, right padded with 0."""
    starts = np.cumsum([1, *CODES])[:-1]
    rows = []
    for history in histories:
        codes = [np.asarray(ITEMS[item]) + starts for item in history]
        rows.append([VOCABULARY - 2, *np.concatenate(codes).tolist(), VOCABULARY - 1])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, ids != 0


HISTORIES = [["B00A", "0C", "B00F"], ["B00E"], ["B00D", "B00B", "B00B", "B00A", "0C"]]
