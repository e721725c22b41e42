"""A student as a directory: read with every byte checked, written whole or not at all.

Format version 1, three files:

    config.json           {"format": "sidmlp", "format_version": 1,
                           "student": {fields of StudentSpec}, "tokens": {fields of TokenSpec},
                           "encoder": null | {"kind": "t5", fields of T5Spec}
                                           | {"kind": "mlp", fields of MLPEncoderSpec},
                           "decode": {fields of DecodeSpec},
                           "checksums": {file name: sha256 in hex, for each of the three}}
    model.safetensors     "student.<name>" as in sidmlp_kernels.student and, with an encoder,
                          "encoder.<name>" as in sidmlp_kernels.encoder or .mlp_encoder; written as
                          fp32, read from any float dtype
    catalogue.safetensors see sidmlp_kernels.catalogue_file

A file cannot hold its own checksum, so that of config.json is taken over its content without it:
sha256 of json.dumps(content, sort_keys=True, separators=(",", ":")).encode(). A reader refuses a
newer format_version before anything else, because the rules themselves may have changed.

Nothing is unpickled. A name that is no directory is looked up on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .catalogue import Catalogue
from .encoder import T5Encoder
from .mlp_encoder import MLPEncoder
from .spec import DecodeSpec, EncoderSpec, MLPEncoderSpec, StudentSpec, T5Spec, TokenSpec
from .student import Student

FORMAT = "sidmlp"
FORMAT_VERSION = 1
CONFIG, MODEL, CATALOGUE = "config.json", "model.safetensors", "catalogue.safetensors"
FILES = (CONFIG, MODEL, CATALOGUE)

_KEYS = {"format", "format_version", "student", "tokens", "encoder", "decode", "checksums"}
_REFETCH = "download or export the checkpoint again"
_T5, _MLP = "t5", "mlp"  # kinds of encoder
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a checkpoint directory holds, verified; `encoder` is None without one.

    Raises ValueError where the parts do not belong together.
    """

    student: Student
    tokens: TokenSpec
    decode: DecodeSpec
    catalogue: Catalogue
    encoder: T5Encoder | MLPEncoder | None = None

    def __post_init__(self) -> None:
        codes = self.student.spec.codes_per_level
        self.tokens.check_codes(codes)
        if len(self.decode.temperatures) != len(codes):
            raise ValueError(
                f"decode: expected temperatures for {len(codes)} levels, got "
                f"{len(self.decode.temperatures)}; use DecodeSpec.for_levels({len(codes)})"
            )
        check_catalogue(self.catalogue, codes)
        if self.encoder is not None:
            check_encoder(self.encoder.spec, self.student.spec, self.tokens)


def check_catalogue(catalogue: Catalogue, codes_per_level: tuple[int, ...]) -> None:
    """ValueError unless the student has a logit for every code that the catalogue may hold."""
    sizes = catalogue.codes_per_level
    fits = len(sizes) == len(codes_per_level)
    if not fits or any(c > s for c, s in zip(sizes, codes_per_level, strict=True)):
        raise ValueError(
            f"catalogue: expected {len(codes_per_level)} levels of at most {list(codes_per_level)} "
            f"codes as in the student, got {list(sizes)}; pass the catalogue of this student's "
            "tokenizer"
        )


