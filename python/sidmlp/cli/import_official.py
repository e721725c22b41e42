"""Read what the paper's authors publish: TIGER, its semantic IDs, SID-MLP and SID-MLP++.

--run DIR  a run whose `sidmlp data` read the same category: codes, teacher and SID-MLP student
           become the run's own, so that distill, export and evaluate go on from there
--out DIR  a directory that `sidmlp_kernels.load` reads; needs a student. Items are numbered as the
           run's where --run is given, else in the order of the semantic IDs

One of the two is needed. Nothing is written unless everything fits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive, sizes
from .run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

    from sidmlp.mlp_encoder import MLPEncoder
    from sidmlp.official import Published
    from sidmlp.student import Student
    from sidmlp.teacher import Teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="run directory that `sidmlp data` has filled")
    add("--out", type=Path, metavar="DIR", help="checkpoint directory to write")
    add("--semantic-ids", type=Path, required=True, metavar="FILE", help=".sem_ids file")
    add("--teacher", type=Path, required=True, metavar="FILE", help="TIGER's .pth")
    add("--student", type=Path, metavar="FILE", help=".pth of a SID-MLP or SID-MLP++ student")
    add("--encoder", type=Path, metavar="FILE", help=".pth of the SID-MLP++ student's encoder")
    add("--heads", type=positive, metavar="N", help="attention heads of a student that says none")
    add("--codes", type=sizes, default=(256, 256, 256, 256), help="codes of every level")
    add("--max-items", type=positive, default=20, help="longer histories keep their newest items")
    add("--beams", type=positive, default=50, help="candidates kept per level unless told else")


@dataclass(frozen=True)
class _Assets:
    """What was read, checked to fit together."""

    items: list[str]  # the catalogue's, in its order
    codes: np.ndarray  # int64 [items, L]
    teacher: Teacher
    student: Student | None
    encoder: MLPEncoder | None


def run(options: argparse.Namespace) -> None:
    """Reads the published files and writes them in this package's formats."""
    from .artifacts import load_data

    if options.run is None and options.out is None:
        raise ValueError("one of --run and --out is needed, to say where the assets shall go")
    if options.out is not None and options.student is None:
        raise ValueError("--out needs --student; --run takes a teacher without one")
    if options.run is not None and options.out is None and options.encoder is not None:
        raise ValueError(
            "--encoder needs --out: a run's student reads the states of the run's teacher, not "
            "those of an SID-MLP++ encoder"
        )
    directory = None if options.run is None else RunDirectory(options.run)
    data = None if directory is None else load_data(directory)
    assets = _read(options, data)
    if options.out is not None:
        ids = list(range(len(assets.items))) if data is None else data.item_ids.tolist()
        titles = assets.items if data is None else [data.title(i) for i in range(data.num_items)]
        _export(options, assets, ids, titles)
    if directory is not None:
        _fill(directory, options, assets)


def _read(options: argparse.Namespace, data: Any) -> _Assets:
    from sidmlp.data import check_servable
    from sidmlp.official import (
        codes_of_items,
        encoder_from_official,
        read_published,
        read_semantic_ids,
        teacher_from_official,
    )

    check_servable(options.codes)
    semantic_ids = read_semantic_ids(options.semantic_ids, options.codes)
    items = list(semantic_ids)
    if data is not None:
        items = list(data.item_names or map(str, data.item_ids.tolist()))
    codes = codes_of_items(semantic_ids, items, str(options.semantic_ids))
    tiger = read_published(options.teacher)
    teacher = teacher_from_official(tiger, options.codes, max_items=options.max_items)
    student = encoder = None
    if options.student is not None:
        published = read_published(options.student)
        if published.reads_own_encoder and options.encoder is None:
            raise ValueError(
                f"{options.student} is an SID-MLP++ student, which reads states of an encoder of "
                "its own; name that with --encoder"
            )
        if published.model_type == "SID-MLP" and options.encoder is not None:
            raise ValueError(
                f"{options.student} is a SID-MLP student, which reads the states of its teacher's "
                "encoder; leave --encoder out"
            )
        student = _student(published, options, teacher)
    elif options.encoder is not None:
        raise ValueError("--encoder belongs to a student; name that with --student")
    if options.encoder is not None:
        table = teacher.t5.shared.weight.detach()
        encoder = encoder_from_official(read_published(options.encoder), table, len(options.codes))
    return _Assets(items, codes, teacher, student, encoder)


