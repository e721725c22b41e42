"""From item vectors to semantic IDs."""

from .embeddings import cooccurrence_vectors, load_vectors
from .rkmeans import BACKENDS, Codebooks, Collisions, assign, deduplicate, residual_kmeans

__all__ = [
    "BACKENDS",
    "Codebooks",
    "Collisions",
    "assign",
    "cooccurrence_vectors",
    "deduplicate",
    "load_vectors",
    "residual_kmeans",
]
