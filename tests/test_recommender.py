"""Recommender: the reference's answers from histories on; swaps, files, threads, bad input."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import sidmlp.beam
import sidmlp_kernels as sk
from sidmlp.student import Student as ReferenceStudent
from sidmlp.student import StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels import backends
from sidmlp_kernels.serving_state import MAX_PLANS
from sidmlp_kernels.student import weight_shapes

CODES = (6, 5, 7)
SPEC = sk.StudentSpec(CODES, 16, 24, 4, 32, 20, 16, blocks_per_head=2)
TOKENS = sk.TokenSpec.for_codes(CODES, max_items=4)
T5 = sk.T5Spec(2, 16, 2, 8, 24, TOKENS.vocab_size)
ITEMS = 60


def make_student(seed: int = 0) -> sk.Student:
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(SPEC).items()
    return sk.Student(SPEC, {n: 0.5 * torch.randn(s, generator=generator) for n, s in shapes})


def make_catalogue(seed: int = 0, first_id: int = 100, **options) -> sk.Catalogue:
    codes = np.random.default_rng(seed).integers(0, CODES, (ITEMS, 3))
    return sk.Catalogue.from_codes(codes, np.arange(first_id, first_id + ITEMS), CODES, **options)


def make_teacher() -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=T5.vocab_size,
        d_model=T5.dim,
        d_kv=T5.head_dim,
        d_ff=T5.ffn_dim,
        num_layers=T5.num_layers,
        num_heads=T5.num_heads,
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_encoder() -> sk.T5Encoder:
    return sk.T5Encoder.from_weights(T5, make_teacher().encoder.state_dict())


def make_states(batch: int = 5, tokens: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, tokens, SPEC.dim, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    return states, mask


@pytest.fixture(scope="module", autouse=True)
def cpu_only() -> Iterator[None]:
    """Also where there is a GPU: the kernels of every backend are tested by test_kernel_*.py."""
    with pytest.MonkeyPatch.context() as patch:
        cpu = tuple(backend for backend in backends.BACKENDS if backend.name == "cpu")
        patch.setattr(backends, "BACKENDS", cpu)
        yield


@pytest.fixture(scope="module")
def model() -> sk.Recommender:
    """With an encoder; tests do not change it."""
    return sk.Recommender(make_student(), make_catalogue(), make_encoder(), tokens=TOKENS)


@pytest.fixture
def bare() -> sk.Recommender:
    """Without an encoder; a test's own."""
    return sk.Recommender(make_student(), make_catalogue())


def reference(states: Tensor, mask: Tensor, catalogue: sk.Catalogue, k: int, beams: int, **options):
    student = ReferenceStudent(StudentConfig(**dataclasses.asdict(SPEC)))
    student.load_state_dict(dict(make_student().weights))
    trie = Trie.from_codes(
        torch.tensor(catalogue.codes.astype(np.int64)),
        torch.tensor(catalogue.item_ids),
        torch.tensor(catalogue.available),
        CODES,
    )
    with torch.no_grad():
        return sidmlp.beam.decode_states(
            student.double(), states.double(), mask, trie, k, beams, **options
        )


def assert_same(got: sk.Recommendations, wanted) -> None:
    assert torch.equal(got.items, wanted.items)
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.counts, wanted.counts)
    torch.testing.assert_close(got.scores, wanted.scores.float(), rtol=1e-4, atol=1e-4)


