"""A Recommender as a checkpoint directory, here and on the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from . import checkpoint
from .catalogue import Catalogue

if TYPE_CHECKING:
    from .recommender import Recommender


def save(model: Recommender, directory: str | os.PathLike[str], include_encoder: bool) -> None:
    """See Recommender.save_pretrained."""
    if include_encoder and model._encoder is not None and model._module is None:
        raise ValueError(
            "encoder: expected None, a T5Encoder or an MLPEncoder to save, got "
            f"{type(model._encoder.module).__name__}; pass include_encoder=False to leave it out"
        )
    checkpoint.save(
        checkpoint.Checkpoint(
            model.student,
            model.tokens,
            model.defaults,
            Catalogue(model._current().snapshot),
            model._module if include_encoder else None,
        ),
        directory,
    )


def push(model: Recommender, repo_id: str, private: bool | None, include_encoder: bool) -> str:
    """See Recommender.push_to_hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as parent:
        directory = os.path.join(parent, "model")
        model.save_pretrained(directory, include_encoder=include_encoder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message="Upload student"
        )
    return commit.commit_url
