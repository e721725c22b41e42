"""Tier 4 from histories on: Recall and NDCG of `decode(batch)` with the fused encoder on held-out
users of a real data set, against transformers' encoder and the reference's search.

A T5 encoder and a student are trained on the spot to tell a user's next item from the newest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from encoders import teacher_of
from torch import Tensor
from torch.nn import functional
from trained_students import BEAUTY, Trained, check_metrics

from sidmlp.student import Student, StudentConfig
from sidmlp_kernels import Catalogue, Recommender, StudentSpec, T5Encoder, T5Spec, TokenSpec
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

    def reference(self, dtype: torch.dtype) -> Tensor:
        teacher = teacher_of(ENCODER)  # transformers' modules; every weight is replaced
        teacher.encoder.load_state_dict(self.encoder.state_dict())
        teacher = teacher.to(dtype)
        batch = make_batch(self.histories, self.known, TOKENS)
        with torch.no_grad():
            states = torch.cat(
                [
                    teacher(input_ids=ids, attention_mask=mask).last_hidden_state
                    for ids, mask in zip(batch.ids.split(500), batch.mask.split(500), strict=True)
                ]
            )
        whole = dataclasses.replace(self, states=states, mask=batch.mask)
        return Trained.reference(whole, dtype)

    def kernel(self, backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        model = Recommender(
            KernelStudent(StudentSpec(**asdict(self.student.config)), self.student.state_dict()),
            Catalogue.from_codes(self.codes, codes_per_level=CODES_PER_LEVEL),
            self.encoder,
            backend=backend,
            dtype=dtype,
            tokens=TOKENS,
        )
        fused = model._encoder is not None and model._encoder.packed is not None
        assert fused == (not encoder_why_not(backend, ENCODER, dtype))
        batches = [self.histories[begin : begin + 512] for begin in range(0, TESTERS, 512)]
        excluded = [self.exclude[begin : begin + 512] for begin in range(0, TESTERS, 512)]
        found = [
            model.decode(model.batch(batch), 10, self.num_beams, exclude).items.cpu()
            for batch, exclude in zip(batches, excluded, strict=True)
        ]
        return torch.cat(found)

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
