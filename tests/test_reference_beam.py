"""The reference decode against brute force, against plain Python beams, and rule by rule."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sidmlp.beam import Decoded, beam_decode, brute_force_decode, decode_states
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie

SIZES = (6, 5, 7)
INF = math.inf


def make_student(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    config = StudentConfig(sizes, 8, 8, 2, 16, 12, 8)
    student = Student(config).double()
    with torch.no_grad():
        for head in student.heads:
            head.output.weight.mul_(4)  # logits far enough apart that ranks differ between users
    return student


def make_codes(items: int, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> np.ndarray:
    """Random codes; small catalogues of SIZES have collisions and only children."""
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, c, items) for c in sizes], axis=1)


def make_context(batch: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, generator=generator, dtype=torch.float64)


def assert_same(got: Decoded, expected: Decoded, atol: float = 1e-12) -> None:
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.items, expected.items)
    assert torch.equal(got.codes, expected.codes)
    torch.testing.assert_close(got.scores.double(), expected.scores.double(), rtol=0, atol=atol)


# --- A student whose logits are a table of integers: every score is exact and ties abound. ---


class GridStudent:
    """Logits 64 * (a permutation of 0..C-1 that depends on the prefix).

    exp(-64) vanishes beside 1, so every log-probability is exactly 64 times an integer in fp64.
    """

    def __init__(self, sizes: tuple[int, ...], seed: int, users: int = 3) -> None:
        self.config = SimpleNamespace(codes_per_level=sizes, dim=1)
        random = np.random.default_rng(seed)
        self.salts = random.integers(0, 1000, (users, len(sizes)))
        self.context = torch.arange(users, dtype=torch.float64)[:, None]  # the user's number

    def level_logits(self, user: int, prefix: tuple[int, ...]) -> list[float]:
        codes = self.config.codes_per_level[len(prefix)]
        salt = int(self.salts[user, len(prefix)]) + 7 * sum(prefix) + (prefix[-1] if prefix else 0)
        return (64.0 * np.random.default_rng(salt).permutation(codes)).tolist()

    def logits(self, level: int, context: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        leading = torch.broadcast_shapes(context.shape[:-1], prefix.shape[:-1])
        users = context[..., 0].expand(leading).flatten().tolist()
        rows = prefix.expand(*leading, prefix.shape[-1]).flatten(0, -2).tolist()
        pairs = zip(users, rows, strict=True)
        table = [self.level_logits(int(user), tuple(row[:level])) for user, row in pairs]
        codes = self.config.codes_per_level[level]
        return torch.tensor(table, dtype=torch.float64).reshape(*leading, codes)


def python_beam(
    student: GridStudent,
    user: int,
    codes: list[tuple[int, ...]],
    ids: list[int],
    k: int,
    num_beams: int,
    barred: set[int],
    weights: list[float],
    normalisation: str,
) -> list[tuple[int, float]]:
    """Beam search by sets and sorted lists, exact on the grid -> [(item, score)]."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level in range(len(codes[0])):
        candidates = []
        for rank, (prefix, score) in enumerate(beams):
            children = sorted({c[level] for c in codes if c[:level] == prefix})
            logits = student.level_logits(user, prefix)
            restricted = normalisation == "children" and level > 0
            best = max(logits[c] for c in children) if restricted else max(logits)
            for code in children:
                child = (*prefix, code)
                gain = weights[level] * (logits[code] - best)
                if level == len(codes[0]) - 1:
                    pairs = zip(codes, ids, strict=True)
                    if all(i in barred for c, i in pairs if c == child):
                        continue
                candidates.append((-(score + gain), rank, code, child))
        beams = [(child, -minus) for minus, _, _, child in sorted(candidates)[:num_beams]]
    found = []
    for leaf, score in beams:
        pairs = zip(codes, ids, strict=True)
        found += [(i, score) for c, i in pairs if c == leaf and i not in barred]
    return found[:k]