def check_encoder(encoder: EncoderSpec, student: StudentSpec, tokens: TokenSpec) -> None:
    """ValueError unless the encoder embeds every token and gives states of the student's width."""
    if encoder.dim != student.dim:
        raise ValueError(
            f"encoder: expected dim={student.dim} as in the student, got {encoder.dim}; "
            "pass the encoder that the student was distilled from"
        )
    if encoder.vocab_size < tokens.vocab_size:
        raise ValueError(
            f"encoder: expected vocab_size >= {tokens.vocab_size}, the tokens in use, got "
            f"{encoder.vocab_size}; pass the TokenSpec that the encoder was trained with"
        )
    if isinstance(encoder, T5Spec):
        return
    if encoder.num_roles != student.num_levels:
        raise ValueError(
            f"encoder: expected num_roles={student.num_levels}, one for each level of the student, "
            f"got {encoder.num_roles}; pass the encoder that the student was distilled from"
        )
    if encoder.max_length < tokens.max_length:
        raise ValueError(
            f"encoder: expected max_length >= {tokens.max_length}, the longest request in tokens, "
            f"got {encoder.max_length}; lower max_items of the TokenSpec"
        )


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint directory, or downloads one from the hub when `path` is none.

    Raises ValueError naming file, what was expected, what was found and a remedy: for a missing,
    truncated, altered or foreign file, a newer format version, and wrong names, shapes or values.
    """
    directory = _directory(path)
    config = _read_config(directory / CONFIG)
    for name in (MODEL, CATALOGUE):
        _compare(directory / name, config["checksums"][name], _sha256(directory / name))
    with _blame(f"{directory / CONFIG}: student"):
        spec = StudentSpec.from_dict(config["student"])
    with _blame(f"{directory / CONFIG}: tokens"):
        tokens = TokenSpec.from_dict(config["tokens"])
    with _blame(f"{directory / CONFIG}: encoder"):
        encoder_spec = _encoder_spec(config["encoder"])
    with _blame(f"{directory / CONFIG}: decode"):
        decode = DecodeSpec.from_dict(config["decode"])
    with _blame(f"{directory / MODEL}"):
        owners = ("student",) if encoder_spec is None else ("student", "encoder")
        weights = _read_tensors(directory / MODEL, owners)
        student = Student(spec, weights["student"])
        encoder: T5Encoder | MLPEncoder | None = None
        if isinstance(encoder_spec, T5Spec):
            encoder = T5Encoder.from_weights(encoder_spec, weights["encoder"])
        elif encoder_spec is not None:
            encoder = MLPEncoder.from_weights(encoder_spec, weights["encoder"])
    catalogue = Catalogue.load(directory / CATALOGUE)  # names the file itself
    with _blame(f"{directory}"):
        return Checkpoint(student, tokens, decode, catalogue, encoder)


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Writes `checkpoint` into the directory `path`, replacing a checkpoint that is there.

    The files are complete in a temporary sibling before the directory is exchanged by renaming; an
    error or a crash before that leaves the old directory as it was, and one within the exchange
    leaves it under the name of the sibling. Other files of the old directory stay.

    Raises ValueError if `path` is a file, holds another program's config.json or model, or is the
    working directory (or one around it).
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: expected a directory, got a file; choose another name")
    working = Path.cwd().resolve()
    if target.exists() and (target == working or target in working.parents):
        raise ValueError(
            f"{target}: expected a directory that can be replaced as a whole, got the working "
            "directory or one around it; name a directory inside it"
        )
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    fresh.mkdir()
    try:
        if target.exists():
            fresh.chmod(stat.S_IMODE(target.stat().st_mode))
        _write_files(checkpoint, fresh)
        _exchange(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# -- writing


def _refuse_foreign(target: Path) -> None:
    """ValueError where the exchange would lose files of ours by name but not by content."""
    if not any((target / name).exists() for name in FILES):
        return
    try:
        config = json.loads((target / CONFIG).read_bytes())
        ours = isinstance(config, dict) and config.get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"{target}: expected a new directory or one with a {FORMAT} checkpoint, got one whose "
            f"{CONFIG} is missing, damaged or of another kind; choose another name, or remove "
            f"{', '.join(FILES)} from it"
        )


def _write_files(checkpoint: Checkpoint, directory: Path) -> None:
    encoder = checkpoint.encoder
    tensors = {f"student.{name}": w for name, w in checkpoint.student.weights.items()}
    if encoder is not None:
        state = encoder.state_dict().items()
        tensors |= {f"encoder.{name}": w.detach().float().cpu() for name, w in state}
    packed = safetensors.torch.save({name: w.contiguous() for name, w in tensors.items()})
    _write(directory / MODEL, packed)
    checkpoint.catalogue.save(directory / CATALOGUE)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "student": checkpoint.student.spec.to_dict(),
        "tokens": checkpoint.tokens.to_dict(),
        "encoder": None if encoder is None else _encoder_entry(encoder.spec),
        "decode": checkpoint.decode.to_dict(),
        "checksums": {name: _sha256(directory / name) for name in (MODEL, CATALOGUE)},
    }
    config["checksums"][CONFIG] = _config_checksum(config)
    # No newline at the end: the loss of even the last byte must be seen.
    _write(directory / CONFIG, json.dumps(config, indent=2).encode())


def _write(file: Path, content: bytes) -> None:
    with open(file, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _exchange(fresh: Path, target: Path) -> None:
    """Renames `fresh` to `target`; of an old `target`, the files of other names are kept."""
    if not target.exists():
        os.rename(fresh, target)
        return
    old = fresh.with_suffix(".old")
    try:
        os.rename(target, old)
        os.rename(fresh, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    for entry in old.iterdir():
        if entry.name not in FILES:
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)


# -- reading


def _directory(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"path: expected a checkpoint directory or a Hugging Face hub id, got {path!r}; "
            "pass it as a string or a pathlib.Path"
        )
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    name = os.fspath(path)
    if directory.exists() or not (isinstance(path, str) and _HUB_ID.fullmatch(path)):
        kind = "a file" if directory.exists() else "nothing"
        raise ValueError(
            f"{name}: expected a checkpoint directory with {', '.join(FILES)}, got {kind}; "
            "check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name}: expected a checkpoint directory or the id of a Hugging Face hub repository, "
            f"got neither ({type(error).__name__}: {error}); check the path, the id and the network"
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    with _open(file) as stream:
        content = stream.read()
    try:
        config = json.loads(content)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise ValueError(
            f"{file}: expected JSON, got {len(content)} bytes that are not ({error}); {_REFETCH}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f'{file}: expected "format": "{FORMAT}", got {got!r}; '
            "convert foreign models with Student.from_official and Recommender.save_pretrained"
        )
    version = config.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"{file}: expected a format_version from 1 to {FORMAT_VERSION}, got {version!r}; "
            f"{_REFETCH}"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file}: expected format_version {FORMAT_VERSION} or older, got {version}; "
            "upgrade sidmlp-kernels to read it"
        )
    missing, unknown = sorted(_KEYS - set(config)), sorted(set(config) - _KEYS)
    if missing or unknown:
        raise ValueError(
            f"{file}: expected the entries {sorted(_KEYS)}, got missing {missing} and unknown "
            f"{unknown}; {_REFETCH}"
        )
    checksums = config["checksums"]
    if not isinstance(checksums, dict) or sorted(checksums) != sorted(FILES):
        got = sorted(checksums) if isinstance(checksums, dict) else checksums
        raise ValueError(
            f"{file}: checksums: expected one for each of {sorted(FILES)}, got {got}; {_REFETCH}"
        )
    _compare(file, checksums[CONFIG], _config_checksum(config))
    return config


def _encoder_entry(spec: EncoderSpec) -> dict[str, Any]:
    return {"kind": _T5 if isinstance(spec, T5Spec) else _MLP, **spec.to_dict()}


def _encoder_spec(entry: object) -> EncoderSpec | None:
    if entry is None:
        return None
    kind = entry.get("kind") if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or kind not in (_T5, _MLP):
        raise ValueError(
            f'expected null or "kind": "{_T5}" or "{_MLP}", got {kind!r}; upgrade sidmlp-kernels'
        )
    fields = {name: value for name, value in entry.items() if name != "kind"}
    return T5Spec.from_dict(fields) if kind == _T5 else MLPEncoderSpec.from_dict(fields)


@contextlib.contextmanager
def _blame(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _open(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"{file}: expected a file, as every checkpoint has {', '.join(FILES)}, got none; "
            f"{_REFETCH}"
        ) from error


def _read_tensors(file: Path, owners: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Owner -> name -> tensor, of names <owner>.<name>."""
    try:
        tensors = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file, got one that cannot be read as such ({error}); "
            "convert it with safetensors.torch.save_file, pickles are never loaded"
        ) from error
    found: dict[str, dict[str, Tensor]] = {owner: {} for owner in owners}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner not in found:
            raise ValueError(
                f"expected names that begin with {' or '.join(f'{o}.' for o in owners)}, got "
                f"{name}; export the model again, or describe its encoder in {CONFIG}"
            )
        found[owner][rest] = tensor
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with _open(file) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _compare(file: Path, expected: object, got: str) -> None:
    if expected != got:
        raise ValueError(
            f"{file}: expected sha256 {expected} (checksums in {CONFIG}), got {got} of "
            f"{file.stat().st_size} bytes, so it is truncated or altered; {_REFETCH}"
        )


def _config_checksum(config: Mapping[str, Any]) -> str:
    others = {name: value for name, value in config["checksums"].items() if name != CONFIG}
    content = {**config, "checksums": others}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
