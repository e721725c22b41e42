"""Tier 4 from histories on: Recall and NDCG of `decode(batch)` with the fused encoder on held-out
users of a real data set, against transformers' encoder and the reference's search.

A T5 encoder and a student are trained on the spot to tell a user's next item from the newest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from encoders import teacher_of
from parity import DTYPES, level_errors
from torch import Tensor
from torch.nn import functional
from trained_students import BEAUTY, Trained, check_metrics

from sidmlp.beam import Decoded
from sidmlp.bounds import check_decode, decode_bounds
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie
from sidmlp_kernels import (
    Catalogue,
    Recommender,
    Requests,
    StudentSpec,
    T5Encoder,
    T5Spec,
    TokenSpec,
)
from sidmlp_kernels import Student as KernelStudent
from sidmlp_kernels.backends import encoder_why_not
from sidmlp_kernels.batching import make_batch

CODES_PER_LEVEL = (256,) * 4
DIM = 64
TOKENS = TokenSpec.for_codes(CODES_PER_LEVEL, max_items=3)
ENCODER = T5Spec(1, DIM, 2, 32, 128, TOKENS.vocab_size)
STEPS, BATCH, TESTERS = 150, 512, 3000


@dataclass(frozen=True)
class TrainedWhole(Trained):
    """`Trained` with the encoder that makes the states."""

    encoder: T5Encoder
    histories: list[list[int]]

    def states_in(self, dtype: torch.dtype, users: int) -> tuple[Tensor, Tensor]:
        """What transformers' encoder makes of the first users, [users, T, D], and their mask."""
        teacher = teacher_of(ENCODER)  # every weight is replaced
        teacher.encoder.load_state_dict(self.encoder.state_dict())
        teacher = teacher.to(dtype)
        batch = make_batch(self.histories[:users], self.known, TOKENS)
        with torch.no_grad():
            states = [
                teacher(input_ids=ids, attention_mask=mask).last_hidden_state
                for ids, mask in zip(batch.ids.split(500), batch.mask.split(500), strict=True)
            ]
        return torch.cat(states), batch.mask

    def reference(self, dtype: torch.dtype) -> Tensor:
        states, mask = self.states_in(dtype, TESTERS)
        return Trained.reference(dataclasses.replace(self, states=states, mask=mask), dtype)

    def model(self, backend: str, dtype: torch.dtype, **options: Any) -> Recommender:
        """With the fused encoder wherever there is one."""
        made = Recommender(
            KernelStudent(StudentSpec(**asdict(self.student.config)), self.student.state_dict()),
            Catalogue.from_codes(self.codes, codes_per_level=CODES_PER_LEVEL),
            self.encoder,
            backend=backend,
            dtype=dtype,
            tokens=TOKENS,
            **options,
        )
        fused = made._encoder is not None and made._encoder.packed is not None
        assert fused == (not encoder_why_not(backend, ENCODER, dtype))
        return made

    def kernel(self, backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        model = self.model(backend, dtype)
        batches = [
            Requests(self.histories[begin : begin + 512], exclude=self.exclude[begin : begin + 512])
            for begin in range(0, TESTERS, 512)
        ]
        found = model.decode_stream(batches, 10, self.num_beams)
        return torch.cat([recs.items for recs in found])

    @property
    def known(self):
        catalogue = Catalogue.from_codes(self.codes, codes_per_level=CODES_PER_LEVEL)
        return catalogue.snapshot().known


@pytest.fixture(scope="module")
def beauty() -> TrainedWhole:
    if not (BEAUTY / "sequences.npz").exists():
        pytest.skip(f"the real data set is not here: {BEAUTY}")
    with np.load(BEAUTY / "sequences.npz") as arrays:
        items, offsets = arrays["items"].astype(np.int64), arrays["offsets"]
    with np.load(BEAUTY / "semantic_ids.npz") as arrays:
        codes = arrays["rkmeans_zcr"].astype(np.int64)
    known = Catalogue.from_codes(codes, codes_per_level=CODES_PER_LEVEL).snapshot().known
    code_tensor = torch.from_numpy(codes)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = T5Encoder(ENCODER)
    student = Student(StudentConfig(CODES_PER_LEVEL, DIM, DIM, 4, 128, 128, DIM))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam([*parameters, *encoder.parameters()], lr=1e-2)
    lengths = np.diff(offsets)
    for _ in range(STEPS):
        users = rng.integers(0, len(lengths), BATCH)
        # Targets at positions 1 .. n-3: the last two items of a user are held out.
        position = 1 + (rng.random(BATCH) * (lengths[users] - 3)).astype(np.int64)
        begin = offsets[users]
        ranges = zip(begin.tolist(), (begin + position).tolist(), strict=True)
        batch = make_batch([items[first:end].tolist() for first, end in ranges], known, TOKENS)
        targets = code_tensor[items[begin + position]]
        logits = student(encoder(batch.ids, batch.mask), batch.mask, targets)
        loss = sum(functional.cross_entropy(own, targets[:, i]) for i, own in enumerate(logits))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    testers = rng.permutation(len(lengths))[:TESTERS]
    histories = [items[offsets[u] : offsets[u + 1] - 1].tolist() for u in testers]
    return TrainedWhole(
        student,
        codes,
        torch.empty(0),  # made by each participant's own encoder
        torch.empty(0),
        [np.array(history) for history in histories],
        torch.from_numpy(items[offsets[testers + 1] - 1]),
        10,
        T5Encoder.from_weights(ENCODER, encoder.state_dict()),
        histories,
    )


def test_metrics_on_beauty_from_histories(
    backend: str, device: torch.device, beauty: TrainedWhole
) -> None:
    check_metrics(beauty, backend, device)


USERS = 64


@pytest.mark.parametrize(("dtype", "users"), [("fp32", USERS), ("bf16", 6)])
def test_items_of_real_histories(
    backend: str, beauty: TrainedWhole, dtype: str, users: int
) -> None:
    """Tier 3, with what rounds in the encoder, too: MUST <= decode(batch) <= MAY of float64.

    Of few users in bf16, whose MAY sets are large and slow to find.
    """
    kind = DTYPES[dtype]
    students, contexts = [], []
    for number in (torch.float64, kind):
        student = Student(beauty.student.config)
        student.load_state_dict(beauty.student.state_dict())
        students.append(student.to(number).eval())
        with torch.no_grad():
            contexts.append(students[-1].context(*beauty.states_in(number, users)))
    trie = Trie.from_codes(beauty.codes, codes_per_level=CODES_PER_LEVEL)
    pair = (students[0], students[1]), (contexts[0], contexts[1])
    plain = {"temperatures": None, "level_weights": None, "normalisation": "children"}
    eps = level_errors(*pair, trie, beauty.num_beams, plain)
    excluded = beauty.exclude[:users]
    bounds = decode_bounds(students[0], contexts[0], trie, beauty.num_beams, eps, exclude=excluded)
    if dtype == "fp32":
        sure = sum(len(request.must_items) for request in bounds)
        assert sure > 0.9 * users * beauty.num_beams, f"{sure} sure items say little, eps {eps}"
    model = beauty.model(backend, kind)
    found = model.decode(
        model.batch(beauty.histories[:users]), beauty.num_beams, beauty.num_beams, excluded
    ).cpu()
    got = Decoded(found.items, found.scores, found.codes, found.counts)
    faults = check_decode(got, bounds, trie, exclude=excluded)
    assert not faults, "\n".join([f"{backend} {dtype}, eps {eps}", *faults[:10]])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_histories_have_the_same_bits_in_every_batch(
    backend: str, beauty: TrainedWhole, dtype: str
) -> None:
    """From histories to scores, within one form of the encoder."""
    if encoder_why_not(backend, ENCODER, DTYPES[dtype]):
        pytest.skip(f"backend {backend} has no fused encoder in {dtype}")
    model = beauty.model(backend, DTYPES[dtype], encoder_form="throughput")
    ask = {"k": 10, "num_beams": beauty.num_beams}
    histories = beauty.histories[:USERS]
    whole = model.decode(model.batch(histories), **ask).cpu()
    for size in (1, 7, 33):
        parts = [histories[begin : begin + size] for begin in range(0, USERS, size)]
        answers = list(model.decode_stream(parts, **ask))
        for name in ("items", "scores", "codes", "counts"):
            got = torch.cat([getattr(recs, name) for recs in answers])
            assert torch.equal(got, getattr(whole, name)), f"{name} in batches of {size}"