@st.composite
def grid_cases(draw: st.DrawFn) -> dict:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    row = st.tuples(*(st.integers(0, c - 1) for c in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=30))
    ids = draw(st.permutations(range(10, 10 + len(codes))))
    num_beams = draw(st.integers(1, 12))
    barred = st.lists(st.integers(8, 12 + len(codes)), max_size=12)
    return {
        "sizes": sizes,
        "codes": codes,
        "ids": ids,
        "num_beams": num_beams,
        "k": draw(st.integers(1, num_beams)),
        "exclude": [draw(barred), None, draw(barred)],
        "weights": [draw(st.sampled_from([1.0, 0.5, 0.0, -1.0, 2.0])) for _ in sizes],
        "normalisation": draw(st.sampled_from(["children", "codebook"])),
        "seed": draw(st.integers(0, 99)),
    }


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(grid_cases())
def test_ties_on_a_coarse_grid_equal_a_plain_beam_search(case: dict) -> None:
    student = GridStudent(case["sizes"], case["seed"])
    trie = Trie.from_codes(np.array(case["codes"]), case["ids"], codes_per_level=case["sizes"])
    got = beam_decode(
        student,
        student.context,
        trie,
        case["k"],
        case["num_beams"],
        exclude=case["exclude"],
        level_weights=case["weights"],
        normalisation=case["normalisation"],
    )
    for user in range(3):
        expected = python_beam(
            student,
            user,
            case["codes"],
            case["ids"],
            case["k"],
            case["num_beams"],
            set(case["exclude"][user] or []),
            case["weights"],
            case["normalisation"],
        )
        count = int(got.counts[user])
        assert got.items[user, :count].tolist() == [item for item, _ in expected]
        assert got.scores[user, :count].tolist() == [score for _, score in expected]
        assert (got.items[user, count:] == -1).all()
        assert (got.scores[user, count:] == -INF).all()
        assert (got.codes[user, count:] == -1).all()
        by_id = dict(zip(case["ids"], case["codes"], strict=True))
        rows = zip(got.items[user, :count].tolist(), got.codes[user, :count].tolist(), strict=True)
        assert all(tuple(codes) == by_id[item] for item, codes in rows)


def test_all_equal_scores_come_in_code_order() -> None:
    """Hundreds of equal candidates: few of them come out in order of a sort that is not stable."""
    sizes = (12, 8, 6)
    student = make_student(sizes)
    with torch.no_grad():
        for head in student.heads:
            head.output.weight.zero_()
            head.output.bias.zero_()
    codes = np.array(list(itertools.product(*map(range, sizes))))
    shuffled = np.random.default_rng(0).permutation(len(codes))
    trie = Trie.from_codes(codes[shuffled], shuffled)
    got = beam_decode(student, make_context(2), trie, 60, 60)
    # The first 60 of 96 prefixes survive level 2, the first 60 of their 360 children level 3.
    assert got.codes[0].tolist() == codes[:60].tolist()
    assert got.items.tolist() == [list(range(60))] * 2
    assert torch.equal(got.scores, got.scores[:, :1].expand(-1, 60))


# --- Brute force on a real student ---


@pytest.mark.parametrize("normalisation", ["children", "codebook"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0], [-1.0, 1.0, -0.5], [1.0, 0.0, 1.0]])
def test_wide_beam_equals_brute_force(normalisation: str, weights: list[float] | None) -> None:
    student, codes, context = make_student(), make_codes(90), make_context()
    ids = np.random.default_rng(1).permutation(1000)[:90]
    available = np.random.default_rng(2).random(90) < 0.8
    exclude = [ids[:40].tolist(), [], torch.from_numpy(ids[20:25].copy()), None]
    options = {
        "temperatures": [0.7, 1.0, 1.6],
        "level_weights": weights,
        "normalisation": normalisation,
    }
    trie = Trie.from_codes(codes, ids, available, SIZES)
    got = beam_decode(student, context, trie, 90, 500, exclude=exclude, **options)
    plain = [list(map(int, [] if e is None else e)) for e in exclude]
    wanted = brute_force_decode(
        student, context, codes, ids, 90, available=available, exclude=plain, **options
    )
    assert_same(got, wanted)
    assert len(set(got.counts.tolist())) > 1


@pytest.mark.parametrize(("levels", "items"), [(1, 5), (2, 9), (5, 40), (8, 60)])
def test_wide_beam_equals_brute_force_for_other_depths(levels: int, items: int) -> None:
    sizes = (3, 4, 2, 5, 3, 2, 4, 3)[:levels]
    student, codes = make_student(sizes, seed=levels), make_codes(items, sizes, seed=levels)
    trie = Trie.from_codes(codes, codes_per_level=sizes)
    got = beam_decode(student, make_context(), trie, 70, 70)
    assert_same(got, brute_force_decode(student, make_context(), codes, None, 70))