def assert_bits(a: sk.Recommendations, b: sk.Recommendations) -> None:
    for name in ("items", "scores", "codes", "counts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# -- answers


def test_from_histories_to_items_as_the_reference_with_transformers(model) -> None:
    histories = [[100, 101, 102], [], [159, 130, 100, 140, 141, 142, 143], [120]]
    exclude = [[100, 101], None, np.array([130, 7_000_000, 130]), []]
    batch = model.batch(histories)
    with torch.no_grad():
        states = make_teacher().double()(batch.ids, attention_mask=batch.mask).last_hidden_state
    for options in (
        {},
        {"temperatures": (0.7, 1.0, 2.0), "level_weights": (1.0, 0.5, 0.0)},
        {"normalisation": "codebook"},
    ):
        wanted = reference(states, batch.mask, model.catalogue, 8, 15, exclude=exclude, **options)
        got = model.decode(batch, k=8, num_beams=15, exclude=exclude, **options)
        assert_same(got, wanted)
        assert got.catalogue_version == model.catalogue.version
    assert got.items.dtype == torch.int64
    assert got.scores.dtype == torch.float32
    assert got.codes.dtype == got.counts.dtype == torch.int32


def test_long_exclusions_in_any_order(bare) -> None:
    """Operators search ids in ascending order; callers need not sort them."""
    states, mask = make_states()
    tensor = torch.arange(159, 103, -1).repeat(5, 1)
    for exclude in (
        [list(range(159, 103, -1))] * 5,
        tensor,
        [np.random.default_rng(b).permutation(np.arange(104, 160)) for b in range(5)],
    ):
        recs = bare.decode_states(states, mask, k=10, num_beams=500, exclude=exclude)
        assert recs.counts.tolist() == [4] * 5
        assert recs.items[:, :4].sort().values.tolist() == [[100, 101, 102, 103]] * 5
    assert tensor[0].tolist() == list(range(159, 103, -1)), "the caller's ids were changed"


def test_three_ways_to_decode_agree(model) -> None:
    batch = model.batch([[100, 101], [130]])
    with torch.no_grad():
        states = make_encoder()(batch.ids, batch.mask)
    decoded = model.decode(batch, k=4, num_beams=9, exclude=[[101], [102]])
    from_states = model.decode_states(states, batch.mask, k=4, num_beams=9, exclude=[[101], [102]])
    assert_bits(decoded, from_states)
    student = ReferenceStudent(StudentConfig(**dataclasses.asdict(SPEC)))
    student.load_state_dict(dict(make_student().weights))
    with torch.no_grad():
        context = student.context(states, batch.mask)
    from_context = model.beam_decode(context, k=4, num_beams=9, exclude=[[101], [102]])
    assert torch.equal(from_context.items, decoded.items)
    torch.testing.assert_close(from_context.scores, decoded.scores, rtol=1e-4, atol=1e-4)


def test_fewer_items_than_asked_for_are_padded(bare) -> None:
    states, mask = make_states()
    recs = bare.decode_states(states, mask, k=80, num_beams=5_000)
    assert recs.counts.tolist() == [ITEMS] * 5
    assert (recs.items[:, ITEMS:] == -1).all()
    assert (recs.scores[:, ITEMS:] == -torch.inf).all()
    assert (recs.codes[:, ITEMS:] == -1).all()
    assert sorted(recs.items[0, :ITEMS].tolist()) == list(range(100, 160))


def test_inputs_need_not_be_contiguous_and_masked_states_are_not_read(bare) -> None:
    states, mask = make_states()
    wanted = bare.decode_states(states, mask, k=5)
    poisoned = states.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    strided = poisoned.transpose(0, 1).contiguous().transpose(0, 1)
    strided_mask = mask.T.contiguous().T
    assert not strided.is_contiguous()
    got = bare.decode_states(strided, strided_mask, k=5)
    assert_bits(got, wanted)
    assert not got.scores.requires_grad


def test_a_request_with_states_that_are_not_finite_fails_alone(bare) -> None:
    states, mask = make_states()
    mask[2, 1] = True
    wanted = bare.decode_states(states, mask, k=5)
    broken = states.clone()
    broken[2, 1, 3] = torch.inf
    got = bare.decode_states(broken, mask, k=5)
    assert got.counts.tolist() == [5, 5, 0, 5, 5]
    others = [0, 1, 3, 4]
    assert torch.equal(got.items[others], wanted.items[others])
    assert torch.equal(got.scores[others], wanted.scores[others])


def test_no_requests_and_no_tokens(model) -> None:
    recs = model.decode(model.batch([]), k=3)
    assert recs.items.shape == recs.scores.shape == (0, 3)
    assert recs.codes.shape == (0, 3, 3)
    empty = model.decode_states(torch.empty(2, 0, 16), torch.empty(2, 0, dtype=torch.bool), k=3)
    assert empty.counts.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32", torch.float32])
def test_dtypes_by_name_or_by_themselves(dtype) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), make_encoder(), dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    recs = model.decode(model.batch([[100], [120, 121]]), k=5)
    assert torch.isfinite(recs.scores).all()
    states, mask = make_states()
    for states_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert model.decode_states(states.to(states_dtype), mask, k=2).counts.tolist() == [2] * 5


