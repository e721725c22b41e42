"""Plug in an encoder of your own: any callable (ids, mask) -> states [B, T, D].

Here it is an embedding table; a fine-tuned Transformer on another device works the same way.
"""

import numpy as np
import torch

import sidmlp_kernels as sk
from sidmlp_kernels.student import weight_shapes

torch.manual_seed(0)
spec = sk.StudentSpec(
    codes_per_level=(16, 16),
    dim=32,
    attention_dim=32,
    num_heads=2,
    ffn_dim=64,
    hidden_dim=64,
    embedding_dim=32,
)
student = sk.Student(spec, {n: torch.randn(s) * 0.1 for n, s in weight_shapes(spec).items()})
catalogue = sk.Catalogue.from_codes(
    np.random.default_rng(0).integers(0, 16, (200, 2)), codes_per_level=[16, 16]
)

# How histories become tokens: pad, codes of level 1, codes of level 2, users, end.
tokens = sk.TokenSpec.for_codes(spec.codes_per_level, max_items=20)
table = torch.nn.Embedding(tokens.vocab_size, spec.dim)


def encoder(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return table(ids.cpu()).to(ids.device).detach()


model = sk.Recommender(student, catalogue, encoder=encoder, tokens=tokens)
batch = model.batch([[12, 87, 40], [7, 19], []])  # item histories, oldest first; one is empty
recs = model.decode(batch, k=3, num_beams=10, exclude=[[12, 87, 40], [7, 19], None])
print(recs.items)
