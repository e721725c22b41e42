"""The published assets: weights and semantic IDs in the release's layout, read as our models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_assets import (
    CODES,
    DIM,
    HISTORIES,
    ITEMS,
    LEVELS,
    VOCABULARY,
    PublishedEncoder,
    save_all,
    save_ids,
    save_teacher,
    tiger,
    token_batch,
)
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

from sidmlp.official import (
    Published,
    codes_of_items,
    encoder_from_official,
    read_published,
    read_semantic_ids,
    teacher_from_official,
)


@pytest.fixture
def teacher() -> T5ForConditionalGeneration:
    return tiger()


@pytest.fixture
def files(tmp_path, teacher) -> dict[str, Path]:
    return save_all(tmp_path, teacher)


class TestTeacher:
    def test_equals_the_t5_of_transformers(self, teacher, tmp_path, monkeypatch) -> None:
        def exact_norm(self, x):
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * x * scale

        # Its own takes the mean square in fp32, even of float64.
        monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", exact_norm)
        read = read_published(save_teacher(tmp_path / "t.pth", teacher))
        ours = teacher_from_official(read, CODES).double()
        teacher = teacher.double()
        ids, mask = token_batch(HISTORIES)
        codes = torch.tensor([[list(ITEMS["0C"])], [list(ITEMS["B00D"])], [list(ITEMS["B00A"])]])
        starts = torch.tensor(np.cumsum([1, *CODES])[:-1])
        start_token = torch.zeros(len(ids), 1, dtype=torch.int64)
        decoder_ids = torch.cat([start_token, (codes[:, 0] + starts)[:, :-1]], dim=1)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
            states = ours.encode(ids, mask)
            logits = ours.decoder_logits(states, mask, codes)[:, 0]
        wanted = theirs.encoder_last_hidden_state
        torch.testing.assert_close(states[mask], wanted[mask], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, theirs.logits, rtol=1e-10, atol=1e-10)
        assert theirs.logits.std() > 0.1  # so that agreement says something
        assert (ours.tokens.user_offset, ours.tokens.eos_id) == (VOCABULARY - 2, VOCABULARY - 1)

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_copies_of_the_embedding_may_be_left_out(self, teacher, tmp_path, kept) -> None:
        state = {f"t5.{name}": tensor for name, tensor in teacher.state_dict().items()}
        names = ["t5.encoder.embed_tokens.weight", "t5.decoder.embed_tokens.weight"]
        for name in [*names, "t5.lm_head.weight"][kept:]:
            state.pop(name, None)
        torch.save(state, tmp_path / "t.pth")
        ours = teacher_from_official(read_published(tmp_path / "t.pth"), CODES)
        assert torch.equal(ours.t5.lm_head.weight, teacher.shared.weight)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_decoder_layers": 3}, "as many layers .* got 2 and 3"),
            ({"feed_forward_proj": "gated-gelu"}, r"DenseReluDense\.wi\.weight: expected a matrix"),
            ({"vocab_size": VOCABULARY + 4}, f"expected {VOCABULARY} rows .* got {VOCABULARY + 4}"),
            (
                {"relative_attention_num_buckets": 16},
                r"relative_attention_bias.*expected \[32, 3\]",
            ),
        ],
    )
    def test_other_teachers_are_refused(self, tmp_path, change, message) -> None:
        path = save_teacher(tmp_path / "t.pth", tiger(**change))
        with pytest.raises(ValueError, match=message):
            teacher_from_official(read_published(path), CODES)

    def test_wrong_weights_are_named(self, teacher, tmp_path) -> None:
        state = {f"t5.{name}": tensor for name, tensor in teacher.state_dict().items()}
        missing = "t5.decoder.block.1.layer.1.EncDecAttention.k.weight"

        def refused(changes: dict[str, Tensor], without: str, message: str) -> None:
            content = {k: v for k, v in (state | changes).items() if k != without}
            torch.save(content, tmp_path / "t.pth")
            with pytest.raises(ValueError, match=message):
                teacher_from_official(read_published(tmp_path / "t.pth"), CODES)

        refused({}, missing, f"1 weights do not fit: {missing}: expected .*, got no such weight")
        refused({"t5.extra": torch.ones(1)}, "", "t5.extra: expected no such weight")
        refused({missing: torch.ones(2, 2)}, "", r"got \[2, 2\]")
        refused({}, "t5.shared.weight", "t5.shared.weight: expected a matrix, got nothing")
        other = {"t5.lm_head.weight": torch.zeros(VOCABULARY, DIM)}
        refused(other, "", "lm_head.weight: expected a copy of t5.shared.weight")

    def test_a_students_file_is_no_teacher(self, files) -> None:
        with pytest.raises(ValueError, match="expected TIGER's weights"):
            teacher_from_official(read_published(files["--student"]), CODES)


class TestEncoder:
    def test_computes_the_published_equations(self, teacher) -> None:
        torch.manual_seed(5)
        theirs = PublishedEncoder()
        table = teacher.shared.weight.detach()
        published = Published(Path("encoder.pth"), theirs.state_dict(), {})
        ours = encoder_from_official(published, table, LEVELS)
        ids, mask = token_batch(HISTORIES)
        with torch.no_grad():
            states = ours.double()(ids, mask)
            theirs = theirs.double()
            for row, valid, found in zip(ids, mask, states, strict=True):
                wanted = theirs(table.double()[row[valid]])
                torch.testing.assert_close(found[valid], wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pos_embed.weight", "expected an SID-MLP.. encoder"),
            ("layers.0.0.0.weight", "layers.0.0.0.weight: expected a matrix, got nothing"),
            ("layers.1.2.4.bias", r"layers\.1\.roles\.2\.linear_out\.bias: .* no such weight"),
            ("norm.weight", r"final_layer_norm\.weight: .* got no such weight"),
        ],
    )
    def test_missing_weights_are_named(self, files, teacher, tmp_path, name, message) -> None:
        state = torch.load(files["encoder"], weights_only=True)
        del state[name]
        torch.save(state, tmp_path / "e.pth")
        with pytest.raises(ValueError, match=message):
            encoder_from_official(read_published(tmp_path / "e.pth"), teacher.shared.weight, LEVELS)

    def test_unknown_weights_and_other_levels(self, files, teacher, tmp_path) -> None:
        state = torch.load(files["encoder"], weights_only=True)
        torch.save(state | {"layers.0.0.2.weight": torch.ones(3)}, tmp_path / "e.pth")
        with pytest.raises(ValueError, match=r"layers\.0\.0\.2\.weight: expected no such weight"):
            encoder_from_official(read_published(tmp_path / "e.pth"), teacher.shared.weight, LEVELS)
        with pytest.raises(ValueError, match="weights do not fit"):
            encoder_from_official(read_published(files["encoder"]), teacher.shared.weight, 2)


class TestSemanticIds:
    def test_codes_and_order_are_kept(self, tmp_path) -> None:
        found = read_semantic_ids(save_ids(tmp_path / "s"), CODES)
        assert found == {item: tuple(codes) for item, codes in ITEMS.items()}
        assert list(found) == list(ITEMS)
        # The last code counts from 1: nothing is shifted, and code 0 is nobody's.
        assert min(codes[-1] for codes in found.values()) == 1
        assert codes_of_items(found, ["0C", "B00A"], "s").tolist() == [ITEMS["0C"], ITEMS["B00A"]]

    def test_code_256_is_rejected_with_its_item(self, tmp_path) -> None:
        path = save_ids(tmp_path / "s", {"B1": [255, 0, 7, 255], "B2": [255, 0, 7, 256]})
        with pytest.raises(ValueError, match=r"item 'B2'.* 0\.\.255 at level 4, got 256; the last"):
            read_semantic_ids(path, (256,) * 4)
        path = save_ids(tmp_path / "s", {"B1": [256, 0, 7, 1]})
        with pytest.raises(
            ValueError, match=r"item 'B1'.* 0\.\.255 at level 1, got 256; the model"
        ):
            read_semantic_ids(path, (256,) * 4)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"B1": [1, 1]}, "item 'B1': expected a list of 3 codes, got 2"),
            ({"B1": "1 1 1"}, "item 'B1': expected a list of 3 codes, got str"),
            ({"B1": [1, 1, 1], "B2": [1, -1, 1]}, "item 'B2'.* at level 2, got -1"),
            ({"B1": [1.0, 1, 1]}, "item 'B1'.* at level 1, got 1.0"),
            ({"B1": [True, 1, 1]}, "item 'B1'.* at level 1, got True"),
            ({"B1": [None, 1, 1]}, "item 'B1'.* at level 1, got None"),
            ('{"B1": [1, 1, 1], "B1": [1, 1, 2]}', "item 'B1' stands there twice"),
            ('{"B1": [1, 1, 1],\n "B2": [1, 1', "line 2, column 13 is not JSON"),
            ("[[1, 1, 1]]", "expected a JSON object"),
            ("7", "expected a JSON object"),
            ("{}", "expected a JSON object"),
            ("", "line 1, column 1 is not JSON"),
            ("[" * 100_000, "s holds no item and its codes"),
            ('{"B1": [1, ' + "1" * 5000 + "]}", "s holds no item and its codes"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message) -> None:
        with pytest.raises(ValueError, match=message):
            read_semantic_ids(save_ids(tmp_path / "s", content), CODES)

    def test_missing_files_and_items(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="none does not exist"):
            read_semantic_ids(tmp_path / "none", CODES)
        with pytest.raises(ValueError, match="is a directory"):
            read_semantic_ids(tmp_path, CODES)
        (tmp_path / "bytes").write_bytes(b'{"\xff": 1}')
        with pytest.raises(ValueError, match="not UTF-8"):
            read_semantic_ids(tmp_path / "bytes", CODES)
        found = {"a": (1, 1, 1)}
        with pytest.raises(ValueError, match=r"ids has no .* for 2 of 3 items: 'x', 'y'; read"):
            codes_of_items(found, ["x", "a", "y"], "ids")


class Unwanted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestWeightFiles:
    def test_code_in_a_file_never_runs(self, tmp_path) -> None:
        torch.save({"model_state_dict": {}, "args": Unwanted(tmp_path / "ran")}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="more than tensors and plain values"):
            read_published(tmp_path / "w.pth")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, "got an empty one"),
            ([torch.ones(1)], "expected a state dict, got list"),
            ({"model_state_dict": [1]}, "expected a state dict, got list"),
            ({"model_state_dict": {"a": torch.ones(1)}, "args": [1]}, "a dict as args, got list"),
            ({"a": torch.ones(2, dtype=torch.int64)}, r"a: expected .* got torch\.int64"),
            ({"a": 3}, "a: expected a floating-point tensor, got int"),
            ({"a": torch.tensor([1.0, float("nan")])}, "a: expected finite weights"),
            ({"model_state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace()}, "more than"),
        ],
    )
    def test_what_is_no_state_dict(self, tmp_path, content, message) -> None:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            read_published(tmp_path / "w.pth")

    def test_missing_and_damaged(self, tmp_path, files) -> None:
        with pytest.raises(ValueError, match=r"none\.pth does not exist"):
            read_published(tmp_path / "none.pth")
        with pytest.raises(ValueError, match="is a directory"):
            read_published(tmp_path)
        whole = files["--teacher"].read_bytes()
        for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
            (tmp_path / "w.pth").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"w\.pth is damaged") as caught:
                read_published(tmp_path / "w.pth")
            assert "weights_only" not in str(caught.value)  # torch's advice to run what is there

    @pytest.mark.parametrize(
        ("said", "reads"),
        [
            ({"model_type": "SID-MLP"}, "teacher"),
            ({"model_type": "SID-MLP", "args": {"encoder_ckpt": None}}, "teacher"),
            ({"args": {"encoder_ckpt": None}}, "teacher"),
            ({"model_type": "SID-MLP++"}, "own"),
            ({"args": {"encoder_ckpt": "e.pth"}}, "own"),
            ({"model_type": "SID-MLP", "args": {"encoder_ckpt": "e.pth"}}, "own"),
            ({}, None),
            ({"args": {"num_heads": 4}}, None),
            ({"model_type": "SIDMLPPlus", "args": {"encoder_ckpt": None}}, None),
            ({"args": {"encoder_ckpt": None, "mlp_encoder": "e.pth"}}, None),
            ({"args": {"encoder_ckpt": None}, "encoder_state_dict": {}}, None),
        ],
    )
    def test_whose_states_a_student_reads(self, tmp_path, said, reads) -> None:
        torch.save({"model_state_dict": {"a": torch.ones(1)}, **said}, tmp_path / "w.pth")
        assert read_published(tmp_path / "w.pth").encoder == reads

    def test_a_bare_state_dict_does_not_say(self, tmp_path) -> None:
        torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
        assert read_published(tmp_path / "w.pth").encoder is None
