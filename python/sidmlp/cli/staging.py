"""Results of a command that appear in the run directory together or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidmlp.data.files import write_errors

from .run_directory import PARENTS, RunDirectory


@contextmanager
def staged(run: RunDirectory) -> Iterator[RunDirectory]:
    """A run directory inside ``run`` to write results to, with the records that ``run`` has.

    When the block ends well they replace those of ``run``, the records last: a process that is
    killed in between leaves results without a record, which the next command refuses. Otherwise
    ``run`` stays as it was. Raises OSError that names the file of ``run`` that cannot be written.
    """
    existed = run.path.is_dir()
    new = RunDirectory(run.path / f".new.{os.getpid()}")
    records = {f"{command}.json" for command in PARENTS}
    try:
        with write_errors(run.path):
            # Of a process that was killed; in containers all of them have the same few numbers.
            shutil.rmtree(new.path, ignore_errors=True)
            new.path.mkdir(parents=True)
            for name in records:
                if (run.path / name).is_file():
                    shutil.copy2(run.path / name, new.path / name)
        copied = {name: (new.path / name).stat() for name in os.listdir(new.path)}
        yield new
        made = set(os.listdir(new.path))
        written = {
            name
            for name in made & records
            if name not in copied or not os.path.samestat(copied[name], (new.path / name).stat())
        }
        for name in written:
            (run.path / name).unlink(missing_ok=True)
        for name in sorted(made - records):
            _replace(new.path / name, run.path / name)
        for name in PARENTS:
            if f"{name}.json" in written:
                os.replace(new.path / f"{name}.json", run.path / f"{name}.json")
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(new.path), str(run.path))
        raise
    finally:
        shutil.rmtree(new.path, ignore_errors=True)
        if not existed and run.path.is_dir() and not any(run.path.iterdir()):
            run.path.rmdir()


def _replace(new: Path, old: Path) -> None:
    """As os.replace, for directories with content, too."""
    if not (new.is_dir() and old.is_dir()):
        os.replace(new, old)
        return
    aside = new.with_name(f"{new.name}.old")  # removed with the staging directory
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
