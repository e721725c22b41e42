"""Options of ``sidmlp tokenize`` for item vectors and tokenizers, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive, seed, share, sizes
from .run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

    from sidmlp.data import Interactions
    from sidmlp.tokenizers import Codebooks

RUN_TEXTS = Path()  # --texts without a file

TOKENIZERS = ("rkmeans", "rqvae", "pq", "opq")


def add_vector_arguments(parser: argparse.ArgumentParser) -> None:
    """Where item vectors come from."""
    group = parser.add_argument_group("item vectors (default: co-occurrence in training)")
    add = group.add_argument
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="array [items, d] of a .npy, .npz or .safetensors file, rows in the order of the data",
    )
    source.add_argument(
        "--texts",
        type=Path,
        nargs="?",
        const=RUN_TEXTS,
        metavar="FILE",
        help="item texts, .jsonl or .jsonl.gz: objects with item_id and texts, a line an item; "
        "without FILE those that came with the data (title, brand, categories, ..)",
    )
    source.add_argument(
        "--titles", action="store_true", help="the titles that came with the data, as texts"
    )
    add("--vectors-name", metavar="NAME", help="which array of --vectors, where it holds several")
    add(
        "--text-fields",
        metavar="KEY,KEY,..",
        help="which texts of --texts to read (default: all)",
    )
    add("--dim", type=positive, default=64, help="width of vectors from co-occurrence or texts")
    add(
        "--window",
        type=positive,
        default=5,
        help="how far apart in a history two items still count as chosen together",
    )


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """How vectors become codes."""
    parser.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        default="rkmeans",
        help="residual k-means, RQ-VAE, product quantisation, or that after a learnt rotation",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "faiss", "torch"),
        default="auto",
        help="what runs k-means; auto takes faiss where it is installed",
    )
    parser.add_argument("--seed", type=seed, default=0, help="start of all random numbers")
    add = parser.add_argument_group("RQ-VAE").add_argument
    add("--latent", type=positive, default=32, help="width of the quantised vectors")
    add(
        "--hidden",
        type=sizes,
        default=(256, 128),
        metavar="N,N,..",
        help="widths of the encoder's layers between; the decoder mirrors them",
    )
    add(
        "--codebooks",
        choices=("gradient", "ema"),
        default="gradient",
        help="how centres learn: by gradients, or as running means of what chooses them",
    )
    add("--decay", type=share, default=0.9, help="of the running means, a step")
    add("--commitment", type=float, default=0.25, help="pull of the encoder towards its centres")
    add("--epochs", type=positive, default=300, help="passes over the items")
    add("--batch-size", type=positive, default=1024, help="items per step")
    add("--lr", type=float, default=1e-3, help="learning rate (Adam)")
    add("--no-restart", action="store_true", help="leave codes dead that no item chooses")
    add("--device", default="cpu", help="where the RQ-VAE trains, as torch calls it")


def item_vectors(options: argparse.Namespace, data: Interactions) -> tuple[np.ndarray, str]:
    """Vectors float32 [num_items, d] as the options ask, and what they were made of."""
    from sidmlp.data import leave_last_out
    from sidmlp.data.interactions import TEXTS
    from sidmlp.tokenizers import cooccurrence_vectors, load_texts, load_vectors, text_vectors

    if options.vectors_name is not None and options.vectors is None:
        raise ValueError("--vectors-name belongs to --vectors; leave it out")
    if options.text_fields is not None and options.texts is None:
        raise ValueError("--text-fields belongs to --texts; leave it out")
    if options.vectors is not None:
        return load_vectors(options.vectors, data.num_items, options.vectors_name), "vectors"
    if options.texts is not None:
        fields = None if options.text_fields is None else options.text_fields.split(",")
        path = options.texts
        if path == RUN_TEXTS:
            path = RunDirectory(options.run).data / TEXTS
            if not path.is_file():
                raise ValueError(
                    "--texts: the data came without texts; name a file, or read the data again "
                    "with `sidmlp data --meta`"
                )
        texts = load_texts(path, data, fields)
        return text_vectors(texts, options.dim, seed=options.seed), "texts"
    if options.titles:
        if data.titles is None:
            raise ValueError("--titles: the data came without titles; use --texts FILE")
        return text_vectors(data.titles, options.dim, seed=options.seed), "titles"
    split = leave_last_out(data)
    vectors = cooccurrence_vectors(data, split, options.dim, options.window, seed=options.seed)
    return vectors, "co-occurrence"


def make_tokenizer(options: argparse.Namespace) -> Callable[[np.ndarray], Codebooks]:
    """The chosen tokenizer of vectors; settings are checked here, before vectors take minutes."""
    from sidmlp.tokenizers import (
        RqVaeOptions,
        product_quantisation,
        residual_kmeans,
        rotation_backend,
        train_rqvae,
    )

    common: dict[str, Any] = {"seed": options.seed, "backend": options.backend}
    if options.tokenizer == "rkmeans":
        return lambda vectors: residual_kmeans(vectors, options.codes, **common)
    if options.tokenizer == "rqvae":
        training = RqVaeOptions(
            latent=options.latent,
            hidden=options.hidden,
            update=options.codebooks,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.lr,
            commitment=options.commitment,
            decay=options.decay,
            restart=not options.no_restart,
            device=options.device,
        )
        return lambda vectors: train_rqvae(vectors, options.codes, training, **common)
    rotate = options.tokenizer == "opq"
    if rotate:
        rotation_backend(options.backend)
    return lambda vectors: product_quantisation(vectors, options.codes, rotate=rotate, **common)


def facts_of(books: Codebooks, tokenizer: str) -> dict[str, Any]:
    """What the record says of a tokenizer's result."""
    from sidmlp.tokenizers import RqVaeCodebooks

    facts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "residual": [round(value, 4) for value in books.residual],
        "used_codes": list(books.used()),
    }
    if isinstance(books, RqVaeCodebooks):
        facts |= {"error": round(books.error, 4), "restarted_codes": list(books.restarts)}
    return facts
