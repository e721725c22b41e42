"""Tier 4: Recall and NDCG on held-out users, kernel against reference.

Two students trained on the spot, in seconds: one of next-item pairs on a real data set where that
is present, one distilled from a tiny teacher on sequences that follow a rule.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from trained_students import BEAUTY, Trained, check_metrics

from sidmlp.data import Interactions, TokenSpec, leave_last_out
from sidmlp.distill import DistillOptions, distill, make_student
from sidmlp.metrics import ndcg_at_k
from sidmlp.student import Student, StudentConfig
from sidmlp.teacher import PrefixTable, Teacher, TeacherConfig
from sidmlp.teacher.train import histories, recommend, train_teacher
from sidmlp.training import LoopOptions
from sidmlp.training.features import compute_features

# --- Beauty: a student of next-item pairs over learned token states. ---

HISTORY = 2  # newest items that the student sees: enough to learn what follows what


def beauty_inputs(
    codes: Tensor, sequences: list[np.ndarray], embedding: nn.Embedding
) -> tuple[Tensor, Tensor]:
    """States [B, 4 * HISTORY, D] and mask: an embedding of position, level and code."""
    rows = torch.full((len(sequences), HISTORY), -1)
    for n, sequence in enumerate(sequences):
        newest = torch.from_numpy(sequence[-HISTORY:][::-1].copy())
        rows[n, : len(newest)] = newest
    places = torch.arange(HISTORY)[:, None] * 4 + torch.arange(4)
    tokens = places * 256 + codes[rows.clamp(min=0)]
    mask = (rows >= 0).repeat_interleave(4, dim=1)
    return embedding(tokens.flatten(1)), mask


@pytest.fixture(scope="module")
def beauty() -> Trained:
    if not (BEAUTY / "sequences.npz").exists():
        pytest.skip(f"the real data set is not here: {BEAUTY}")
    with np.load(BEAUTY / "sequences.npz") as arrays:
        items, offsets = arrays["items"].astype(np.int64), arrays["offsets"]
    with np.load(BEAUTY / "semantic_ids.npz") as arrays:
        codes = arrays["rkmeans_zcr"].astype(np.int64)
    code_tensor = torch.from_numpy(codes)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    dim = 64
    embedding = nn.Embedding(HISTORY * 4 * 256, dim)
    student = Student(StudentConfig((256,) * 4, dim, dim, 4, 128, 128, dim))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam([*parameters, *embedding.parameters()], lr=1e-2)
    lengths = np.diff(offsets)
    for _ in range(120):
        users = rng.integers(0, len(lengths), 512)
        # Targets at positions 1 .. n-3: the last two items of a user are held out.
        position = 1 + (rng.random(512) * (lengths[users] - 3)).astype(np.int64)
        chosen = zip(users, position, strict=True)
        begin = offsets[users]
        past = [items[offsets[u] : offsets[u] + p] for u, p in chosen]
        targets = code_tensor[items[begin + position]]
        states, mask = beauty_inputs(code_tensor, past, embedding)
        logits = student(states, mask, targets)
        loss = sum(functional.cross_entropy(own, targets[:, i]) for i, own in enumerate(logits))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    testers = rng.permutation(len(lengths))[:3000]
    past = [items[offsets[u] : offsets[u + 1] - 1] for u in testers]
    with torch.no_grad():
        states, mask = beauty_inputs(code_tensor, past, embedding)
    targets = torch.from_numpy(items[offsets[testers + 1] - 1])
    return Trained(student, codes, states, mask, past, targets, num_beams=10)


def test_metrics_on_beauty(backend: str, device: torch.device, beauty: Trained) -> None:
    check_metrics(beauty, backend, device)


# --- A teacher and its student, on walks round a circle of items. ---

SIZES = (4, 4, 4)
CODES = np.stack(np.unravel_index(np.arange(60), SIZES), axis=1)


@pytest.fixture(scope="module")
def distilled() -> tuple[Trained, float]:
    """A student distilled from a tiny TIGER, and NDCG@10 of that teacher's constrained search."""
    rng = np.random.default_rng(0)
    walks = [(rng.integers(60) + np.cumsum(rng.integers(1, 3, size=9))) % 60 for _ in range(300)]
    split = leave_last_out(
        Interactions(np.concatenate(walks), np.arange(301) * 9, np.arange(60, dtype=np.int64))
    )
    torch.manual_seed(0)
    config = TeacherConfig(dim=32, num_layers=1, num_heads=2, head_dim=16, ffn_dim=64, dropout=0.0)
    teacher = Teacher(config, TokenSpec.for_codes(SIZES, max_items=4))
    options = LoopOptions(epochs=12, batch_size=64, learning_rate=5e-3, warmup_steps=10)
    train_teacher(teacher, split, CODES, options, validation_users=100, progress=False)
    student = make_student(teacher, num_heads=2, hidden_dim=64, dropout=0.0)
    distill(
        student,
        teacher,
        split,
        CODES,
        DistillOptions(),
        LoopOptions(epochs=12, batch_size=64, learning_rate=5e-3, warmup_steps=10),
        validation_users=100,
        progress=False,
    )
    seen, targets = histories(split.test), torch.from_numpy(split.test.target_items())
    found = recommend(
        teacher,
        split.test,
        CODES,
        PrefixTable(CODES, SIZES),
        k=10,
        num_beams=20,
        exclude=seen,
    )
    features = compute_features(teacher, split.test, CODES, dtype="float32", progress=False)
    states, mask = features.batch_states(np.arange(len(targets)))
    trained = Trained(student, CODES, states, mask, seen, targets, num_beams=20)
    return trained, ndcg_at_k(found.items, targets, 10).mean


def test_the_kernels_student_keeps_up_with_its_teacher(
    backend: str, device: torch.device, distilled: tuple[Trained, float]
) -> None:
    trained, teacher = distilled
    own = trained.metrics(trained.kernel(backend, device, torch.float32))["NDCG@10"].mean
    print(f"NDCG@10: teacher {teacher:.4f}, student on {backend} {own:.4f} ({own / teacher:.1%})")
    assert teacher > 0.5, "the teacher has learned next to nothing"
    assert own >= 0.97 * teacher


def test_metrics_of_the_distilled_student(
    backend: str, device: torch.device, distilled: tuple[Trained, float]
) -> None:
    check_metrics(distilled[0], backend, device)
