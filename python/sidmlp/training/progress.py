"""Progress bars that stay out of the way where nobody watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Sequence[T], label: str, show: bool = True) -> tqdm[T]:
    """Iterates over ``items`` behind a bar that vanishes when done; no bar outside a terminal."""
    return tqdm(items, desc=label, leave=False, disable=None if show else True)
