"""A checkpoint survives a round trip; every kind of damage is a ValueError that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sidmlp_kernels import checkpoint as module
from sidmlp_kernels.catalogue import Catalogue
from sidmlp_kernels.checkpoint import Checkpoint, load, save
from sidmlp_kernels.encoder import T5Encoder
from sidmlp_kernels.spec import DecodeSpec, StudentSpec, T5Spec, TokenSpec
from sidmlp_kernels.student import Student, weight_shapes

CODES = (5, 7)
SPEC = StudentSpec(CODES, 8, 12, 2, 16, 6, 8, blocks_per_head=2)
TOKENS = TokenSpec.for_codes(CODES, num_user_tokens=2, max_items=3)
DECODE = DecodeSpec((1.0, 0.5), (1.0, 2.0), 7, "codebook")
T5 = T5Spec(1, 8, 2, 4, 12, TOKENS.vocab_size + 3, "gated-gelu")


def make(seed: int = 0, encoder: bool = True) -> Checkpoint:
    torch.manual_seed(seed)
    weights = {name: torch.randn(shape) for name, shape in weight_shapes(SPEC).items()}
    catalogue = Catalogue.from_codes(
        [[0, 1], [4, 6], [4, 6]],
        [30, 10, 20],
        CODES,
        available=[True, False, True],
        known_codes=[[2, 2]],
        known_item_ids=[99],
    )
    t5 = None
    if encoder:
        shapes = {name: tuple(w.shape) for name, w in T5Encoder(T5).state_dict().items()}
        t5 = T5Encoder.from_weights(T5, {name: torch.randn(s) for name, s in shapes.items()})
    return Checkpoint(Student(SPEC, weights), TOKENS, DECODE, catalogue, t5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(make(), tmp_path / "model")
    return tmp_path / "model"


def assert_same(got: Checkpoint, wanted: Checkpoint) -> None:
    assert (got.student.spec, got.tokens, got.decode) == (SPEC, TOKENS, DECODE)
    for name, tensor in wanted.student.weights.items():
        assert torch.equal(got.student.weights[name], tensor)
    assert got.catalogue.codes.tolist() == wanted.catalogue.codes.tolist()
    assert got.catalogue.item_ids.tolist() == wanted.catalogue.item_ids.tolist()
    assert got.catalogue.available.tolist() == wanted.catalogue.available.tolist()
    known = got.catalogue.snapshot().known
    assert known.codes[known.lookup(np.array([99]))].tolist() == [[2, 2]]
    assert (got.encoder is None) == (wanted.encoder is None)
    if got.encoder is not None and wanted.encoder is not None:
        assert got.encoder.spec == wanted.encoder.spec
        for name, tensor in wanted.encoder.state_dict().items():
            assert torch.equal(got.encoder.state_dict()[name], tensor)


@pytest.mark.parametrize("encoder", [True, False])
def test_round_trip(tmp_path: Path, encoder: bool) -> None:
    wanted = make(encoder=encoder)
    save(wanted, tmp_path / "deep" / "model")
    assert_same(load(tmp_path / "deep" / "model"), wanted)
    assert_same(load(str(tmp_path / "deep" / "model")), wanted)
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == sorted(module.FILES)
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_the_files_are_as_documented(saved: Path) -> None:
    """Written out by hand from the format, so that a change of the format cannot pass unseen."""
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == "sidmlp"
    assert config["format_version"] == 1
    assert config["student"]["codes_per_level"] == [5, 7]
    assert config["tokens"]["code_offsets"] == [1, 6]
    assert config["encoder"]["kind"] == "t5"
    assert config["decode"]["normalisation"] == "codebook"
    for name in ("model.safetensors", "catalogue.safetensors"):
        digest = hashlib.sha256((saved / name).read_bytes()).hexdigest()
        assert config["checksums"][name] == digest
    own = config["checksums"].pop("config.json")
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    assert own == hashlib.sha256(text.encode()).hexdigest()
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert tensors["student.readout.query_proj.weight"].dtype == torch.float32
    assert "encoder.final_layer_norm.weight" in tensors


# -- replacing


def test_an_old_checkpoint_is_replaced_and_other_files_stay(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("mine too")
    os.chmod(saved, 0o750)
    save(make(seed=1, encoder=False), saved)
    assert_same(load(saved), make(seed=1, encoder=False))
    assert (saved / "README.md").read_text() == "mine"
    assert (saved / "notes" / "a.txt").read_text() == "mine too"
    assert saved.stat().st_mode & 0o777 == 0o750
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("step", ["_write_files", "_config_checksum", "_exchange"])
def test_an_error_while_saving_leaves_the_old_one(saved: Path, step: str, monkeypatch) -> None:
    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(make(seed=1), saved)
    monkeypatch.undo()
    assert_same(load(saved), make())
    assert os.listdir(saved.parent) == ["model"]


def test_an_error_between_the_two_renames_brings_the_old_one_back(saved: Path, monkeypatch) -> None:
    rename, calls = os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("interrupted")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="interrupted"):
        save(make(seed=1), saved)
    monkeypatch.undo()
    assert len(calls) == 3
    assert_same(load(saved), make())
    assert os.listdir(saved.parent) == ["model"]


def test_targets_that_cannot_be_replaced(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a directory, got a file"):
        save(make(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save(make(), ".")
    save(make(), "inside")
    assert_same(load("inside"), make())


def test_another_programs_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    for files in ({"config.json": '{"model_type": "t5"}'}, {"model.safetensors": "weights"}):
        for name, text in files.items():
            (tmp_path / "t5" / name).write_text(text)
        with pytest.raises(ValueError, match="choose another name"):
            save(make(), tmp_path / "t5")
        for name, text in files.items():
            assert (tmp_path / "t5" / name).read_text() == text
            (tmp_path / "t5" / name).unlink()
    save(make(), tmp_path / "t5")
    assert_same(load(tmp_path / "t5"), make())


# -- damage


def rewrite(directory: Path, change=lambda config: None, **files: bytes) -> None:
    """Replaces files and edits config.json, then repairs every checksum: damage without a trace."""
    config = json.loads((directory / "config.json").read_text())
    for name, content in files.items():
        (directory / f"{name}.safetensors").write_bytes(content)
        config["checksums"][f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
    change(config)
    config["checksums"].pop("config.json", None)
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    config["checksums"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", module.FILES)
def test_truncated_altered_empty_and_missing_files(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    middle = len(content) * 3 // 4
    for damaged in (
        content[:-1],
        content[: len(content) // 2],
        b"",
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        content[:8] + content[9:],
    ):
        (saved / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            load(saved)
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: expected a file.*got none"):
        load(saved)
    (saved / name).write_bytes(content)
    assert_same(load(saved), make())


def test_a_value_changed_in_config_json(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    assert '"num_beams": 7' in text
    (saved / "config.json").write_text(text.replace('"num_beams": 7', '"num_beams": 8'))
    with pytest.raises(ValueError, match=r"config.json: expected sha256 .* altered"):
        load(saved)


def test_formatting_of_config_json_is_free(saved: Path) -> None:
    rewrite(saved)
    assert_same(load(saved), make())


def put(*path, value):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=2), "expected format_version 1 or older, got 2; upgrade"),
        (put("format_version", value="1"), "format_version from 1 to 1, got '1'"),
        (put("format_version", value=True), "format_version from 1"),
        (put("format_version", value=0), "format_version from 1"),
        (put("format", value="bert"), 'expected "format": "sidmlp", got \'bert\''),
        (put("colour", value=1), r"missing \[\] and unknown \['colour'\]"),
        (lambda c: c.pop("decode"), r"missing \['decode'\]"),
        (lambda c: c["checksums"].pop("model.safetensors"), "checksums: expected one for each"),
        (put("checksums", "other.bin", value="0"), "checksums: expected one for each"),
        (lambda c: c["student"].pop("dim"), r"student: StudentSpec: .*missing \['dim'\]"),
        (put("student", "dim", value=-1), "student: dim: expected"),
        (put("student", "dim", value=9), r"model.safetensors: student weights: .*\[8, 8\]"),
        (put("student", "codes_per_level", value=[5, 8]), "tokens|model.safetensors"),
        (put("student", value=None), "student: StudentSpec: expected an object"),
        (put("tokens", "eos_id", value=1), "tokens: eos_id"),
        (put("tokens", "user_offset", value=6), "overlapping"),
        (put("decode", "temperatures", value=[1.0, 0.0]), r"decode: temperatures\[1\]"),
        (put("decode", "normalisation", value="none"), "decode: normalisation"),
        (put("encoder", "kind", value="mamba"), "encoder: .*'mamba'; upgrade"),
        (put("encoder", value=None), "begin with student., got encoder."),
        (put("encoder", "num_layers", value=2), r"model.safetensors: .*missing block.1"),
        (put("encoder", "vocab_size", value=4), r"model.safetensors: .*embed_tokens"),
    ],
)
def test_wrong_config_with_right_checksums(saved: Path, change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"sidmlp"', "\x00\xff"])
def test_config_that_is_no_object(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(saved)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("student.readout.norm1.bias", None, "missing readout.norm1.bias"),
        ("student.readout.norm1.bias", torch.zeros(9), r"expected shape \[8\], got \[9\]"),
        ("student.readout.norm1.bias", torch.zeros(8, dtype=torch.int32), "float dtype"),
        ("student.readout.norm1.bias", torch.full((8,), float("nan")), "finite .* got nan"),
        ("student.heads.0.output.bias", torch.full((5,), float("inf")), "finite .* got inf"),
        ("student.extra", torch.zeros(1), "unknown extra"),
        ("teacher.extra", torch.zeros(1), "begin with student. or encoder., got teacher.extra"),
        ("encoder.final_layer_norm.weight", None, "missing final_layer_norm.weight"),
        ("encoder.final_layer_norm.weight", torch.full((8,), float("nan")), "finite"),
    ],
)
def test_wrong_tensors_with_right_checksums(saved: Path, name, value, message) -> None:
    tensors = tensors_of(saved)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    rewrite(saved, model=safetensors.torch.save(tensors))
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{message}"):
        load(saved)


@pytest.mark.parametrize("name", ["model", "catalogue"])
def test_a_pickle_renamed_is_not_loaded(saved: Path, tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"student.w": torch.ones(1)}, tmp_path / "model.pt")
    for content in (pickle.dumps(Bomb()), (tmp_path / "model.pt").read_bytes()):
        rewrite(saved, **{name: content})
        with pytest.raises(ValueError, match=rf"{name}.safetensors.*safetensors"):
            load(saved)
    assert not (tmp_path / "exploded").exists()


def test_a_catalogue_of_other_levels(saved: Path, tmp_path: Path) -> None:
    for codes in ([[0, 1, 2]], [[0, 7]]):
        Catalogue.from_codes(codes).save(tmp_path / "other")
        rewrite(saved, catalogue=(tmp_path / "other").read_bytes())
        with pytest.raises(ValueError, match="catalogue: expected 2 levels of at most"):
            load(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_read(saved: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(saved).items()}
    rewrite(saved, model=safetensors.torch.save(tensors))
    weight = load(saved).student.weights["readout.norm1.bias"]
    assert torch.equal(weight, tensors["student.readout.norm1.bias"].float())


# -- names


def test_a_hub_id_is_downloaded_only_when_it_is_no_directory(saved: Path, monkeypatch) -> None:
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(load("org/student"), make())
    assert asked == [("org/student", sorted(module.FILES))]
    monkeypatch.chdir(saved.parent)
    assert_same(load("model"), make())
    assert len(asked) == 1


def test_a_failed_download_is_a_value_error(monkeypatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"org/student: expected .* hub .*no network"):
        load("org/student")


@pytest.mark.parametrize("path", ["./nothing", "/no/such/model", "a/b/c", "~/no-such-model", ""])
def test_paths_are_never_taken_for_hub_ids(path: str, monkeypatch) -> None:
    def download(*_args, **_kwargs):
        pytest.fail("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"expected|missing"):
        load(path)
    with pytest.raises(ValueError, match="got nothing"):
        load(Path("nothing"))


def test_parts_that_do_not_belong_together() -> None:
    good = make()
    with pytest.raises(ValueError, match="decode: expected temperatures for 2 levels, got 3"):
        Checkpoint(good.student, TOKENS, DecodeSpec.for_levels(3), good.catalogue)
    with pytest.raises(ValueError, match="code_offsets: expected 2 levels"):
        Checkpoint(good.student, TokenSpec.for_codes((5,)), DECODE, good.catalogue)
    wide = T5Encoder(T5Spec(1, 9, 2, 4, 12, 50))
    with pytest.raises(ValueError, match="encoder: expected dim=8 as in the student, got 9"):
        Checkpoint(good.student, TOKENS, DECODE, good.catalogue, wide)
    small = T5Encoder(T5Spec(1, 8, 2, 4, 12, 5))
    with pytest.raises(ValueError, match="encoder: expected vocab_size >= 16"):
        Checkpoint(good.student, TOKENS, DECODE, good.catalogue, small)
