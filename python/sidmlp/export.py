"""Write a trained student as a checkpoint directory, the contract with the inference package.

    config.json            {"format": "sidmlp", "format_version": 1, "student": sizes,
                            "tokens": conventions, "encoder": null or {"kind": "t5" or "mlp",
                            sizes}, "decode": defaults, "checksums": {file name: sha256 in hex}}
    model.safetensors      "student.<name>" and, with an encoder, "encoder.<name>", all fp32
    catalogue.safetensors  codes int32 [N, L], item_ids int64 [N], available uint8 [N] and, where
                           histories may hold items that are never recommended, known_codes
                           int32 [M, L] and known_item_ids int64 [M]; the metadata entry
                           codes_per_level is a JSON list

The checksum of config.json is taken over its content without that checksum, as compact JSON with
sorted keys. The directory appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from sidmlp.beam import LevelOptions
from sidmlp.data import check_servable
from sidmlp.encoder_assets import check_fields, checked_encoder
from sidmlp.student import Student
from sidmlp.trie import catalogue_arrays

FORMAT, FORMAT_VERSION = "sidmlp", 1
CONFIG, MODEL, CATALOGUE = "config.json", "model.safetensors", "catalogue.safetensors"
FILES = (CONFIG, MODEL, CATALOGUE)

TOKEN_FIELDS = ("pad_id", "code_offsets", "user_offset", "num_user_tokens", "eos_id", "max_items")
DECODE_FIELDS = ("num_beams", "normalisation", "temperatures", "level_weights")


def token_layout(
    codes_per_level: Sequence[int], *, num_user_tokens: int = 1, max_items: int = 20
) -> dict[str, Any]:
    """The usual conventions: pad 0, codes from 1 level after level, user tokens, eos."""
    first = list(itertools.accumulate(codes_per_level, initial=1))
    return {
        "pad_id": 0,
        "code_offsets": first[:-1],
        "user_offset": first[-1],
        "num_user_tokens": num_user_tokens,
        "eos_id": first[-1] + num_user_tokens,
        "max_items": max_items,
    }


def _checked_tokens(tokens: Mapping[str, Any], codes_per_level: Sequence[int]) -> dict[str, Any]:
    fields = check_fields("tokens", tokens, TOKEN_FIELDS)
    offsets = fields["code_offsets"]
    if len(offsets) != len(codes_per_level):
        raise ValueError(
            f"tokens: expected {len(codes_per_level)} code_offsets, one per level, got "
            f"{len(offsets)}; use token_layout(codes_per_level)"
        )
    if min(fields["num_user_tokens"], fields["max_items"]) < 1:
        raise ValueError(
            f"tokens: expected num_user_tokens and max_items >= 1, got "
            f"{fields['num_user_tokens']} and {fields['max_items']}; a user without an id takes "
            f"one user token, and a history has at least one item"
        )
    spans = [range(o, o + c) for o, c in zip(offsets, codes_per_level, strict=True)]
    spans.append(range(fields["user_offset"], fields["user_offset"] + fields["num_user_tokens"]))
    spans += [range(token, token + 1) for token in (fields["pad_id"], fields["eos_id"])]
    spans.sort(key=lambda span: span.start)
    overlap = any(left.stop > right.start for left, right in itertools.pairwise(spans))
    if overlap or spans[0].start < 0 or fields["eos_id"] != spans[-1].start:
        raise ValueError(
            f"tokens: expected separate ids >= 0 with eos_id the largest, got {fields} for "
            f"{list(codes_per_level)} codes per level; use token_layout(codes_per_level)"
        )
    return fields


def _checked_decode(decode: Mapping[str, Any] | None, num_levels: int) -> dict[str, Any]:
    defaults = {
        "num_beams": 50,
        "normalisation": "children",
        "temperatures": [1.0] * num_levels,
        "level_weights": [1.0] * num_levels,
    }
    fields = check_fields("decode", defaults | dict(decode or {}), DECODE_FIELDS)
    options = LevelOptions.make(
        num_levels, fields["temperatures"], fields["level_weights"], fields["normalisation"]
    )
    if not isinstance(fields["num_beams"], int) or fields["num_beams"] < 1:
        raise ValueError(f"decode: expected num_beams >= 1, got {fields['num_beams']}; 50 is usual")
    fields["temperatures"] = list(options.temperatures)
    fields["level_weights"] = list(options.weights)
    return fields


def _fp32(owner: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Finite fp32 copies on the CPU, named owner.<name>; a copy each, as tied weights need."""
    copies = {}
    for name, weight in weights.items():
        copy = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not bool(copy.isfinite().all()):
            raise ValueError(
                f"{owner}.{name}: expected finite weights, got {int((~copy.isfinite()).sum())} "
                f"NaN or Inf; export an earlier checkpoint of the training"
            )
        copies[f"{owner}.{name}"] = copy
    return copies


