"""Recommender saved, loaded and pushed: the same bits, and nothing is dropped silently."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_recommender import (
    ITEMS,
    TOKENS,
    assert_bits,
    make_catalogue,
    make_encoder,
    make_states,
    make_student,
)

import sidmlp_kernels as sk

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.mark.parametrize("encoder", [True, False])
def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path, encoder: bool) -> None:
    decode = dataclasses.replace(sk.DecodeSpec.for_levels(3), num_beams=20)
    known = {"known_codes": [[1, 2, 3]], "known_item_ids": [7]}
    model = sk.Recommender(
        make_student(),
        make_catalogue(available=np.arange(ITEMS) % 2, **known),
        make_encoder() if encoder else None,
        dtype="bfloat16",
        tokens=TOKENS,
        decode=decode,
    )
    model.save_pretrained(tmp_path / "model")
    again = sk.load(tmp_path / "model", dtype="bfloat16")
    assert (again.defaults, again.tokens) == (decode, TOKENS)
    states, mask = make_states()
    assert_bits(again.decode_states(states, mask, k=9), model.decode_states(states, mask, k=9))
    if encoder:
        histories = [[100, 7], [131]]
        assert_bits(
            again.decode(again.batch(histories), k=9), model.decode(model.batch(histories), k=9)
        )
        loaded = sk.load(str(tmp_path / "model"))  # weights were saved as fp32, not as bf16
        for name, weight in make_encoder().state_dict().items():
            assert torch.equal(loaded._module.state_dict()[name], weight)


def test_delisted_items_survive_saving(tmp_path: Path) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), make_encoder(), tokens=TOKENS)
    smaller = sk.Catalogue.from_codes([[0, 0, 0], [1, 0, 1]], [5, 6])  # sizes inferred: 2, 1, 2
    model.swap(smaller)
    model.save_pretrained(tmp_path / "model")
    again = sk.load(tmp_path / "model")
    histories = [[100, 159, 5], [6]]
    assert torch.equal(again.batch(histories).ids, model.batch(histories).ids)
    assert again.catalogue.item_ids.tolist() == [5, 6]
    assert_bits(
        again.decode(again.batch(histories), k=2), model.decode(model.batch(histories), k=2)
    )


def test_an_encoder_of_ones_own_is_not_dropped_silently(tmp_path: Path) -> None:
    model = sk.Recommender(make_student(), make_catalogue(), encoder=lambda ids, mask: ids)
    with pytest.raises(ValueError, match=r"encoder: expected .* include_encoder=False"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", include_encoder=False)
    states, mask = make_states()
    assert_bits(
        sk.load(tmp_path / "model").decode_states(states, mask),
        model.decode_states(states, mask),
    )


def test_push_to_hub_uploads_a_whole_checkpoint(tmp_path: Path, monkeypatch) -> None:
    model = sk.Recommender(make_student(), make_catalogue())
    calls = []

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            sk.load(folder_path)
            calls.append((repo_id, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert model.push_to_hub("org/student", private=True) == "https://hub/commit/1"
    assert calls == [("org/student", True, True), ("org/student", "Upload student")]
