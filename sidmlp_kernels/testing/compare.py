"""Comparing results: bits, and errors bounded by those of ordinary PyTorch.

    max|kernel - exact| <= 2 max|same dtype - exact| + floor

`same dtype` is the same formula in ordinary PyTorch in the dtype of the kernel's weights. The floor
is what one addition and subtraction of a constant costs in that dtype: without it a lucky
PyTorch result (an error of 0, say) would ask for the impossible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESULT_NAMES = ("items", "scores", "codes", "counts")


def rounding_floor(exact: Tensor, dtype: torch.dtype) -> float:
    """2 max|(x + 0.3 - 0.3) - x| of the finite values x of `exact`, rounded to `dtype`."""
    x = exact[exact.isfinite()].to(dtype)
    if not x.numel():
        return 0.0
    return 2 * float(((x + 0.3 - 0.3) - x).abs().max().double())


def assert_bounded(
    got: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    *,
    dtype: torch.dtype,
    what: str,
    where: object,
) -> None:
    """AssertionError unless `got` is as close to float64 `exact` as the module docstring demands.

    same_dtype: ordinary PyTorch's result in `dtype`. what, where: for the message (what was
    computed; problem, backend). Non-finite values must stand where `exact` has the very same.
    """
    assert got.shape == exact.shape == same_dtype.shape, (
        f"{what}: shapes {list(got.shape)}, {list(same_dtype.shape)} and {list(exact.shape)} "
        f"differ ({where})"
    )
    got, same_dtype, exact = got.detach().cpu().double(), same_dtype.cpu().double(), exact.cpu()
    finite = exact.isfinite()
    equal = torch.where(finite, got.isfinite(), (got == exact) | (got.isnan() & exact.isnan()))
    if not bool(equal.all()):
        raise AssertionError(
            f"{what}: {int((~equal).sum())} values are finite on one side alone; "
            f"{_first(~equal, got, exact)} ({where})"
        )
    zero = torch.zeros_like(exact)
    error = torch.where(finite, got - exact, zero).abs()
    allowance = torch.where(finite, same_dtype - exact, zero).abs()
    theirs, floor = _largest(allowance), rounding_floor(exact, dtype)
    bound = 2 * theirs + floor
    if not _largest(error) <= bound:
        bad = error > bound
        raise AssertionError(
            f"{what}: error {_largest(error):.3e} exceeds {bound:.3e} = 2 x {theirs:.3e} "
            f"(PyTorch {dtype}) + {floor:.3e} (rounding floor), {int(bad.sum())} of {bad.numel()} "
            f"values of {list(got.shape)}; {_first(bad, got, exact)} ({where})"
        )


def assert_results_equal(
    got: Sequence[Tensor], wanted: Sequence[Tensor], *, where: object, wanted_is: str = "wanted"
) -> None:
    """AssertionError unless items, scores, codes and counts have the same dtypes, shapes and bits.

    Both in the order of the operators' results. wanted_is: what `wanted` is, for the message.
    """
    for name, left, right in zip(RESULT_NAMES, got, wanted, strict=True):
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (left, right)]
        assert kinds[0] == kinds[1], f"{name}: {kinds[0]}, {wanted_is} {kinds[1]} ({where})"
        left, right = left.detach().cpu(), right.detach().cpu()
        if left.dtype == torch.float32:  # as bits: -0 is not +0, and a NaN equals itself
            differ = left.contiguous().view(torch.int32) != right.contiguous().view(torch.int32)
        else:
            differ = left != right
        if bool(differ.any()):
            raise AssertionError(
                f"{name}: {int(differ.sum())} of {differ.numel()} values differ from {wanted_is}; "
                f"{_first(differ, left, right)} ({where})"
            )


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _first(bad: Tensor, got: Tensor, wanted: Tensor) -> str:
    at = tuple(bad.nonzero()[0].tolist())
    return f"first at {list(at)}: got {got[at].item()!r}, wanted {wanted[at].item()!r}"