def test_a_narrow_beam_differs_from_brute_force() -> None:
    """So the comparisons above are about the beam, not about a search that never cuts."""
    student, codes, context = make_student(), make_codes(90), make_context(16)
    narrow = beam_decode(student, context, Trie.from_codes(codes, None, None, SIZES), 2, 2)
    assert not torch.equal(narrow.items, brute_force_decode(student, context, codes, None, 2).items)


def test_fp32_scores_stay_near_fp64() -> None:
    codes, context = make_codes(90), make_context()
    trie = Trie.from_codes(codes, None, None, SIZES)
    exact = beam_decode(make_student(), context, trie, 90, 200)
    single = beam_decode(make_student().float(), context.float(), trie, 90, 200)
    assert single.scores.dtype == torch.float32
    half = beam_decode(make_student().bfloat16(), context.bfloat16(), trie, 90, 200)
    assert half.scores.dtype == torch.float32  # softmax and scores are never half precision
    order = single.items.argsort(dim=1)
    same = single.scores.gather(1, order).double()
    by_id = exact.scores.gather(1, exact.items.argsort(dim=1))
    assert (same - by_id).abs().max() < 1e-4


def test_topk_path_equals_the_exact_one_without_ties() -> None:
    codes = np.unique(make_codes(60), axis=0)
    trie = Trie.from_codes(codes, None, None, SIZES)
    decode = [
        beam_decode(make_student(), make_context(), trie, 10, 10, exact_ties=exact)
        for exact in (True, False)
    ]
    assert_same(decode[1], decode[0], atol=0)


# --- Rules, one by one ---


def test_collisions_come_in_catalogue_order_with_one_score() -> None:
    student = make_student()
    codes = np.array([[1, 2, 3], [0, 0, 0], [1, 2, 3], [1, 2, 3]])
    got = beam_decode(student, make_context(1), Trie.from_codes(codes, [9, 5, 2, 7]), 4, 4)
    items = got.items[0].tolist()
    start = items.index(9)
    assert items[start : start + 3] == [9, 2, 7]
    assert len(set(got.scores[0, start : start + 3].tolist())) == 1
    # Leaves are cut first: one beam, one leaf, but k = 1 of its items.
    one = beam_decode(student, make_context(1), Trie.from_codes(codes, [9, 5, 2, 7]), 1, 1)
    assert one.counts.tolist() == [1]
    # Two leaves survive, four items compete for two places.
    two = beam_decode(student, make_context(1), Trie.from_codes(codes, [9, 5, 2, 7]), 2, 2)
    assert two.items[0].tolist() == items[:2]


def test_an_only_child_has_log_probability_zero() -> None:
    student = make_student()
    codes = np.array([[0, 1, 2], [3, 4, 5]])
    got = beam_decode(student, make_context(1), Trie.from_codes(codes), 2, 2)
    nothing = torch.zeros(0, dtype=torch.int64)
    first = student.logits(0, make_context(1)[0], nothing).detach().log_softmax(0)
    for code, score in zip(got.codes[0].tolist(), got.scores[0].tolist(), strict=True):
        assert score == pytest.approx(float(first[code[0]]), abs=1e-14)
    # Level 1 keeps the denominator over all codes even when the root has one child.
    lonely = beam_decode(student, make_context(1), Trie.from_codes(codes[:1]), 1, 1)
    assert lonely.scores.item() == pytest.approx(float(first[0]), abs=1e-14)
    # "codebook" knows no only children.
    whole = beam_decode(
        student, make_context(1), Trie.from_codes(codes[:1]), 1, 1, normalisation="codebook"
    )
    assert whole.scores.item() < lonely.scores.item() - 1e-3


def test_a_code_without_children_occupies_no_beam() -> None:
    student = make_student()
    codes = make_codes(40)[make_codes(40)[:, 0] == 2]
    trie = Trie.from_codes(codes, None, None, SIZES)
    got = beam_decode(student, make_context(), trie, 3, 3)
    assert got.counts.tolist() == [3] * 4
    assert (got.codes[..., 0] == 2).all()


