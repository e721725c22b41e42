"""From item vectors to semantic IDs."""

from .codebooks import Codebooks
from .collisions import Collisions, count_collisions, deduplicate
from .embeddings import cooccurrence_vectors, load_vectors
from .given_codes import load_codes
from .kmeans import BACKENDS, assign
from .product import ProductCodebooks, product_quantisation, rotation_backend
from .rkmeans import residual_kmeans
from .rqvae import RqVaeCodebooks, RqVaeOptions, train_rqvae
from .texts import load_texts, text_vectors

__all__ = [
    "BACKENDS",
    "Codebooks",
    "Collisions",
    "ProductCodebooks",
    "RqVaeCodebooks",
    "RqVaeOptions",
    "assign",
    "cooccurrence_vectors",
    "count_collisions",
    "deduplicate",
    "load_codes",
    "load_texts",
    "load_vectors",
    "product_quantisation",
    "residual_kmeans",
    "rotation_backend",
    "text_vectors",
    "train_rqvae",
]
