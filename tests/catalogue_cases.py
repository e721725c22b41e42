"""What several tests of catalogues share: random ones, their stock, and how an error reads."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from sidmlp_kernels.catalogue import Catalogue

# What every error says: subject, what was expected, what came, and what to do about it.
SENTENCE = re.compile(r"\S.*: .*expected .+, got .+; .+|\S.*: .*expected .+; got .+; .+", re.DOTALL)


def stock_by_id(catalogue: Catalogue) -> dict[int, int]:
    """Item id -> availability, as the kernels see it."""
    *_, ids, available = catalogue.snapshot().trie_tensors("cpu")
    return dict(zip(ids.tolist(), available.tolist(), strict=True))


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, ...]], list[int]]:
    """Codes per level, codes with many collisions, distinct item ids."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 17, 256, 8192]), min_size=1, max_size=8))
    # Few codes of a level in use: shared prefixes and shared tuples abound.
    used = [draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=3)) for c in sizes]
    item = st.tuples(*(st.sampled_from(u) for u in used))
    codes = draw(st.lists(item, min_size=1, max_size=40))
    ids = draw(
        st.lists(
            st.one_of(st.integers(0, 60), st.integers(0, 2**63 - 1)),
            min_size=len(codes),
            max_size=len(codes),
            unique=True,
        )
    )
    return sizes, codes, ids