def test_exclusion_acts_at_the_last_level_before_its_cut_and_changes_no_score() -> None:
    student, codes = make_student(), make_codes(80)
    ids = np.arange(100, 180)
    trie = Trie.from_codes(codes, ids, None, SIZES)
    plain = beam_decode(student, make_context(), trie, 12, 12)
    seen = [row[: 3 * n].tolist() for n, row in enumerate(plain.items)]
    got = beam_decode(student, make_context(), trie, 12, 12, exclude=seen)
    assert torch.equal(got.items[0], plain.items[0])  # an empty sequence excludes nothing
    # The prefixes of level 2 are those of the plain decode: removal happens after them.
    prefixes = Trie.from_codes(np.unique(codes[:, :2], axis=0), None, None, SIZES[:2])
    shallow = make_student(SIZES[:2])
    kept = shallow.state_dict().keys()
    shallow.load_state_dict({n: w for n, w in student.state_dict().items() if n in kept})
    beams = beam_decode(shallow, make_context(), prefixes, 12, 12)
    full = brute_force_decode(student, make_context(), codes, ids, 80)
    for b in range(4):
        by_score = dict(zip(full.items[b].tolist(), full.scores[b].tolist(), strict=True))
        alive = {tuple(prefix) for prefix in beams.codes[b].tolist()}
        leaves: dict[tuple[int, ...], list[int]] = {}
        for code, item in zip(codes.tolist(), ids.tolist(), strict=True):
            if tuple(code[:2]) in alive and item not in seen[b]:
                leaves.setdefault(tuple(code), []).append(item)
        order = sorted(leaves.values(), key=lambda items: -by_score[items[0]])[:12]
        expected = [item for items in order for item in items][:12]
        assert got.items[b, : got.counts[b]].tolist() == expected
        scores = [by_score[item] for item in expected]
        assert got.scores[b, : got.counts[b]].tolist() == pytest.approx(scores, abs=1e-12)


def test_a_leaf_goes_only_when_all_its_items_are_excluded() -> None:
    student = make_student()
    codes = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    trie = Trie.from_codes(codes, [5, 6, 7], None, SIZES)
    context = make_context(1).expand(5, -1)
    exclude = [[], [5], [5, 6], [6, 5, 5, 999, -3], [5, 6, 7]]
    got = beam_decode(student, context, trie, 3, 3, exclude=exclude)
    plain = dict(zip(got.items[0].tolist(), got.scores[0].tolist(), strict=True))
    assert set(plain) == {5, 6, 7}
    assert [sorted(row[row >= 0].tolist()) for row in got.items] == [
        [5, 6, 7],
        [6, 7],
        [7],
        [7],
        [],
    ]
    assert got.counts.tolist() == [3, 2, 1, 1, 0]
    # 7 is the only candidate left, yet not an only child: its score is unchanged.
    assert got.scores[2, 0].item() == plain[7]


def test_unavailable_items_count_in_denominators_and_are_never_emitted() -> None:
    student, codes = make_student(), make_codes(60)
    stock = np.random.default_rng(3).random(60) < 0.5
    whole = beam_decode(student, make_context(), Trie.from_codes(codes, None, None, SIZES), 60, 99)
    part = beam_decode(student, make_context(), Trie.from_codes(codes, None, stock, SIZES), 60, 99)
    gone = set(np.flatnonzero(~stock).tolist())
    for b in range(4):
        keep = [i for i, item in enumerate(whole.items[b].tolist()) if item not in gone]
        assert part.items[b, : len(keep)].tolist() == whole.items[b, keep].tolist()
        assert part.scores[b, : len(keep)].tolist() == whole.scores[b, keep].tolist()
        assert part.counts[b] == len(keep)
    none = Trie.from_codes(codes, None, np.zeros(60), SIZES)
    assert beam_decode(student, make_context(), none, 5, 5).counts.tolist() == [0] * 4


