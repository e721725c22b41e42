"""MUST and MAY sets: every decode within eps passes, every kind of wrong result is named."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sidmlp.beam import Decoded, beam_decode
from sidmlp.bounds import check_decode, decode_bounds
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie

SIZES = (6, 5, 7)
Prefix = tuple[int, ...]


def make_student(spread: float = 1.0) -> Student:
    """A small spread of logits means many near-ties."""
    torch.manual_seed(0)
    student = Student(StudentConfig(SIZES, 8, 8, 2, 16, 12, 8)).double()
    with torch.no_grad():
        for head in student.heads:
            head.output.weight.mul_(spread)
            head.output.bias.mul_(spread)
    return student


def make_codes(items: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, c, items) for c in SIZES], axis=1)


def make_context(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 8, generator=generator, dtype=torch.float64)


def prefix_scores(
    student: Student, context: torch.Tensor, codes: np.ndarray
) -> dict[Prefix, float]:
    """The exact score of every prefix of the catalogue for one user."""
    children: dict[Prefix, set[int]] = {}
    for row in codes.tolist():
        for level in range(len(row)):
            children.setdefault(tuple(row[:level]), set()).add(row[level])
    scores: dict[Prefix, float] = {(): 0.0}
    for prefix in sorted(children, key=len):
        logits = student.logits(len(prefix), context, torch.tensor(prefix, dtype=torch.int64))
        siblings = sorted(children[prefix])
        pool = logits[siblings] if prefix else logits
        log_probs = (logits[siblings] - pool.logsumexp(0)).tolist()
        for code, log_prob in zip(siblings, log_probs, strict=True):
            scores[(*prefix, code)] = scores[prefix] + log_prob
    return scores


def noisy_decode(
    scores: dict[Prefix, float],
    codes: np.ndarray,
    k: int,
    num_beams: int,
    eps: float,
    barred: set[int],
    random: np.random.Generator,
) -> Decoded:
    """Beams in plain Python whose scores are off by up to eps and whose ties fall anyhow."""
    noise = random.uniform(-1, 1, len(scores))
    if random.random() < 0.7:
        noise = 0.999 * np.sign(noise)  # the extremes find the edges of the sets sooner
    noisy = {p: s + eps * float(n) for (p, s), n in zip(scores.items(), noise, strict=True)}
    items: dict[Prefix, list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        if item not in barred:
            items.setdefault(tuple(row), []).append(item)
    beams: list[Prefix] = [()]
    for level in range(codes.shape[1]):
        pool = [p for p in noisy if len(p) == level + 1 and p[:-1] in beams]
        if level == codes.shape[1] - 1:
            pool = [p for p in pool if p in items]
        random.shuffle(pool)
        beams = sorted(pool, key=lambda p: -noisy[p])[:num_beams]
    flat = [(item, noisy[leaf], leaf) for leaf in beams for item in items[leaf]][:k]
    padded = flat + [(-1, -math.inf, (-1,) * codes.shape[1])] * (k - len(flat))
    return Decoded(
        torch.tensor([[row[0] for row in padded]]),
        torch.tensor([[row[1] for row in padded]], dtype=torch.float64),
        torch.tensor([[row[2] for row in padded]], dtype=torch.int32),
        torch.tensor([len(flat)]),
    )


@pytest.mark.parametrize(("items", "num_beams", "k"), [(60, 8, 8), (150, 8, 5), (400, 12, 12)])
@pytest.mark.parametrize("eps", [1e-9, 0.01, 0.1, 1.0])
def test_no_decode_within_eps_is_refused(items: int, num_beams: int, k: int, eps: float) -> None:
    student, codes, context = make_student(), make_codes(items), make_context(3)
    trie = Trie.from_codes(codes, None, None, SIZES)
    random = np.random.default_rng(items)
    exclude = [[], list(range(0, items, 2)), list(range(items // 3))]
    bounds = decode_bounds(student, context, trie, num_beams, eps, k=k, exclude=exclude)
    for b in range(3):
        with torch.no_grad():
            scores = prefix_scores(student, context[b], codes)
        for _ in range(15):
            result = noisy_decode(scores, codes, k, num_beams, eps, set(exclude[b]), random)
            assert check_decode(result, bounds[b : b + 1], trie, exclude=exclude[b : b + 1]) == []


def test_bounds_are_attained() -> None:
    """Over many noisy decodes nearly every MAY item is seen and nearly all always seen are MUST."""
    student, codes, context = make_student(0.5), make_codes(60), make_context(1)
    trie = Trie.from_codes(codes, None, None, SIZES)
    eps, random = 0.05, np.random.default_rng(0)
    bound = decode_bounds(student, context, trie, 6, eps)[0]
    with torch.no_grad():
        scores = prefix_scores(student, context[0], codes)
    seen = [
        set(noisy_decode(scores, codes, 6, 6, eps, set(), random).items[0].tolist())
        for _ in range(400)
    ]
    ever, always = set.union(*seen), set.intersection(*seen)
    assert bound.must_items <= always
    assert ever <= bound.may_items
    assert len(always - bound.must_items) <= 1
    assert len(ever) > 6  # eps is wide enough to matter
    assert len(bound.may_items) <= 2 * len(ever)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_without_eps_and_ties_both_sets_are_the_reference(k: int) -> None:
    student, codes, context = make_student(), make_codes(150), make_context(6)
    trie = Trie.from_codes(codes, None, np.arange(150) % 5 > 0, SIZES)
    options = {
        "exclude": [list(range(20))] * 6,
        "temperatures": [0.5, 2.0, 1.0],
        "level_weights": [1.0, -0.5, 2.0],
        "normalisation": "codebook",
    }
    result = beam_decode(student, context, trie, k, 12, **options)
    bounds = decode_bounds(student, context, trie, 12, 0.0, k=k, **options)
    for b, bound in enumerate(bounds):
        items = set(result.items[b, : result.counts[b]].tolist())
        assert bound.must_items == items == bound.may_items
        assert bound.must_leaves == bound.may_leaves
    wide = decode_bounds(student, context, trie, 12, 1e-12, k=k, **options)
    assert check_decode(result, wide, trie, exclude=options["exclude"]) == []


def test_fp32_decode_lies_within_bounds_of_its_rounding() -> None:
    student, codes, context = make_student(), make_codes(400), make_context(32)
    trie = Trie.from_codes(codes, None, None, SIZES)
    bounds = decode_bounds(student, context, trie, 10, 1e-5)
    result = beam_decode(make_student().float(), context.float(), trie, 10, 10)
    assert check_decode(result, bounds, trie) == []
    half = beam_decode(make_student().bfloat16(), context.bfloat16(), trie, 10, 10)
    assert check_decode(half, bounds, trie) != []  # bf16 is off by far more than that


def test_eps_widens_the_sets_and_all_ties_leave_must_empty() -> None:
    codes = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(3)])
    trie = Trie.from_codes(codes, None, None, SIZES)
    flat = decode_bounds(make_student(0.0), make_context(1), trie, 5, 0.0)[0]
    assert flat.must_items == frozenset()
    assert flat.may_items == frozenset(range(27))
    assert flat.min_count == 0  # nothing is certain before the last level
    sizes = []
    for eps in (0.0, 0.01, 0.1, 10.0):
        bound = decode_bounds(make_student(), make_context(1), trie, 5, eps)[0]
        assert bound.must_items <= bound.may_items
        sizes.append((-len(bound.must_items), len(bound.may_items)))
    assert sizes == sorted(sizes)
    assert sizes[0] == (-5, 5)
    assert sizes[-1] == (0, 27)


def test_requests_that_are_not_finite_must_return_nothing() -> None:
    student, context = make_student(), make_context(2)
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    whole = beam_decode(student, context, trie, 5, 5)
    context[1, 0] = math.nan
    bounds = decode_bounds(student, context, trie, 5, 1e-9)
    assert [bound.finite for bound in bounds] == [True, False]
    assert check_decode(beam_decode(student, context, trie, 5, 5), bounds, trie) == []
    assert check_decode(whole, bounds, trie) == [
        "request 1: not finite, so counts must be 0, got 5"
    ]


def swap_first_two(result: Decoded) -> None:
    for tensor in (result.items, result.scores, result.codes):
        tensor[1, [0, 1]] = tensor[1, [1, 0]]


def drop_first(result: Decoded) -> None:
    for tensor, pad in ((result.items, -1), (result.scores, -math.inf), (result.codes, -1)):
        tensor[1, :-1] = tensor[1, 1:].clone()
        tensor[1, -1] = pad
    result.counts[1] -= 1


def repeat_first(result: Decoded) -> None:
    for tensor in (result.items, result.scores, result.codes):
        tensor[1, 1] = tensor[1, 0]


def replace_last_by(item: int) -> Callable[[Decoded], None]:
    def change(result: Decoded) -> None:
        result.items[1, -1] = item

    return change


def shift_scores(result: Decoded) -> None:
    result.scores[1] -= 1e-4


def wrong_code(result: Decoded) -> None:
    result.codes[1, 0, 1] += 1


def wrong_padding(result: Decoded) -> None:
    result.counts[1] -= 1


def wrong_count(result: Decoded) -> None:
    result.counts[1] = 99


def nan_score(result: Decoded) -> None:
    result.scores[1, 2] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_first_two, "scores ascend at rank 1"),
        (drop_first, "MUST items are missing"),
        (drop_first, "counts is 7, expected at least 8"),
        (repeat_first, "items appear twice"),
        (replace_last_by(12345), "item 12345 is not in the catalogue"),
        (replace_last_by(0), "item 0 is excluded"),
        (replace_last_by(1), "item 1 is not available"),
        (replace_last_by(20), "items outside MAY"),
        (shift_scores, "off by 0.0001, eps is 1e-09"),
        (wrong_code, "codes of item"),
        (wrong_padding, "padding beyond counts 7"),
        (wrong_count, r"counts is 99, expected 0\.\.8"),
        (nan_score, "score of item .* is nan"),
    ],
)
def test_every_wrong_result_is_named(change: Callable[[Decoded], None], message: str) -> None:
    student, context = make_student(), make_context(3)
    codes = np.unique(make_codes(150), axis=0)
    stock = np.ones(len(codes))
    stock[1] = 0
    trie = Trie.from_codes(codes, None, stock, SIZES)
    exclude = [[], [0], []]
    result = beam_decode(student, context, trie, 8, 8, exclude=exclude)
    bounds = decode_bounds(student, context, trie, 8, 1e-9, exclude=exclude)
    assert check_decode(result, bounds, trie, exclude=exclude) == []
    assert 20 not in result.items[1].tolist()
    change(result)
    faults = check_decode(result, bounds, trie, exclude=exclude)
    assert any(re.search(f"request 1: .*{message}", fault) for fault in faults), faults
    assert all(fault.startswith("request 1: ") for fault in faults)


def test_a_torn_leaf_is_named() -> None:
    student, context = make_student(), make_context(1)
    codes = np.array([[1, 2, 3], [0, 0, 0], [1, 2, 3], [1, 2, 3]])
    trie = Trie.from_codes(codes, [9, 5, 2, 7], None, SIZES)
    bounds = decode_bounds(student, context, trie, 4, 10.0, k=2)  # either leaf may lead
    result = beam_decode(student, context, trie, 2, 4)
    right = [[9, 2], [5, 9]]
    for items in [*right, [9, 7], [2, 9], [9, 5], [5, 2]]:
        forged = dataclasses.replace(
            result, items=torch.tensor([items]), scores=torch.zeros_like(result.scores)
        )
        torn = [fault for fault in check_decode(forged, bounds, trie) if "items of leaf" in fault]
        assert (torn == []) == (items in right), items


def test_wrong_arguments_are_refused() -> None:
    student, context = make_student(), make_context(2)
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    with pytest.raises(ValueError, match="expected float64"):
        decode_bounds(student, context.float(), trie, 5, 0.1)
    with pytest.raises(ValueError, match="expected float64"):
        decode_bounds(make_student().float(), context, trie, 5, 0.1)
    for eps in (-1.0, math.inf, [0.1, 0.1]):
        with pytest.raises(ValueError, match="eps: expected"):
            decode_bounds(student, context, trie, 5, eps)
    bounds = decode_bounds(student, context, trie, 5, [0.1, 0.1, 0.2], k=4)
    with pytest.raises(ValueError, match="bounds: expected those of 2 requests with k = 5"):
        check_decode(beam_decode(student, context, trie, 5, 5), bounds, trie)