def _student(published: Published, options: argparse.Namespace, teacher: Teacher) -> Student:
    """The published student as the reference's, checked against the teacher."""
    import torch

    import sidmlp_kernels
    from sidmlp.student import Student, StudentConfig

    said = published.args.get("num_heads")
    if said is None and options.heads is None:
        raise ValueError(
            f"{published.path} does not say how many attention heads the student has, and no "
            "shape does; say it with --heads"
        )
    if said is not None and options.heads not in (None, said):
        raise ValueError(
            f"{published.path} says that its student has {said} attention heads, got --heads "
            f"{options.heads}; leave --heads out"
        )
    heads = options.heads if said is None else said
    try:
        found = sidmlp_kernels.Student.from_official(published.state, num_heads=heads)
    except ValueError as error:
        raise ValueError(f"{published.path}: {error}") from None
    spec = found.spec
    if spec.codes_per_level != tuple(options.codes) or spec.dim != teacher.config.dim:
        raise ValueError(
            f"{published.path}: expected a student of width {teacher.config.dim} with "
            f"{','.join(map(str, options.codes))} codes, got width {spec.dim} with "
            f"{','.join(map(str, spec.codes_per_level))}; name the teacher it was distilled from, "
            "and its codes with --codes"
        )
    for level, ours in enumerate(teacher.code_embeddings()[:-1]):
        theirs = found.weights[f"embeddings.{level}.weight"]
        # A student keeps the rows of its teacher; one of another teacher takes no token from here.
        if theirs.shape != ours.shape or not torch.equal(theirs, ours):
            raise ValueError(
                f"{published.path}: expected the embedding of its teacher {options.teacher}, got "
                f"other values at level {level + 1}; name the teacher it was distilled from"
            )
    student = Student(StudentConfig(**spec.to_dict()))
    student.load_state_dict(dict(found.weights))
    return student.eval()


def _export(
    options: argparse.Namespace, assets: _Assets, ids: list[int], titles: list[str]
) -> None:
    from sidmlp.data.files import write_json
    from sidmlp.encoder_assets import mlp_encoder_assets, t5_encoder_assets
    from sidmlp.export import export_checkpoint

    from .export import TITLES

    assert assets.student is not None
    config, weights = (
        t5_encoder_assets(assets.teacher.t5)
        if assets.encoder is None
        else mlp_encoder_assets(assets.encoder)
    )
    export_checkpoint(
        options.out,
        assets.student,
        assets.codes,
        ids,
        tokens=assets.teacher.tokens.as_dict(),
        encoder_config=config,
        encoder_state_dict=weights,
        decode={"num_beams": options.beams},
    )
    write_json(options.out / TITLES, dict(zip(map(str, ids), titles, strict=True)))
    print(
        f"{len(ids):,} items and their student are in {options.out}; load them with "
        f"sidmlp_kernels.load({str(options.out)!r})"
    )


def _fill(directory: RunDirectory, options: argparse.Namespace, assets: _Assets) -> None:
    """Writes codes, teacher and a T5-reading student as the commands leave them."""
    import numpy as np

    from sidmlp.data.files import sha256_of_file

    from .artifacts import save_codes, save_student, save_teacher

    fingerprint = save_codes(directory, assets.codes)
    directory.finish(
        "tokenize",
        f"{fingerprint} max_items={options.max_items}",
        codes_per_level=list(options.codes),
        max_items=options.max_items,
        unique_ids=len(np.unique(assets.codes, axis=0)),
        source=str(options.semantic_ids),
    )
    directory.restart_teacher()
    save_teacher(directory, assets.teacher)
    directory.finish(
        "train-teacher", sha256_of_file(directory.teacher), source=str(options.teacher)
    )
    directory.restart_student()
    made = "codes and teacher"
    if assets.student is not None and assets.encoder is None:
        save_student(directory, assets.student)
        directory.finish("distill", sha256_of_file(directory.student), source=str(options.student))
        made = "codes, teacher and student"
    print(f"{len(assets.items):,} items: {made} are in {directory.path}")
