"""What a model must hand over so that a student can be distilled from it: states and logits.

    tokens          the TokenSpec that makes its token ids
    dim             D, the width of its states
    teacher_forced  (ids, mask, codes) -> states and logits of every level
    code_embeddings a matrix of every level's codes

Both teachers here are such models; docs/teachers.md brings one of somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from sidmlp.data import TokenSpec

MEMBERS = ("tokens", "dim", "teacher_forced", "code_embeddings")


class Distillable(Protocol):
    """A frozen model whose states a student shall read and whose probabilities it shall learn.

    It is asked in evaluation mode, without gradients, with tensors on its own device: that of its
    ``device`` if it has one, else of its first parameter. No randomness, and nothing of one user in
    another's numbers. An ``nn.Module`` is switched to evaluation mode by itself.
    """

    @property
    def tokens(self) -> TokenSpec:
        """How histories become token ids, and how many codes every level has."""

    @property
    def dim(self) -> int:
        """D, the width of its states."""

    def teacher_forced(
        self, ids: Tensor, mask: Tensor, codes: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """States, floating [B, T, D], and per level l logits, floating [B, N, C_l], of the level's
        own codes given the history and c_1 .. c_{l-1}.

        ids int64 [B, T], mask bool [B, T] (True = valid), codes int64 [B, N, L], 0-based. One state
        a token; those where the mask is False are never read. A number added to all logits of a
        level changes nothing, so log-probabilities will do.
        """

    def code_embeddings(self) -> Sequence[Tensor]:
        """Per level, floating [C_l, E]: what a student knows a code by, and keeps as it is."""


def check_distillable(model: Distillable) -> None:
    """ValueError unless ``model`` has what ``Distillable`` names, in the right shapes."""
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"teacher: expected {', '.join(MEMBERS)}, got {type(model).__name__} without "
            f"{', '.join(missing)}; see sidmlp.teacher.Distillable"
        )
    sizes = model.tokens.codes_per_level
    tables = list(model.code_embeddings())
    shapes = [list(table.shape) for table in tables]
    width = tables[0].shape[-1] if tables else 0
    if shapes != [[size, width] for size in sizes] or width < 1:
        raise ValueError(
            f"code_embeddings: expected a matrix [C_l, E] for each of {list(sizes)} codes, got "
            f"shapes {shapes}; return a row for every code, of one width"
        )


def device_of(model: object) -> torch.device:
    """Where a model wants its tensors."""
    named = getattr(model, "device", None)
    if named is not None:
        return torch.device(named)
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def place(model: object, device: torch.device) -> None:
    """Moves an ``nn.Module``; anything else stays where its ``device`` says."""
    if isinstance(model, nn.Module):
        model.to(device)


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Evaluation mode and no gradients for a while, of whatever is an ``nn.Module``."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def taught(
    model: Distillable, ids: Tensor, mask: Tensor, codes: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """``teacher_forced`` on the model's device, its answer checked and left there.

    ids int64 [B, T], mask bool [B, T], codes int64 [B, N, L] of any device. Raises ValueError for
    shapes that are not the ones asked for.
    """
    device = device_of(model)
    states, logits = model.teacher_forced(ids.to(device), mask.to(device), codes.to(device))
    wanted = [*ids.shape, model.dim]
    if list(states.shape) != wanted or not states.is_floating_point():
        raise ValueError(
            f"teacher_forced: expected floating states {wanted}, one for each token, got "
            f"{states.dtype} {list(states.shape)}; return users, tokens, width"
        )
    shapes = [[*codes.shape[:2], size] for size in model.tokens.codes_per_level]
    got = [list(values.shape) for values in logits]
    if got != shapes or not all(values.is_floating_point() for values in logits):
        raise ValueError(
            f"teacher_forced: expected floating logits {shapes}, of each level's own codes, got "
            f"{[str(values.dtype) for values in logits]} {got}; return users, targets, codes"
        )
    return states, list(logits)
