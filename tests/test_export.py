"""Checkpoints as written, read back with nothing but json, hashlib and safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidmlp.beam import beam_decode
from sidmlp.encoder_assets import mlp_encoder_assets, t5_encoder_assets
from sidmlp.export import export_checkpoint, token_layout
from sidmlp.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sidmlp.student import Student, StudentConfig
from sidmlp.trie import Trie

SIZES = (6, 5, 7)


def make_student() -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(SIZES, 8, 8, 2, 16, 12, 8, 2))


def make_catalogue(items: int = 30) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    codes = np.stack([random.integers(0, c, items) for c in SIZES], axis=1)
    return codes, random.permutation(1000)[:items]


def make_t5(feed_forward: str = "relu") -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra `train`")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=25,
        d_model=8,
        d_kv=3,
        num_heads=2,
        d_ff=10,
        num_layers=2,
        feed_forward_proj=feed_forward,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def export(directory: Path, **changes: Any) -> None:
    codes, ids = make_catalogue()
    arguments = {"student": make_student(), "codes": codes, "item_ids": ids}
    export_checkpoint(directory, **{**arguments, "tokens": token_layout(SIZES), **changes})


def test_files_hold_the_agreed_format(tmp_path: Path) -> None:
    codes, ids = make_catalogue()
    stock = np.arange(30) % 3 > 0
    known = (codes[:4], np.arange(2000, 2004))
    decode = {"num_beams": 7, "level_weights": (1, 2, 0.5)}
    export(tmp_path / "model", available=stock, known=known, decode=decode)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "catalogue.safetensors",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "model/config.json").read_text())
    checksums = config.pop("checksums")
    assert config == {
        "format": "sidmlp",
        "format_version": 1,
        "student": {
            "codes_per_level": [6, 5, 7],
            "dim": 8,
            "attention_dim": 8,
            "num_heads": 2,
            "ffn_dim": 16,
            "hidden_dim": 12,
            "embedding_dim": 8,
            "blocks_per_head": 2,
            "layer_norm_eps": 1e-5,
        },
        "tokens": {
            "pad_id": 0,
            "code_offsets": [1, 7, 12],
            "user_offset": 19,
            "num_user_tokens": 1,
            "eos_id": 20,
            "max_items": 20,
        },
        "encoder": None,
        "decode": {
            "num_beams": 7,
            "normalisation": "children",
            "temperatures": [1.0, 1.0, 1.0],
            "level_weights": [1.0, 2.0, 0.5],
        },
    }
    for name in ("model.safetensors", "catalogue.safetensors"):
        content = (tmp_path / "model" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksums[name]
    own = checksums.pop("config.json")
    compact = json.dumps({**config, "checksums": checksums}, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(compact.encode()).hexdigest() == own

    weights = load_file(tmp_path / "model/model.safetensors")
    expected = make_student().state_dict()
    assert set(weights) == {f"student.{name}" for name in expected}
    assert all(torch.equal(weights[f"student.{name}"], w) for name, w in expected.items())
    catalogue = load_file(tmp_path / "model/catalogue.safetensors")
    assert {name: tensor.dtype for name, tensor in catalogue.items()} == {
        "codes": torch.int32,
        "item_ids": torch.int64,
        "available": torch.uint8,
        "known_codes": torch.int32,
        "known_item_ids": torch.int64,
    }
    assert catalogue["codes"].tolist() == codes.tolist()
    assert catalogue["item_ids"].tolist() == ids.tolist()
    assert catalogue["available"].tolist() == stock.astype(int).tolist()
    assert catalogue["known_item_ids"].tolist() == [2000, 2001, 2002, 2003]
    assert catalogue["known_codes"].tolist() == codes[:4].tolist()


def test_half_precision_students_are_stored_as_fp32(tmp_path: Path) -> None:
    student = make_student().bfloat16()
    export(tmp_path / "model", student=student)
    weights = load_file(tmp_path / "model/model.safetensors")
    for name, weight in student.state_dict().items():
        assert weights[f"student.{name}"].dtype == torch.float32
        assert torch.equal(weights[f"student.{name}"], weight.float())


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_t5_encoder_travels_along(tmp_path: Path, feed_forward: str, part: str) -> None:
    model = make_t5(feed_forward)
    fields, state = t5_encoder_assets(model if part == "whole" else model.encoder)
    export(tmp_path / "model", encoder_config=fields, encoder_state_dict=state)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["encoder"] == {
        "kind": "t5",
        "num_layers": 2,
        "dim": 8,
        "num_heads": 2,
        "head_dim": 3,
        "ffn_dim": 10,
        "vocab_size": 25,
        "feed_forward": feed_forward,
        "relative_buckets": 8,
        "relative_max_distance": 16,
        "layer_norm_eps": 1e-6,
    }
    weights = load_file(tmp_path / "model/model.safetensors")
    stored = {name: w for name, w in weights.items() if name.startswith("encoder.")}
    expected = model.encoder.state_dict()
    assert set(stored) == {f"encoder.{name}" for name in expected}
    assert all(torch.equal(stored[f"encoder.{name}"], w) for name, w in expected.items())
    # The copies are the checkpoint's own: training may go on.
    state["final_layer_norm.weight"].zero_()
    assert (model.encoder.final_layer_norm.weight == 1).all()


def test_the_inference_package_reads_it_and_means_the_same(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip(
        "sidmlp_kernels.checkpoint", reason="the inference package is not built"
    )
    codes, ids = make_catalogue()
    fields, state = t5_encoder_assets(make_t5())
    stock = np.arange(30) % 3 > 0
    export(
        tmp_path / "model",
        available=stock,
        encoder_config=fields,
        encoder_state_dict=state,
        decode={"normalisation": "codebook"},
    )
    got = checkpoint.load(tmp_path / "model")
    for name, weight in make_student().state_dict().items():
        assert torch.equal(got.student.weights[name], weight), name
    assert got.decode.normalisation == "codebook"
    assert got.tokens.eos_id == 20
    ours = Trie.from_codes(codes, ids, stock, SIZES).tensors()
    theirs = got.catalogue.snapshot().trie_tensors("cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    tokens = torch.tensor([[19, 3, 9, 14, 20], [19, 1, 7, 12, 20]])
    with torch.no_grad():
        expected = make_t5().encoder(tokens).last_hidden_state
        states = got.encoder(tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def make_mlp(**changes: int) -> MLPEncoder:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_roles": 3, "dim": 8, "hidden_dim": 12, "vocab_size": 21}
    return MLPEncoder(MLPEncoderConfig(**{**sizes, "max_length": 62, **changes}))


def test_an_mlp_encoder_travels_along_and_means_the_same(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip(
        "sidmlp_kernels.checkpoint", reason="the inference package is not built"
    )
    model = make_mlp()
    fields, state = mlp_encoder_assets(model)
    export(tmp_path / "model", encoder_config=fields, encoder_state_dict=state)
    entry = json.loads((tmp_path / "model/config.json").read_text())["encoder"]
    assert entry == {"kind": "mlp", **dataclasses.asdict(model.config)}
    got = checkpoint.load(tmp_path / "model")
    tokens = torch.tensor([[19, 3, 9, 14, 20], [19, 1, 7, 12, 20]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(got.encoder(tokens, mask), model(tokens, mask))


def test_a_wrong_mlp_encoder_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_roles": 2}, "num_roles 3"),
        ({"max_length": 61}, "max_length >= 62"),
        ({"dim": 16}, "expected dim 8"),
        ({"vocab_size": 20}, "vocab_size > 20"),
    ):
        fields, state = mlp_encoder_assets(make_mlp(**changes))
        with pytest.raises(ValueError, match=f"encoder_config: .*{message}"):
            export(tmp_path / "model", encoder_config=fields, encoder_state_dict=state)
    fields, state = mlp_encoder_assets(make_mlp())
    state.pop("layers.1.roles.2.norm.bias")
    with pytest.raises(ValueError, match=r"layers.1.roles.2.norm.bias: expected shape \(12,\)"):
        export(tmp_path / "model", encoder_config=fields, encoder_state_dict=state)
    with pytest.raises(ValueError, match=r"model: expected a sidmlp.mlp_encoder.MLPEncoder"):
        mlp_encoder_assets(make_student())  # type: ignore[arg-type]


def test_an_export_replaces_the_old_one_and_keeps_other_files(tmp_path: Path) -> None:
    export(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("a model card")
    export(tmp_path / "model", decode={"num_beams": 9})
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["decode"]["num_beams"] == 9
    assert (tmp_path / "model/README.md").read_text() == "a model card"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: Any) -> None:
    export(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sidmlp.export.os.{name}", full)
            with pytest.raises(OSError, match="no space"):
                export(tmp_path / "model", decode={"num_beams": 9})
        assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_foreign_directories_are_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="expected a new or empty directory"):
            export(tmp_path / name)
    assert (tmp_path / "thesis/config.json").read_text() == '{"model_type": "t5"}'
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="got the working directory"):
        export(Path())
    export(Path("inside"))  # a new directory in it is fine
    assert (tmp_path / "here/inside/config.json").is_file()


def poisoned() -> Student:
    student = make_student()
    with torch.no_grad():
        student.heads[1].output.bias[2] = float("nan")
    return student


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": poisoned()},
            r"student\.heads\.1\.output\.bias: expected finite weights, got 1",
        ),
        ({"codes": np.tile([0, 6, 0], (30, 1))}, r"codes: expected 0\.\.4 at level 2, got 6"),
        ({"item_ids": np.zeros(30, dtype=int)}, "item_ids: expected every id once, got 0"),
        ({"available": [True]}, "available: expected 30 flags"),
        ({"known": ([[0, 0, 0]], [int(make_catalogue()[1][3])])}, "known: expected ids outside"),
        ({"tokens": {"pad_id": 0}}, "tokens: expected the fields"),
        ({"tokens": token_layout((6, 5))}, "tokens: expected 3 code_offsets"),
        ({"tokens": token_layout((6, 5, 6))}, "tokens: expected separate ids"),
        ({"tokens": {**token_layout(SIZES), "eos_id": 0}}, "tokens: expected separate ids"),
        ({"decode": {"beams": 3}}, r"decode: .*unknown \['beams'\]"),
        ({"decode": {"num_beams": 0}}, "decode: expected num_beams >= 1"),
        ({"decode": {"temperatures": [1.0]}}, "temperatures: expected 3 finite"),
        ({"encoder_config": {}}, "expected both or neither"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_encoder_is_refused(tmp_path: Path) -> None:
    fields, state = t5_encoder_assets(make_t5())
    shorter = {name: w for name, w in state.items() if name != "final_layer_norm.weight"}
    wrong = [
        ({**fields, "vocab_size": 20}, state, "encoder_config: expected dim 8"),
        ({**fields, "dim": 16}, state, "encoder_config: expected dim 8"),
        ({**fields, "ffn_dim": 11}, state, "expected shape .*11"),
        ({**fields, "feed_forward": "swish"}, state, "feed_forward to be one of"),
        ({**fields, "extra": 1}, state, "encoder_config: expected the fields"),
        (fields, shorter, "final_layer_norm.weight: expected shape .*got no such weight"),
    ]
    for config, weights, message in wrong:
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "model", encoder_config=config, encoder_state_dict=weights)
    with pytest.raises(ValueError, match="model: expected a transformers T5 encoder"):
        t5_encoder_assets(make_student())


def test_importing_the_exporter_does_not_import_transformers() -> None:
    code = "import sys, sidmlp.export; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_round_trip_through_the_files_decodes_the_same(tmp_path: Path) -> None:
    codes, ids = make_catalogue()
    export(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    config = json.loads((tmp_path / "model/config.json").read_text())
    student = Student(StudentConfig(**config["student"]))
    student.load_state_dict({name.removeprefix("student."): w for name, w in weights.items()})
    stored = load_file(tmp_path / "model/catalogue.safetensors")
    context = torch.randn(3, 8)
    got, expected = (
        beam_decode(model, context, trie, 5, 10)
        for model, trie in (
            (student, Trie.from_codes(stored["codes"], stored["item_ids"], None, SIZES)),
            (make_student(), Trie.from_codes(codes, ids, None, SIZES)),
        )
    )
    assert torch.equal(got.items, expected.items)
    assert torch.equal(got.scores, expected.scores)


@pytest.mark.parametrize("sizes", [(2,) * 9, (4, 32_768)])
def test_what_no_reader_takes_is_not_written(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    student = Student(StudentConfig(sizes, 8, 8, 2, 16, 4, 8, 1))
    codes = np.zeros((1, len(sizes)), np.int64)
    with pytest.raises(ValueError, match=r"codes_per_level: expected 1\.\.8 levels .*; .* fewer"):
        export(
            tmp_path / "s", student=student, codes=codes, item_ids=[0], tokens=token_layout(sizes)
        )
    assert not (tmp_path / "s").exists()


def test_the_limits_are_the_readers() -> None:
    from sidmlp.data import tokens
    from sidmlp_kernels import spec

    assert (tokens.MAX_LEVELS, tokens.MAX_CODES) == (spec.MAX_LEVELS, spec.MAX_CODES)


@pytest.mark.parametrize("name", ["num_user_tokens", "max_items"])
def test_tokens_for_nobody_or_nothing_are_refused(tmp_path: Path, name: str) -> None:
    tokens = {**token_layout(SIZES), name: 0}
    with pytest.raises(ValueError, match=r"tokens: expected .* >= 1, got .*; "):
        export(tmp_path / "s", tokens=tokens)
