"""Files that are either wholly there or not there at all.

Every file the engine leaves behind goes through here: written under a temporary name in its own directory, fsynced,
renamed over its final name, and the directory fsynced. A crash, a full disk or a kill at any moment leaves the previous
file as it was. Knows bytes, json and safetensors; nothing of what they mean.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from ptengine.errors import InputError

__all__ = [
    "TEMPORARY_PREFIX",
    "json_bytes",
    "make_directory",
    "safetensors_bytes",
    "save_safetensors_atomic",
    "staged_directory",
    "sync_directory",
    "write_atomic",
    "write_json_atomic",
    "write_together",
]

Content = bytes | Callable[[BinaryIO], object]

TEMPORARY_PREFIX = ".tmp-"

# The mask can only be read by setting it, which is not safe once other threads create files: read it once, at import.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def write_atomic(path: str | os.PathLike[str], content: Content) -> Path:
    """Replace the file at `path` in one step.

    Args:
        path: final name; its directory must exist.
        content: the bytes, or a function that writes them to an open binary file.

    Returns:
        The path written.

    Raises:
        OSError: the write failed (or whatever `content` raised); the temporary file is removed and what stood at
            `path` before is untouched.
    """
    path = Path(path)
    write_together(path.parent, {path.name: content})
    return path


def _temporary(name: str) -> str:
    """What a temporary name for `name` begins with: a name that is all but too long leaves no room for a longer one."""
    return f"{TEMPORARY_PREFIX}{name[:32]}-"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the disk, which does not know whose bytes it had no room for, names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_together(directory: str | os.PathLike[str], contents: Mapping[str, Content]) -> None:
    """Replace several files of one directory: all are written and fsynced first, then renamed in the order given.

    No file is replaced unless every one could be written. Each rename is atomic, the row of them is not: a kill between
    two renames leaves the files before it new and those after it old, so the file that decides comes last.

    Raises:
        OSError: as `write_atomic`; no temporary file stays behind.
    """
    directory = Path(directory)
    staged: dict[str, str] = {}
    try:
        for name, content in contents.items():
            handle, staged[name] = tempfile.mkstemp(prefix=_temporary(name), dir=directory)
            with _naming(directory / name), os.fdopen(handle, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                # mkstemp makes the file private; the final file gets the permissions of an ordinary new one.
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)
                os.fsync(file.fileno())
        for name in contents:
            os.replace(staged[name], directory / name)
            del staged[name]
    finally:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
    sync_directory(directory)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> Path:
    """Replace the file at `path` by `value` as UTF-8 json, ending in a newline; NaN and infinity are refused.

    Raises:
        ValueError, TypeError: `value` has no json form; nothing is written.
        OSError: as `write_atomic`.
    """
    return write_atomic(path, json_bytes(value))


def save_safetensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Replace the file at `path` by `tensors`, moved to CPU and made contiguous, dtypes kept.

    Raises:
        OSError: as `write_atomic`.
    """
    return write_atomic(path, safetensors_bytes(tensors, metadata))


def json_bytes(value: Any, *, indent: int | None = 2) -> bytes:
    """`value` as UTF-8 json with a newline at the end.

    Raises:
        ValueError, TypeError: `value` has no json form (NaN and infinity have none).
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """`tensors` in the safetensors format, dtypes kept; tensors that share memory are written separately."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata=dict(metadata) if metadata else None)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Make the directory `path` and its parents unless they exist.

    Raises:
        InputError: something that is not a directory stands in the way, or it may not be written; a new one is gone
            then.
    """
    path = Path(path)
    with _refusing(path):
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        if is_new:
            with suppress(OSError):  # not empty: somebody else's by now
                path.rmdir()
        raise InputError(f"expected a directory to write to, got {str(path)!r}: permission denied")
    return path


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What the system has against the directory `path` is the fault of who named it; a NUL byte is a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"expected a directory to write to, got {str(path)!r}: {reason}") from error


@contextmanager
def staged_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory under a temporary name beside `path`, which gets that name when the block ends.

    For writers of whole directories that cannot be told to write in one step. If the block fails, nothing is left. A
    link to an empty directory stays: what it points to is replaced.

    Raises:
        InputError: before the block: there is something at `path` other than an empty directory, or no directory can be
            made there.
        OSError: a file could not be made to survive a power cut.
    """
    path = Path(path)
    with _refusing(path):
        is_directory = path.is_dir()
        is_other = not is_directory and (path.is_symlink() or path.exists())
        has_files = is_directory and any(path.iterdir())
        target = Path(os.path.realpath(path))
    if is_other:
        raise InputError(f"expected a new or empty directory, got {str(path)!r}, which is no directory")
    if has_files:
        raise InputError(f"expected a new or empty directory, got {str(path)!r}, which has files")
    parent = make_directory(target.parent)
    with _refusing(path):
        staging = Path(tempfile.mkdtemp(prefix=_temporary(target.name), dir=parent))
    try:
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                handle = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            sync_directory(folder)
        staging.chmod(0o777 & ~_UMASK)
        os.replace(staging, target)  # an empty directory is replaced, too
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames inside the directory `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