def test_defaults_come_from_the_decode_spec() -> None:
    spec = sk.DecodeSpec((0.5, 1.0, 2.0), (1.0, 2.0, 1.0), 12, "codebook")
    model = sk.Recommender(make_student(), make_catalogue(), decode=spec)
    states, mask = make_states()
    wanted = sk.Recommender(make_student(), make_catalogue()).decode_states(
        states,
        mask,
        k=6,
        num_beams=12,
        temperatures=[0.5, 1.0, 2.0],
        level_weights=torch.tensor([1.0, 2.0, 1.0]),
        normalisation="codebook",
    )
    assert_bits(model.decode_states(states, mask, k=6), wanted)
    with pytest.raises(ValueError, match="k: expected at most num_beams=12, got 13"):
        model.decode_states(states, mask, k=13)


def test_any_callable_encodes() -> None:
    calls = []

    def encoder(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append((ids, mask))
        return torch.ones(*ids.shape, 16)

    model = sk.Recommender(make_student(), make_catalogue(), encoder=encoder, tokens=TOKENS)
    batch = model.batch([[100], []])
    recs = model.decode(batch, k=3)
    assert calls[0][0] is batch.ids
    assert calls[0][1] is batch.mask
    assert_bits(recs, model.decode_states(torch.ones(2, 5, 16), batch.mask, k=3))


# -- the catalogue


def test_swap_replaces_items_and_keeps_what_histories_may_contain(model) -> None:
    old, new = make_catalogue(), make_catalogue(seed=5, first_id=140)
    model = sk.Recommender(make_student(), old, make_encoder(), tokens=TOKENS)
    before = model.batch([[100, 101], [150]])
    states, mask = make_states()
    model.swap(new)
    assert model.catalogue is new
    recs = model.decode_states(states, mask, k=10, num_beams=30)
    assert recs.catalogue_version == new.version > old.version
    assert_same(recs, reference(states, mask, new, 10, 30))
    # 100 is delisted and still counts, 150 has the new codes, 199 is new.
    tokens = model.batch([[100, 101], [150], [199]]).ids
    assert torch.equal(tokens[0], before.ids[0])
    offsets = np.array(TOKENS.code_offsets)
    assert tokens[1, 1:4].tolist() == (new.codes[10] + offsets).tolist()
    assert tokens[2, 1:4].tolist() == (new.codes[59] + offsets).tolist()
    assert len(model.known_items) == 100
    # A batch made before the swap is still a batch.
    assert model.decode(before, k=3).catalogue_version == new.version
    model.swap(old)
    assert model.decode(before, k=3).catalogue_version == old.version
    assert model.batch([[199]]).ids[0, 1:4].tolist() == tokens[2, 1:4].tolist()


def test_swap_to_a_catalogue_that_does_not_fit_changes_nothing(bare) -> None:
    version = bare.catalogue.version
    for codes, message in (
        ([[0, 1]], "expected 3 levels of at most .* got"),
        ([[6, 0, 0]], r"expected 3 levels of at most \[6, 5, 7\] codes as in the student"),
    ):
        with pytest.raises(ValueError, match=message):
            bare.swap(sk.Catalogue.from_codes(codes))
    with pytest.raises(ValueError, match="catalogue: expected a Catalogue, got list"):
        bare.swap([[0, 1, 2]])
    assert bare.catalogue.version == version


@pytest.mark.parametrize("through", ["model", "catalogue"])
def test_stock_changes_the_items_and_no_score(bare, through: str) -> None:
    states, mask = make_states()
    everything = bare.decode_states(states, mask, k=ITEMS, num_beams=5_000)
    best = everything.items[:, 0].tolist()
    (bare if through == "model" else bare.catalogue).set_available(best, False)
    recs = bare.decode_states(states, mask, k=ITEMS, num_beams=5_000)
    assert recs.catalogue_version == bare.catalogue.version > everything.catalogue_version
    score_of = [dict(zip(i, s, strict=True)) for i, s in pairs(everything)]
    for (items, scores), wanted in zip(pairs(recs), score_of, strict=True):
        assert not set(best) & set(items)
        assert sorted([*items, *set(best)]) == sorted(wanted)
        assert scores == [wanted[item] for item in items]
    bare.set_available(best, True)
    assert_bits(bare.decode_states(states, mask, k=ITEMS, num_beams=5_000), everything)
    with pytest.raises(ValueError, match="set_available: expected ids of this catalogue"):
        bare.set_available([100, 12345], False)


def pairs(recs: sk.Recommendations) -> list[tuple[list[int], list[float]]]:
    counts = recs.counts.tolist()
    return [(recs.items[b, :n].tolist(), recs.scores[b, :n].tolist()) for b, n in enumerate(counts)]


def test_answers_are_never_torn_while_others_swap_and_change_stock(bare) -> None:
    """Every answer must equal, bit for bit, that of its version; ids of catalogues are disjoint."""
    states, mask = make_states()
    catalogues = [make_catalogue(seed, 1000 * (seed + 1)) for seed in range(3)]
    wanted = {}
    for catalogue in catalogues:
        answer = sk.Recommender(make_student(), catalogue).decode_states(states, mask, k=8)
        wanted[catalogue.version] = answer
    bare.swap(catalogues[0])
    answers: list[list[sk.Recommendations]] = [[] for _ in range(3)]
    failures: list[BaseException] = []
    stop = threading.Event()

    def serve(mine: list[sk.Recommendations]) -> None:
        try:
            while not stop.is_set():
                mine.append(bare.decode_states(states, mask, k=8))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    stocked = make_catalogue(7, 9000)
    full = sk.Recommender(make_student(), stocked).decode_states(states, mask, k=8)
    deadline = time.monotonic() + 10
    round_ = 0
    while time.monotonic() < deadline:
        round_ += 1
        versions = [len({recs.catalogue_version for recs in mine[:]}) for mine in answers]
        if round_ > 60 and min(versions) >= 4:  # each thread was overtaken by swaps
            break
        time.sleep(0.0005)
        bare.swap(catalogues[round_ % 3])
        if round_ % 10 == 9:
            bare.swap(stocked)
            for _ in range(3):
                bare.set_available(range(9000, 9030), False)
                bare.set_available(range(9000, 9030), True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    seen = [recs for mine in answers for recs in mine]
    assert len({recs.catalogue_version for recs in seen}) >= 4
    for recs in seen:
        if recs.catalogue_version in wanted:
            assert_bits(recs, wanted[recs.catalogue_version])
        elif (recs.items < 9030).any():  # all 30 were in stock, or none
            assert_bits(recs, full)
        else:
            assert (recs.items < 9060).all()
    # One thread's own swap is visible to it at once.
    bare.swap(catalogues[1])
    assert bare.decode_states(states, mask, k=8).catalogue_version == catalogues[1].version


# -- plan once, run many


def test_plans_are_made_once_bounded_and_ready_after_a_swap(bare, monkeypatch) -> None:
    made = []
    original = sk.recommender.make_plan

    def counting(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(sk.recommender, "make_plan", counting)
    states, mask = make_states()
    for _ in range(3):
        bare.decode_states(states, mask, k=4)
        bare.decode_states(states, mask, k=np.int64(4), num_beams=50, temperatures=[1, 1, 1])
    assert len(made) == 1
    bare.decode_states(states, mask, k=4, normalisation="codebook")
    assert len(made) == 2
    bare.swap(make_catalogue(seed=2))
    assert len(made) == 4
    bare.decode_states(states, mask, k=4)
    assert len(made) == 4
    for k in range(1, MAX_PLANS + 2):
        bare.decode_states(states, mask, k=k)
    assert len(bare._state.plans.settings()) == MAX_PLANS
    made.clear()
    bare.decode_states(states, mask, k=MAX_PLANS + 1)
    assert not made
    bare.decode_states(states, mask, k=4, normalisation="codebook")  # long unused: dropped
    assert len(made) == 1


def test_auto_logs_its_choice_once(caplog) -> None:
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sidmlp_kernels"):
        for _ in range(2):
            model = sk.Recommender(make_student(), make_catalogue())
        sk.Recommender(make_student(), make_catalogue(), backend=model.backend)
    assert [record.getMessage() for record in caplog.records] == [
        f"backend 'auto' is {model.backend} on {model.device} with {model.dtype} weights"
    ]


# -- files


@pytest.mark.parametrize("encoder", [True, False])
def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path, encoder: bool) -> None:
    decode = dataclasses.replace(sk.DecodeSpec.for_levels(3), num_beams=20)
    known = {"known_codes": [[1, 2, 3]], "known_item_ids": [7]}
    model = sk.Recommender(
        make_student(),
        make_catalogue(available=np.arange(ITEMS) % 2, **known),
        make_encoder() if encoder else None,
        dtype="bfloat16",
        tokens=TOKENS,
        decode=decode,
    )
    model.save_pretrained(tmp_path / "model")
    again = sk.load(tmp_path / "model", dtype="bfloat16")
    assert (again.defaults, again.tokens) == (decode, TOKENS)
    states, mask = make_states()
    assert_bits(again.decode_states(states, mask, k=9), model.decode_states(states, mask, k=9))
    if encoder:
        histories = [[100, 7], [131]]
        assert_bits(
            again.decode(again.batch(histories), k=9), model.decode(model.batch(histories), k=9)
        )
        loaded = sk.load(str(tmp_path / "model"))  # weights were saved as fp32, not as bf16
        for name, weight in make_encoder().state_dict().items():
            assert torch.equal(loaded._t5.state_dict()[name], weight)


def test_delisted_items_survive_saving(tmp_path: Path) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), make_encoder(), tokens=TOKENS)
    smaller = sk.Catalogue.from_codes([[0, 0, 0], [1, 0, 1]], [5, 6])  # sizes inferred: 2, 1, 2
    model.swap(smaller)
    model.save_pretrained(tmp_path / "model")
    again = sk.load(tmp_path / "model")
    histories = [[100, 159, 5], [6]]
    assert torch.equal(again.batch(histories).ids, model.batch(histories).ids)
    assert again.catalogue.item_ids.tolist() == [5, 6]
    assert_bits(
        again.decode(again.batch(histories), k=2), model.decode(model.batch(histories), k=2)
    )


