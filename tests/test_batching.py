"""Histories -> token ids and mask, against a plain loop over tokens, and every wrong input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidmlp_kernels.batching import Batch, flatten_ids, make_batch
from sidmlp_kernels.known_items import KnownItems
from sidmlp_kernels.spec import TokenSpec

CODES_PER_LEVEL = (5, 3, 7)
ITEM_IDS = [10, 7, 900, 31, 4, 1_000_000]
CODES = [[0, 1, 6], [4, 2, 0], [3, 0, 3], [1, 1, 1], [2, 2, 5], [4, 0, 2]]
KNOWN = KnownItems(ITEM_IDS, CODES)
TOKENS = TokenSpec.for_codes(CODES_PER_LEVEL, num_user_tokens=4, max_items=3)


def loop(histories, tokens: TokenSpec, users=None) -> tuple[list, list]:
    """The definition, one token at a time."""
    rows = []
    for r, history in enumerate(histories):
        user = users[r] if users is not None and users[r] is not None else 0
        row = [tokens.user_offset + user % tokens.num_user_tokens]
        for item in list(history)[-tokens.max_items :]:
            codes = CODES[ITEM_IDS.index(item)]
            row += [o + c for o, c in zip(tokens.code_offsets, codes, strict=True)]
        rows.append([*row, tokens.eos_id])
    longest = max((len(row) for row in rows), default=2)
    ids = [row + [tokens.pad_id] * (longest - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    return ids, mask


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(ITEM_IDS), max_size=8), max_size=6),
    st.booleans(),
    st.sampled_from([TOKENS, TokenSpec((10, 20, 30), 1, 99, pad_id=3, max_items=2)]),
)
def test_equals_the_loop_over_tokens(histories, with_users: bool, tokens: TokenSpec) -> None:
    users = [None if r % 3 == 2 else 7 * r for r in range(len(histories))] if with_users else None
    batch = make_batch(histories, KNOWN, tokens, users=users)
    ids, mask = loop(histories, tokens, users)
    assert batch.ids.tolist() == ids
    assert batch.mask.tolist() == mask
    assert batch.ids.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert len(batch) == len(histories)


def test_the_written_example() -> None:
    """User token 16, item 10 = codes 0, 1, 6 at offsets 1, 6, 9, end token 20."""
    batch = make_batch([[10], []], KNOWN, TOKENS)
    assert batch.ids.tolist() == [[16, 1, 7, 15, 20], [16, 20, 0, 0, 0]]
    assert batch.mask.tolist() == [[True] * 5, [True, True, False, False, False]]


def test_every_kind_of_sequence_gives_the_same_batch() -> None:
    wanted = make_batch([[10, 7], [900, 4]], KNOWN, TOKENS)
    for histories in (
        ((10, 7), (900, 4)),
        np.array([[10, 7], [900, 4]], np.int32),
        torch.tensor([[10, 7], [900, 4]]),
        [np.array([10, 7]), torch.tensor([900, 4])],
        [np.array([10, 7], np.uint16), [900, 4]],
        [[np.int64(10), 7], (900, 4)],
        iter([[10, 7], [900, 4]]),
    ):
        batch = make_batch(histories, KNOWN, TOKENS)
        assert torch.equal(batch.ids, wanted.ids)
        assert torch.equal(batch.mask, wanted.mask)


def test_no_requests_at_all() -> None:
    for histories in ([], np.empty((0, 5), np.int64)):
        batch = make_batch(histories, KNOWN, TOKENS)
        assert batch.ids.shape == batch.mask.shape == (0, 2)


def test_unknown_items_are_named_with_their_request_or_dropped() -> None:
    histories = [[10], [7, 55, 10, -1], [55]]
    with pytest.raises(ValueError, match=r"histories\[1\].*unknown item ids 55, -1 .*drop"):
        make_batch(histories, KNOWN, TOKENS)
    dropped = make_batch(histories, KNOWN, TOKENS, unknown="drop")
    wanted = make_batch([[10], [7, 10], []], KNOWN, TOKENS)
    assert torch.equal(dropped.ids, wanted.ids)
    assert torch.equal(dropped.mask, wanted.mask)


def test_dropped_items_take_no_place_among_the_newest() -> None:
    kept = make_batch([[10, 7, 900, 55, 56]], KNOWN, TOKENS, unknown="drop")
    assert torch.equal(kept.ids, make_batch([[10, 7, 900]], KNOWN, TOKENS).ids)


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([10, 7], r"histories\[0\]: expected a sequence of item ids, got 10"),
        ("10", r"histories: expected one sequence of item ids per request, got str"),
        (None, r"histories: .* got NoneType"),
        ({0: [10]}, r"histories: .* got dict"),
        ([[10], "7"], r"histories\[1\]"),
        ([[10], None], r"histories\[1\]"),
        ([[10], [7.0]], r"histories\[1\]: expected integers"),
        ([[10], ["7"]], r"histories\[1\]: expected integers"),
        ([[True, False]], r"histories\[0\]: expected integers"),
        ([[10], [True, 7]], r"histories\[1\]: expected integers, got booleans"),
        ([[10], (7, np.True_)], r"histories\[1\]: expected integers, got booleans"),
        ([[10], np.array([True])], r"histories\[1\]: expected integers, got dtype bool"),
        ([[10], [[7]]], r"histories\[1\]"),
        ([[10], [2**63]], r"histories\[1\]"),
        ([[10], [2**70]], r"histories\[1\]"),
        ([[10], {7}], r"histories\[1\]"),
        (torch.tensor([[10.0]]), "histories: expected integers"),
        (torch.tensor([10, 7]), r"histories\[0\]"),
        (np.zeros((1, 1, 1), np.int64), r"histories\[0\]"),
    ],
)
def test_wrong_histories_are_value_errors(histories, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch(histories, KNOWN, TOKENS)


@pytest.mark.parametrize(
    "users", [[1], [1, 2, 3], [1, -2], [1, 2.5], [True, 5], "ab", 3, [[1], [2]]]
)
def test_wrong_users_are_value_errors(users) -> None:
    with pytest.raises(ValueError, match="users: expected"):
        make_batch([[10], [7]], KNOWN, TOKENS, users=users)


def test_wrong_unknown_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown: expected 'raise' or 'drop', got 'skip'"):
        make_batch([[10]], KNOWN, TOKENS, unknown="skip")


def test_exclusions_may_be_none_per_request() -> None:
    flat, lengths = flatten_ids([[3, 1], None, []], "exclude", none_is_empty=True)
    assert flat.tolist() == [3, 1]
    assert lengths.tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), r"ids: expected .*int64.*float32"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), "mask: expected .*bool"),
        (torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool), r"ids: .*\[6\]"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 4, dtype=torch.bool),
            "mask: expected the shape",
        ),
        ([[1]], [[True]], "ids: expected .* got list"),
    ],
)
def test_a_batch_checks_itself(ids, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(ids, mask)


class TestVocabulary:
    MASK = torch.ones(1, 3, dtype=torch.bool)

    def test_made_from_histories_it_fits_its_tokens(self) -> None:
        for histories in ([[10, 7], []], []):
            batch = make_batch(histories, KNOWN, TOKENS)
            batch.check_vocabulary(TOKENS.vocab_size)
            with pytest.raises(ValueError, match=f"got {TOKENS.eos_id}"):
                batch.to("cpu").check_vocabulary(TOKENS.vocab_size - 1)

    @pytest.mark.parametrize(("ids", "got"), [([0, 9, 3], "9"), ([-1, 8, 3], "-1")])
    def test_made_by_hand_it_is_read(self, ids: list[int], got: str) -> None:
        batch = Batch(torch.tensor([ids]), self.MASK)
        for same in (batch, batch.to("cpu")):
            with pytest.raises(ValueError, match=rf"token ids 0\.\.8, .* got {got}; make batches"):
                same.check_vocabulary(9)

    def test_none_is_outside_an_empty_one(self) -> None:
        Batch(torch.zeros(0, 3, dtype=torch.int64), self.MASK[:0]).check_vocabulary(1)
