"""Progress bars that stay out of the way where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

_BYTES_PER_UPDATE = 1 << 18  # an update a line would cost as much as reading the line


def bar(items: Sequence[T], label: str, show: bool = True) -> tqdm[T]:
    """Iterates over ``items`` behind a bar that vanishes when done; no bar outside a terminal."""
    from tqdm import tqdm  # here, so that who shows no bar needs no tqdm

    return tqdm(items, desc=label, leave=False, disable=None if show else True)


def lines_with_bar(lines: Iterable[str], size: int, label: str) -> Iterator[str]:
    """The lines of a text of about ``size`` bytes behind such a bar."""
    from tqdm import tqdm

    seen = 0
    with tqdm(
        total=size, desc=label, leave=False, disable=None, unit="B", unit_scale=True
    ) as progress:
        for line in lines:
            seen += len(line)
            if seen >= _BYTES_PER_UPDATE:
                progress.update(seen)
                seen = 0
            yield line