def test_an_encoder_of_ones_own_is_not_dropped_silently(tmp_path: Path) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), encoder=lambda ids, mask: ids)
    with pytest.raises(ValueError, match=r"encoder: expected .* include_encoder=False"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", include_encoder=False)
    states, mask = make_states()
    assert_bits(
        sk.load(tmp_path / "model").decode_states(states, mask),
        model.decode_states(states, mask),
    )


def test_push_to_hub_uploads_a_whole_checkpoint(bare, tmp_path: Path, monkeypatch) -> None:
    calls = []

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            sk.load(folder_path)
            calls.append((repo_id, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert bare.push_to_hub("org/student", private=True) == "https://hub/commit/1"
    assert calls == [("org/student", True, True), ("org/student", "Upload student")]


# -- bad input


def test_a_model_without_encoder_says_so(bare) -> None:
    with pytest.raises(ValueError, match="batch: expected a model with an encoder"):
        bare.batch([[100]])
    batch = sk.Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="decode: expected a model with an encoder"):
        bare.decode(batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer >= 1, got 0"),
        ({"k": -1}, "k: expected"),
        ({"k": 11, "num_beams": 10}, "k: expected at most num_beams=10, got 11"),
        ({"k": 51}, "k: expected at most num_beams=50, got 51"),
        ({"k": 2.0}, "k: expected an integer >= 1, got 2.0"),
        ({"k": True}, "k: expected an integer >= 1, got True"),
        ({"k": None}, "k: expected"),
        ({"k": "3"}, "k: expected"),
        ({"num_beams": 0}, "num_beams: expected"),
        ({"num_beams": 20.0}, "num_beams: expected an integer >= 1, got 20.0"),
        ({"num_beams": 10**6}, "num_beams: expected at most 65536, got 1000000"),
        ({"temperatures": [1.0, 1.0]}, "temperatures: expected 3 numbers, one per level, got 2"),
        ({"temperatures": [1.0, 0.0, 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": [1.0, -2.0, 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": [1.0, float("nan"), 1.0]}, r"temperatures\[1\]: expected"),
        ({"temperatures": 1.0}, "temperatures: expected 3 numbers"),
        ({"temperatures": "abc"}, "temperatures: expected"),
        ({"level_weights": [1.0, float("inf"), 1.0]}, r"level_weights\[1\]: expected"),
        ({"level_weights": [1.0] * 4}, "level_weights: expected 3 numbers"),
        ({"normalisation": "softmax"}, "normalisation: expected 'children' or 'codebook'"),
        ({"normalisation": ["children"]}, "normalisation: expected"),
        ({"exclude": [[100]]}, "exclude: expected one sequence .* per request, 5, got 1"),
        ({"exclude": [100] * 5}, r"exclude\[0\]: expected a sequence of item ids, got 100"),
        ({"exclude": [[], [], [1.5], [], []]}, r"exclude\[2\]: expected integers"),
        ({"exclude": [[], [], "12", [], []]}, r"exclude\[2\]: expected"),
        ({"exclude": 7}, "exclude: expected one sequence of item ids per request"),
        ({"exclude": torch.ones(5, 2)}, "exclude: expected integers"),
    ],
)
def test_wrong_settings(model, arguments, message: str) -> None:
    states, mask = make_states()
    with pytest.raises(ValueError, match=message):
        model.decode_states(states, mask, **arguments)
    with pytest.raises(ValueError, match=message):
        model.decode(model.batch([[100]] * 5), **arguments)
    with pytest.raises(ValueError, match=message):
        model.beam_decode(torch.zeros(5, 16), **arguments)


STATES, MASK = make_states()


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (STATES[0], MASK[0], r"encoder_states: expected .*\[batch, tokens, 16\].* got"),
        (STATES[..., :15], MASK, r"encoder_states: .*got torch.float32 \[5, 6, 15\]"),
        (STATES.double(), MASK, "encoder_states: expected a torch.float32 or .*got torch.float64"),
        (STATES.long(), MASK, "encoder_states: .*got torch.int64"),
        (STATES.numpy(), MASK, "encoder_states: .*got ndarray"),
        (None, MASK, "encoder_states: .*got NoneType"),
        (STATES.to("meta"), MASK, "encoder_states: .* on cpu, got .* on meta"),
        (STATES, MASK[:4], r"mask: expected a torch.bool tensor \[5, 6\] on cpu, got .*\[4, 6\]"),
        (STATES, MASK[:, :5], "mask: expected"),
        (STATES, MASK[..., None], "mask: expected"),
        (STATES, MASK.long(), "mask: expected a torch.bool tensor .*got torch.int64"),
        (STATES, MASK.float(), "mask: expected"),
        (STATES, MASK.to("meta"), "mask: .*on cpu, got .* on meta"),
        (STATES, None, "mask: .*got NoneType"),
    ],
)
def test_wrong_states_and_masks(model, states, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode_states(states, mask)


@pytest.mark.parametrize(
    "context",
    [torch.zeros(16), torch.zeros(2, 15), torch.zeros(2, 16).bfloat16(), [[0.0] * 16], None],
)
def test_wrong_contexts(model, context) -> None:
    with pytest.raises(ValueError, match=r"context: expected a torch.float32 tensor \[batch, 16\]"):
        model.beam_decode(context)


def test_wrong_batches_and_encoder_results(model) -> None:
    for batch in ([[1, 2]], None, (torch.zeros(1, 2), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="batch: expected a Batch, got"):
            model.decode(batch)
    with pytest.raises(ValueError, match="batch: expected tensors on cpu, got meta"):
        model.decode(model.batch([[100]]).to("meta"))
    for result in (torch.zeros(1, 5, 8), torch.zeros(1, 4, 16), None, (torch.zeros(1, 5, 16),)):
        other = sk.Recommender(make_student(), make_catalogue(), encoder=lambda *_, r=result: r)
        with pytest.raises(ValueError, match=r"(encoder_states|mask): expected"):
            other.decode(other.batch([[100]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": {}}, "student: expected a Student, got dict"),
        ({"catalogue": [[0, 1, 2]]}, "catalogue: expected a Catalogue, got list"),
        ({"encoder": "t5"}, "encoder: expected None, a T5Encoder or a callable"),
        ({"tokens": {}}, "tokens: expected a TokenSpec, got dict"),
        ({"decode": {}}, "decode: expected a DecodeSpec, got dict"),
        ({"tokens": sk.TokenSpec.for_codes((6, 5))}, "code_offsets: expected 3 levels"),
        ({"decode": sk.DecodeSpec.for_levels(2)}, "decode: expected temperatures for 3 levels"),
        ({"catalogue": sk.Catalogue.from_codes([[0, 1]])}, "catalogue: expected 3 levels"),
        ({"catalogue": sk.Catalogue.from_codes([[0, 5, 0]])}, "catalogue: expected 3 levels"),
        ({"encoder": sk.T5Encoder(sk.T5Spec(1, 8, 2, 4, 8, 99))}, "encoder: expected dim=16"),
        ({"encoder": sk.T5Encoder(sk.T5Spec(1, 16, 2, 4, 8, 9))}, "encoder: expected vocab_size"),
        ({"dtype": "float64"}, "dtype: expected one of float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype: expected"),
        ({"dtype": torch.int32}, "dtype: expected"),
        ({"dtype": None}, "dtype: expected"),
        ({"backend": "tpu"}, "backend: expected .*'cpu'.* got 'tpu'"),
        ({"backend": None}, "backend: expected"),
        ({"device": "gpu"}, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"device": 3.5}, "device: expected"),
        ({"device": "meta"}, "backend: expected one that can run .*not on meta"),
        ({"device": "meta", "backend": "cpu"}, "got none .cpu: it runs on cpu, not on meta"),
    ],
)
def test_wrong_parts(arguments, message: str) -> None:
    usual = {"student": make_student(), "catalogue": make_catalogue()}
    with pytest.raises(ValueError, match=message):
        sk.Recommender(**(usual | arguments))


def test_weights_that_overflow_in_fp16_are_named() -> None:
    weights = dict(make_student().weights)
    name = "heads.1.blocks.1.linear.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = 1e5
    student = sk.Student(SPEC, weights)
    with pytest.raises(ValueError, match=rf"{name}.*got 100000; use dtype=.bfloat16."):
        sk.Recommender(student, make_catalogue(), dtype="float16")
    sk.Recommender(student, make_catalogue(), dtype="bfloat16")
    state = dict(make_encoder().state_dict())
    state["final_layer_norm.weight"] = torch.full((16,), -7e4)
    encoder = sk.T5Encoder.from_weights(T5, state)
    with pytest.raises(ValueError, match=r"encoder weights: .*final_layer_norm.weight.*-70000"):
        sk.Recommender(make_student(), make_catalogue(), encoder, dtype="float16")


def test_an_encoder_that_is_not_finite_is_refused() -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.embed_tokens.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"embed_tokens.weight expected finite"):
        sk.Recommender(make_student(), make_catalogue(), encoder)


def test_the_model_keeps_its_own_encoder() -> None:
    encoder = make_encoder()
    model = sk.Recommender(make_student(), make_catalogue(), encoder, tokens=TOKENS)
    batch = model.batch([[100, 101]])
    before = model.decode(batch, k=5)
    with torch.no_grad():
        encoder.embed_tokens.weight.zero_()
    assert_bits(model.decode(batch, k=5), before)
    assert encoder.training is False
    assert encoder.embed_tokens.weight.dtype == torch.float32


def test_backends_give_reasons() -> None:
    assert "cpu" in sk.available_backends()
    assert sk.why_not("cpu", SPEC, dtype="bfloat16", num_beams=512) == ""
    wide = dataclasses.replace(SPEC, hidden_dim=2**21)
    assert sk.why_not("cpu", wide) == "hidden_dim: expected at most 1048576, got 2097152"
    with pytest.raises(ValueError, match=r"backend: expected .*'cpu'"):
        sk.why_not("tpu")


def test_a_library_that_is_not_built_is_a_reason(monkeypatch) -> None:
    reason = "libsidmlp_cpu.so is not built; build it"
    monkeypatch.setattr(backends.library, "load", lambda name: reason)
    assert "cpu" not in sk.available_backends()
    assert sk.why_not("cpu") == reason
    for backend in ("cpu", "auto"):
        with pytest.raises(ValueError, match=rf"got none .*cpu: {reason}"):
            sk.Recommender(make_student(), make_catalogue(), backend=backend, device="cpu")