def _catalogue_tensors(
    codes: Any,
    item_ids: Any,
    available: Any,
    known: tuple[Any, Any] | None,
    codes_per_level: Sequence[int],
) -> dict[str, Tensor]:
    code_array, ids, _ = catalogue_arrays(codes, item_ids, codes_per_level)
    stock = (
        np.ones(len(ids), dtype=bool) if available is None else np.asarray(available, dtype=bool)
    )
    if stock.shape != ids.shape:
        raise ValueError(
            f"available: expected {len(ids)} flags, one per item, got {list(stock.shape)}; "
            f"pass True for every item that may be recommended"
        )
    tensors = {
        "codes": torch.from_numpy(code_array.astype(np.int32)),
        "item_ids": torch.from_numpy(ids),
        "available": torch.from_numpy(stock.astype(np.uint8)),
    }
    if known is not None and len(known[1]) > 0:
        known_codes, known_ids, _ = catalogue_arrays(known[0], known[1], codes_per_level)
        both = np.intersect1d(ids, known_ids)
        if both.size:
            raise ValueError(
                f"known: expected ids outside the catalogue, got {both[0]} in both; list an item "
                f"either as recommendable or as known only"
            )
        tensors["known_codes"] = torch.from_numpy(known_codes.astype(np.int32))
        tensors["known_item_ids"] = torch.from_numpy(known_ids)
    return tensors


def _write(path: Path, content: bytes) -> str:
    """Write a new file through to the disk; returns its sha256."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _check_replaceable(target: Path) -> None:
    """Raises ValueError unless nothing is lost when a checkpoint takes the place of `target`."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not _is_checkpoint(target)):
        raise ValueError(
            f"{target}: expected a new or empty directory or a checkpoint to replace, got "
            f"something else; choose another name"
        )
    working = Path.cwd().resolve()
    if working.is_relative_to(target):
        raise ValueError(
            f"{target}: expected a directory that can be replaced as a whole, got the working "
            f"directory or one around it; name a directory inside it"
        )


def _is_checkpoint(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def _replace_directory(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; files of an old `target` that no checkpoint has move along."""
    if not target.exists():
        os.rename(fresh, target)
        return
    old = fresh.with_name(fresh.name + ".old")
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(old, target)
        raise
    for entry in old.iterdir():
        if entry.name not in FILES:
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)


def export_checkpoint(
    directory: str | os.PathLike[str],
    student: Student,
    codes: Any,
    item_ids: Any,
    *,
    tokens: Mapping[str, Any],
    encoder_config: Mapping[str, Any] | None = None,
    encoder_state_dict: Mapping[str, Tensor] | None = None,
    decode: Mapping[str, Any] | None = None,
    available: Any = None,
    known: tuple[Any, Any] | None = None,
) -> None:
    """Write student, catalogue and, if given, encoder as a checkpoint of format version 1.

    codes [N, L] and item_ids [N] (None = 0..N-1) are the catalogue, `available` [N] says which of
    its items may be recommended, `known` = (codes [M, L], item ids [M]) are further items that
    histories may contain. `tokens` as `token_layout` makes them, `encoder_config` and
    `encoder_state_dict` as `sidmlp.encoder_assets` makes them; `decode` overrides num_beams 50,
    normalisation "children", temperatures and level_weights 1.0.

    An existing checkpoint is replaced, other files beside it stay. Raises ValueError before
    anything is written: for sizes that do not fit together or that no reader takes, NaN or Inf in
    weights, bad codes or ids, and a `directory` that holds something other than a checkpoint.
    """
    target = Path(directory).expanduser().resolve()
    _check_replaceable(target)
    sizes = student.config.codes_per_level
    check_servable(sizes)
    token_fields = _checked_tokens(tokens, sizes)
    decode_fields = _checked_decode(decode, len(sizes))
    encoder_fields, encoder_weights = checked_encoder(
        encoder_config, encoder_state_dict, student.config.dim, token_fields
    )
    weights = _fp32("student", student.state_dict()) | _fp32("encoder", encoder_weights)
    catalogue = _catalogue_tensors(codes, item_ids, available, known, sizes)
    metadata = {"codes_per_level": json.dumps(list(sizes))}

    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    fresh.mkdir()
    try:
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "student": {**dataclasses.asdict(student.config), "codes_per_level": list(sizes)},
            "tokens": token_fields,
            "encoder": encoder_fields,
            "decode": decode_fields,
            "checksums": {
                MODEL: _write(fresh / MODEL, save(weights)),
                CATALOGUE: _write(fresh / CATALOGUE, save(catalogue, metadata)),
            },
        }
        compact = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["checksums"][CONFIG] = hashlib.sha256(compact.encode()).hexdigest()
        _write(fresh / CONFIG, json.dumps(content, indent=2).encode())
        _replace_directory(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