def test_non_finite_requests_get_nothing_and_leave_the_others_alone() -> None:
    student = make_student()
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    states = torch.randn(5, 6, 8, dtype=torch.float64)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[1, 4:] = False
    clean = decode_states(student, states, mask, trie, 8, 8)
    states[0, 2, 3] = math.nan
    states[1, 5] = math.nan  # masked: never read
    states[3, 0, 0] = INF
    got = decode_states(student, states, mask, trie, 8, 8)
    assert got.counts.tolist() == [0, 8, 8, 0, 8]
    for b in (1, 2, 4):
        assert torch.equal(got.items[b], clean.items[b])
        assert torch.equal(got.scores[b], clean.scores[b])
    for b in (0, 3):
        assert (got.items[b] == -1).all()
        assert (got.scores[b] == -INF).all()
        assert (got.codes[b] == -1).all()
    context = make_context()
    context[2, 1] = -INF
    assert beam_decode(student, context, trie, 4, 4).counts.tolist() == [4, 4, 0, 4]


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_non_finite_logits_that_are_read_disqualify_the_request(value: float) -> None:
    codes = np.array([[0, 0, 0], [0, 1, 0], [1, 2, 0], [1, 2, 1]])
    trie = Trie.from_codes(codes, None, None, SIZES)

    def counts(level: int, code: int, normalisation: str = "children") -> list[int]:
        student = make_student()
        with torch.no_grad():
            student.heads[level].output.bias[code] = value
        got = beam_decode(student, make_context(2), trie, 4, 4, normalisation=normalisation)
        return got.counts.tolist()

    assert counts(0, 5) == [0, 0]  # level 1 sums over all codes, children or not
    assert counts(1, 1) == [0, 0]
    assert counts(1, 2) == [4, 4]  # an only child: no logit is read
    assert counts(1, 4) == [4, 4]  # no child of any node
    assert counts(1, 4, "codebook") == [0, 0]


def test_a_user_without_states_gets_an_answer() -> None:
    student = make_student()
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    states = torch.full((2, 3, 8), math.nan, dtype=torch.float64)
    got = decode_states(student, states, torch.zeros(2, 3, dtype=torch.bool), trie, 4, 4)
    assert got.counts.tolist() == [4, 4]
    assert got.scores.isfinite().all()


@pytest.mark.parametrize("batch", [0, 1, 37])
def test_batch_sizes_shapes_and_dtypes(batch: int) -> None:
    student = make_student()
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    got = beam_decode(student, make_context(batch), trie, 7, 9, exclude=[[1, 2]] * batch)
    assert got.items.shape == (batch, 7)
    assert got.items.dtype == torch.int64
    assert got.scores.shape == (batch, 7)
    assert got.codes.shape == (batch, 7, 3)
    assert got.codes.dtype == torch.int32
    assert got.counts.shape == (batch,)
    assert got.counts.dtype == torch.int32


def test_more_beams_than_nodes_give_fewer_results() -> None:
    trie = Trie.from_codes(np.array([[1, 1, 1], [2, 2, 2]]), [4, 3], None, SIZES)
    got = beam_decode(make_student(), make_context(1), trie, 512, 512)
    assert got.counts.tolist() == [2]
    assert set(got.items[0, :2].tolist()) == {3, 4}
    assert (got.items[0, 2:] == -1).all()


def test_decode_traces_without_graph_breaks() -> None:
    student = make_student()
    trie = Trie.from_codes(make_codes(60), None, None, SIZES)
    compiled = torch.compile(beam_decode, fullgraph=True, backend="eager")
    assert_same(
        compiled(student, make_context(), trie, 5, 6),
        beam_decode(student, make_context(), trie, 5, 6),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k: expected 1\.\.num_beams"),
        ({"k": 7}, r"k: expected 1\.\.num_beams"),
        ({"num_beams": 0}, "num_beams: expected at least 1"),
        ({"temperatures": [1.0, 0.0, 1.0]}, "temperatures: expected numbers > 0"),
        ({"temperatures": [1.0, 1.0]}, "temperatures: expected 3 finite"),
        ({"level_weights": [1.0, math.nan, 1.0]}, "level_weights: expected 3 finite"),
        ({"normalisation": "siblings"}, "normalisation: expected one of"),
        ({"exclude": [[1]]}, "exclude: expected 4 id sequences"),
        ({"exclude": [[1.5], [], [], []]}, "exclude: expected a sequence of integer"),
        ({"context": torch.zeros(4, 9)}, "context: expected shape"),
        ({"trie": Trie.from_codes([[1, 2]])}, "trie: expected codes within"),
        ({"trie": Trie.from_codes([[6, 2, 1]])}, "trie: expected codes within"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict, message: str) -> None:
    arguments = {"context": make_context(), "trie": Trie.from_codes(make_codes(9)), "k": 5}
    arguments |= {"num_beams": 6, **changes}
    with pytest.raises(ValueError, match=message):
        beam_decode(make_student(), **arguments)
