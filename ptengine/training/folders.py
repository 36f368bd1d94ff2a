"""Whole folders that are either there or not, and the rule that one folder belongs to one run at a time.

Knows paths only. Single files are the business of `ptengine.files`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ptengine.errors import InputError
from ptengine.files import TEMPORARY_PREFIX, sync_directory, write_atomic

__all__ = ["clean_leftovers", "copy_folder", "exclusive", "write_folder"]

_NEW, _OLD = TEMPORARY_PREFIX, ".old-"


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Make the folder `path` with what `write` puts into it, in one rename; an older folder of that name is replaced.

    Replacing takes two renames. After a kill between them `clean_leftovers` brings the old folder back.
    """
    unique = uuid.uuid4().hex[:8]
    fresh = path.parent / f"{_NEW}{path.name}-{unique}"
    fresh.mkdir()
    try:
        write(fresh)
        sync_directory(fresh)
        if path.exists():
            old = path.parent / f"{_OLD}{path.name}-{unique}"
            os.rename(path, old)
            os.rename(fresh, path)
            sync_directory(path.parent)
            shutil.rmtree(old)
        else:
            os.rename(fresh, path)
            sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return path


def copy_folder(source: Path, path: Path) -> Path:
    """Make `path` a copy of the folder `source`, as `write_folder` does."""

    def write(fresh: Path) -> None:
        for file in source.iterdir():
            write_atomic(fresh / file.name, file.read_bytes())

    return write_folder(path, write)


def clean_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written in `folder`, files too, and bring back what it had moved aside.

    Only to be called while the folder, or the one it belongs to, is held with `exclusive`: a temporary file of a run
    that lives would go, too.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry.name.startswith(TEMPORARY_PREFIX):
            entry.unlink()
        if not entry.is_dir() or not entry.name.startswith((_NEW, _OLD)):
            continue
        final = folder / entry.name.removeprefix(_OLD).rpartition("-")[0]
        if entry.name.startswith(_OLD) and not final.exists():
            os.rename(entry, final)
        else:
            shutil.rmtree(entry)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this run; the system lets go of it when the process ends, however it ends.

    Raises:
        InputError: another run holds it.
    """
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"expected output_dir to be free, got {str(folder)!r}, in which another run is training now"
            ) from error
        yield
