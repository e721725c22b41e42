"""Another model's order of the items that a student proposes.

    states, mask --decode_states--> N = num_beams items --rescore--> scores --sort--> k items

The student finds the candidates, which would cost another model a beam search; that model then only
scores them, all in one forward. Nothing here knows it: it is a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .decode_arguments import check_tensor
from .ops.library import Results

Rescore = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(states, mask, codes, counts) -> scores, for B requests with N = num_beams candidates each.

states  [B, T, D] the student's encoder states, in the dtype that its encoder gives, and
mask    bool [B, T], True = valid; masked states are whatever lies there, NaN too
codes   int32 [B, N, L] semantic IDs of the candidates, the student's best first, -1 past counts
counts  int32 [B] how many of the N are real
scores  [B, N] of a floating dtype on the same device: higher is better, -inf comes last, what
        stands past counts is not read

Called once a decode, under torch.no_grad, on the current stream, from as many threads as decode;
not for an empty batch. It must not change what it is given, nor let a request's scores depend on
the others of its batch.
"""

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_rescore(rescore: object) -> None:
    """ValueError unless it can be called."""
    if not callable(rescore):
        raise ValueError(
            "rescore: expected None or a callable (states, mask, codes, counts) -> scores, got "
            f"{type(rescore).__name__}; see sidmlp_kernels.rescoring.Rescore"
        )


def rescored(results: Results, k: int, rescore: Rescore, states: Tensor, mask: Tensor) -> Results:
    """The k best of `results`, N candidates a request, in the order of `rescore`.

    Ties keep the order that they have. Items on one semantic ID are one candidate to a model that
    reads codes: all of them get the score of the first, so that they stay together even where the
    same row twice in a matrix product differs in its last bit.

    Raises ValueError for scores of a wrong type, dtype, shape or device and, after waiting for the
    device, for NaN; what the callable raises passes.
    """
    items, _, codes, counts = results
    batch, candidates, _ = codes.shape
    if batch == 0:
        return _first(results, k)
    with torch.no_grad():
        scores = rescore(states, mask, codes, counts)
    check_tensor(scores, "rescore's scores", _FLOATS, (batch, candidates), items.device)
    scores = scores.detach()
    rank = torch.arange(candidates, device=items.device)
    real = rank < counts[:, None]
    _refuse_nan(scores, real, codes)

    begins = torch.ones_like(real)
    begins[:, 1:] = (codes[:, 1:] != codes[:, :-1]).any(dim=2)
    leader = torch.where(begins, rank, 0).cummax(dim=1).values
    # Padding stands behind the real ones already, and the sort is stable.
    scores = scores.gather(1, leader).masked_fill(~real, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    of_codes = order[..., None].expand_as(codes)
    ranked = (
        items.gather(1, order),
        scores.gather(1, order).float(),
        codes.gather(1, of_codes),
        counts,
    )
    return _first(ranked, k)


def _first(results: Results, k: int) -> Results:
    items, scores, codes, counts = results
    return (
        items[:, :k].contiguous(),
        scores[:, :k].contiguous(),
        codes[:, :k].contiguous(),
        counts.clamp(max=k),
    )


def _refuse_nan(scores: Tensor, real: Tensor, codes: Tensor) -> None:
    wrong = scores.isnan() & real
    if not bool(wrong.any()):
        return
    request, candidate = (int(i) for i in wrong.nonzero()[0])
    raise ValueError(
        "rescore: expected a number for every candidate, got NaN for request "
        f"{request}, candidate {candidate} with codes {codes[request, candidate].tolist()} "
        f"({int(wrong.sum())} NaN in {int(wrong.any(dim=1).sum())} requests); masked states and "
        "codes of -1 past counts must not reach a score"
    )
