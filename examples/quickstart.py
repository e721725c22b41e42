"""From weights to recommendations: make a student, save it, load it, decode.

The weights are random here, so the recommendations mean nothing; `make demo` trains real ones.
"""

import tempfile

import numpy as np
import torch

import sidmlp_kernels as sk
from sidmlp_kernels.student import weight_shapes

rng = np.random.default_rng(0)
torch.manual_seed(0)

# 1. A student: sizes, and one tensor per name. Student.from_official() reads the published layout.
spec = sk.StudentSpec(
    codes_per_level=(32, 32, 32),
    dim=64,
    attention_dim=96,
    num_heads=4,
    ffn_dim=128,
    hidden_dim=96,
    embedding_dim=64,
)
weights = {name: torch.randn(shape) * 0.1 for name, shape in weight_shapes(spec).items()}
student = sk.Student(spec, weights)

# 2. A catalogue: the semantic ID of each item. Ids may be any numbers >= 0.
codes = rng.integers(0, 32, size=(1000, 3))
catalogue = sk.Catalogue.from_codes(
    codes, item_ids=np.arange(1000) + 5000, codes_per_level=[32] * 3
)

# 3. Save, load, decode. This student comes without an encoder: we hand over encoder states.
with tempfile.TemporaryDirectory() as directory:
    sk.Recommender(student, catalogue).save_pretrained(f"{directory}/my-student")
    model = sk.load(f"{directory}/my-student")
states = torch.randn(2, 12, 64, device=model.device)
mask = torch.ones(2, 12, dtype=torch.bool, device=model.device)
recs = model.decode_states(states, mask, k=5, num_beams=20, exclude=[[5003, 5007], None])

for request in range(2):
    found = int(recs.counts[request])
    for item, score in zip(recs.items[request, :found], recs.scores[request, :found], strict=True):
        print(f"request {request}: item {int(item)} log-probability {float(score):.3f}")
