"""Change stock and the whole catalogue while other threads decode.

Every answer carries the version of the catalogue that it was computed with, and is never a mixture.
"""

import threading
import time

import numpy as np
import torch

import sidmlp_kernels as sk
from sidmlp_kernels.student import weight_shapes

torch.manual_seed(0)
rng = np.random.default_rng(0)
spec = sk.StudentSpec(
    codes_per_level=(16, 16, 16),
    dim=32,
    attention_dim=32,
    num_heads=2,
    ffn_dim=64,
    hidden_dim=64,
    embedding_dim=32,
)
student = sk.Student(spec, {n: torch.randn(s) * 0.1 for n, s in weight_shapes(spec).items()})
monday = sk.Catalogue.from_codes(rng.integers(0, 16, (500, 3)), codes_per_level=[16] * 3)
tuesday = sk.Catalogue.from_codes(
    rng.integers(0, 16, (500, 3)), item_ids=np.arange(500, 1000), codes_per_level=[16] * 3
)
model = sk.Recommender(student, monday)
states = torch.randn(8, 10, 32, device=model.device)
mask = torch.ones(8, 10, dtype=torch.bool, device=model.device)

answers: list[tuple[int, int, int]] = []
stop = threading.Event()


def serve() -> None:
    while not stop.is_set():
        recs = model.decode_states(states, mask, k=10, num_beams=20)
        answers.append((recs.catalogue_version, int(recs.items.min()), int(recs.items.max())))


workers = [threading.Thread(target=serve) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(10):
    time.sleep(0.01)
    model.swap(tuesday)
    time.sleep(0.01)
    model.swap(monday)
model.set_available([1, 2, 3], False)  # out of stock; still fine in a history
time.sleep(0.05)
stop.set()
for worker in workers:
    worker.join()

for version in sorted({version for version, _, _ in answers}):
    lows = [low for v, low, _ in answers if v == version]
    highs = [high for v, _, high in answers if v == version]
    print(f"version {version}: {len(lows)} answers, items {min(lows)}..{max(highs)}")
    assert (max(highs) < 500) or (min(lows) >= 500), "an answer mixed two catalogues"
