"""What must hold of states and items before bench_requests times whoever made them.

States of every valid token of every request are held against the plain encoder in float64, with at
most twice the error of the plain encoder in the dtype of the weights, plus the rounding floor.
Items of a whole request have the bits of a decode of these states, and for the first requests are
what the float64 reference allows (decode_checks); all are items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decode_checks import Judge, Reference, Results, VerificationError
from request_inputs import Encoder
from torch import Tensor

from sidmlp_kernels.testing import assert_results_equal, rounding_floor

# Scores that attention in float64 may store at a time: of 512 requests of 82 tokens, say.
SCORES = 512 * 82 * 82


class StatesJudge:
    """Judges the states [B, T, D] of one batch."""

    def __init__(
        self, encoder: Encoder, ids: Tensor, mask: Tensor, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """encoder: float32 on the CPU; copies of it run where ids are."""
        self._mask = mask
        self._exact = _valid_states(encoder, torch.float64, ids, mask)
        self.bounds = {}
        for dtype in dtypes:
            theirs = _valid_states(encoder, dtype, ids, mask)
            error = float((theirs.double() - self._exact).abs().max())
            # Of a sample on the CPU: the floor is a maximum over like numbers.
            floor = rounding_floor(self._exact[:4096].cpu(), dtype)
            self.bounds[dtype] = 2 * error + floor

    def check(self, name: str, states: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """What to report of right states; VerificationError for wrong ones."""
        shape = (*self._mask.shape, self._exact.shape[-1])
        if tuple(states.shape) != shape:
            raise VerificationError(f"{name}: expected states {shape}, got {tuple(states.shape)}")
        error = float((states[self._mask].double() - self._exact).abs().max())
        bound = self.bounds[dtype]
        if not error <= bound:  # a NaN is not
            raise VerificationError(
                f"{name}: expected states within {bound:.3g} of the plain encoder in float64, got "
                f"an error of {error:.3g}; not timing it"
            )
        return {
            "requests": len(states),
            "max_error": error,
            "bound": bound,
            "mean_square": float(self._exact.square().mean()),
            "invalid_rate": 0.0,
        }


@torch.no_grad()
def _valid_states(encoder: Encoder, dtype: torch.dtype, ids: Tensor, mask: Tensor) -> Tensor:
    """The plain encoder's states [valid tokens, D] in `dtype`."""
    copy = type(encoder).from_weights(encoder.spec, encoder.state_dict()).to(ids.device, dtype)
    rows = max(1, SCORES // max(1, ids.shape[1]) ** 2)
    parts = [
        copy(some, valid)[valid]
        for some, valid in zip(ids.split(rows), mask.split(rows), strict=True)
    ]
    return torch.cat(parts)


def check_items(
    name: str,
    got: Results,
    states: Tensor,
    mask: Tensor,
    decode: Callable[[Tensor, Tensor], Results] | None,
    reference: Reference,
    *,
    k: int,
    num_beams: int,
    dtype: torch.dtype,
    requests: int,
) -> dict[str, Any]:
    """What to report of the right results of whole requests; VerificationError for wrong ones.

    states  that the same participant makes of these requests
    decode  its own decode, whose bits the results must have; None: they need not
    """
    try:
        if decode is not None:
            assert_results_equal(
                got, decode(states, mask), where=name, wanted_is="decode of the states"
            )
    except AssertionError as error:
        raise VerificationError(f"{name}: {error}; not timing it") from error
    some = states[:requests].float().cpu(), mask[:requests].cpu()
    judge = Judge(reference, *some, k=k, num_beams=num_beams, dtypes=(dtype,), requests=requests)
    found = judge.check(name, tuple(tensor[:requests].cpu() for tensor in got), dtype)
    real = got[0][got[0] >= 0].cpu()
    invalid = float((judge.trie.positions(real) < 0).double().mean()) if len(real) else 0.0
    return {**found, "requests": len(got[0]), "invalid_rate": invalid}


def check_same_bits(name: str, first: Any, second: Any) -> None:
    """VerificationError unless two runs left the same bits; states or results."""
    pairs = [(first, second)] if isinstance(first, Tensor) else zip(first, second, strict=True)
    for one, other in pairs:
        if not torch.equal(_bits(one), _bits(other)):
            raise VerificationError(
                f"{name}: expected two runs to leave the same bits, they differ"
            )


def _bits(tensor: Tensor) -> Tensor:
    """As bytes: a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
