"""Read what the paper's authors publish: TIGER, its semantic IDs, SID-MLP and SID-MLP++.

--run DIR  a run whose `sidmlp data` read the same category: codes, teacher and student, with its
           encoder if it is a SID-MLP++, become the run's own, so that distill, export and evaluate
           go on from there
--out DIR  a directory that `sidmlp_kernels.load` reads; needs a student. Items are numbered as the
           run's where --run is given, else in the order of the semantic IDs

One of the two is needed. Nothing is written unless everything fits, and nothing that is there is
replaced without --overwrite.
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
    add(
        "--encoder",
        type=Path,
        metavar="FILE",
        help=".pth of the SID-MLP++ student's encoder, or the word teacher for a student that "
        "reads its teacher's states but does not say so itself",
    )
    add("--heads", type=positive, metavar="N", help="attention heads of a student that says none")
    add(
        "--codes",
        type=sizes,
        default=(256, 256, 256, 256),
        metavar="N,N,..",
        help="codes of every level, the last one's included",
    )
    add("--max-items", type=positive, default=20, help="longer histories keep their newest items")
    add("--beams", type=positive, default=50, help="candidates kept per level unless told else")
    add("--overwrite", action="store_true", help="replace what --run or --out already holds")


TEACHER = Path("teacher")  # --encoder of a student without one


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
    directory = None if options.run is None else RunDirectory(options.run)
    data = None if directory is None else load_data(directory)
    if not options.overwrite:
        _check_nothing_is_lost(directory, options.out)
    assets = _read(options, data)
    if options.out is not None:
        ids = list(range(len(assets.items))) if data is None else data.item_ids.tolist()
        titles = assets.items if data is None else [data.title(i) for i in range(data.num_items)]
        _export(options, assets, ids, titles)
    if directory is not None:
        _fill(directory, options, assets)


def _check_nothing_is_lost(directory: RunDirectory | None, out: Path | None) -> None:
    """ValueError that names what is there already."""
    held = []
    if directory is not None:
        results = (directory.codes, directory.teacher, directory.student)
        held = [path.name for path in results if path.exists()]
        begun = (directory.teacher_progress, directory.student_progress, directory.features)
        held += [path.name for path in begun if path.exists()]
        if held:
            held = [f"{directory.path} has {', '.join(held)}"]
    if out is not None and out.is_dir() and any(out.iterdir()):
        held.append(f"{out} is not empty")
    if held:
        raise ValueError(
            f"{' and '.join(held)}, made by earlier commands; say --overwrite to replace that, or "
            "name another directory"
        )


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
        student = _student(published, options, teacher)
        _check_encoder(published, options.encoder)
    elif options.encoder is not None:
        raise ValueError("--encoder belongs to a student; name that with --student")
    if options.encoder not in (None, TEACHER):
        table = teacher.t5.shared.weight.detach()
        encoder = encoder_from_official(read_published(options.encoder), table, len(options.codes))
        positions, levels = encoder.config.max_length, len(options.codes)
        if positions < teacher.tokens.max_tokens:
            raise ValueError(
                f"{options.encoder}: expected {teacher.tokens.max_tokens} positions for histories "
                f"of {options.max_items} items, got {positions}; say --max-items "
                f"{max(1, (positions - 2) // levels)}, or what it was trained with"
            )
    return _Assets(items, codes, teacher, student, encoder)


def _check_encoder(published: Published, encoder: Path | None) -> None:
    """ValueError where --encoder is not what the student says, or neither says anything."""
    if published.encoder == "own" and encoder in (None, TEACHER):
        raise ValueError(
            f"{published.path} is a SID-MLP++ student, which reads states of an encoder of its "
            "own; name that with --encoder"
        )
    if published.encoder == "teacher" and encoder not in (None, TEACHER):
        raise ValueError(
            f"{published.path} is a SID-MLP student, which reads the states of its teacher's "
            "encoder; leave --encoder out"
        )
    if published.encoder is None and encoder is None:
        raise ValueError(
            f"{published.path} does not say whose states the student reads, and no weight does; "
            "name the encoder of a SID-MLP++ student with --encoder FILE, or say --encoder teacher "
            "if it is a SID-MLP student, which reads its teacher's"
        )


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
    from sidmlp.data.files import write_errors, write_json
    from sidmlp.encoder_assets import mlp_encoder_assets, t5_encoder_assets
    from sidmlp.export import export_checkpoint

    from .export import TITLES

    assert assets.student is not None
    config, weights = (
        t5_encoder_assets(assets.teacher.t5)
        if assets.encoder is None
        else mlp_encoder_assets(assets.encoder)
    )
    with write_errors(options.out):
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
    """Puts codes, teacher and student into the run as the commands leave them, all or none."""
    import numpy as np

    from sidmlp.data.files import sha256_of_file

    from .artifacts import save_codes, save_encoder, save_student, save_teacher
    from .staging import staged

    with staged(directory) as new:
        fingerprint = save_codes(new, assets.codes)
        new.finish(
            "tokenize",
            f"{fingerprint} max_items={options.max_items}",
            codes_per_level=list(options.codes),
            max_items=options.max_items,
            unique_ids=len(np.unique(assets.codes, axis=0)),
            source=str(options.semantic_ids),
        )
        save_teacher(new, assets.teacher)
        new.finish("train-teacher", sha256_of_file(new.teacher), source=str(options.teacher))
        made = "codes and teacher"
        if assets.student is not None:
            save_student(new, assets.student)
            fingerprint = sha256_of_file(new.student)
            facts = {"source": str(options.student)}
            made = "codes, teacher and student"
            if assets.encoder is not None:
                save_encoder(new, assets.encoder)
                fingerprint += f" {sha256_of_file(new.encoder)}"
                facts |= {"encoder": "mlp", "encoder_source": str(options.encoder)}
                made = "codes, teacher, student and its encoder"
            new.finish("distill", fingerprint, **facts)
    directory.restart_teacher()
    directory.restart_student()
    print(f"{len(assets.items):,} items: {made} are in {directory.path}")
