"""Checkpoint folders: written whole, checked when read, thinned out without ever losing the newest or the best.

    checkpoint-40/
        manifest.json          sizes and sha256 of the files below: a folder that does not match it is torn
        state.json             counters, history, schedule, sampler, generators, and what must be equal to go on exactly
        prompt.safetensors     the prompt with its reparametrisation
        optimizer.safetensors  moments
        run.safetensors        random generators, losses
        head.safetensors       the classification head, where there is one
        best.safetensors       prompt and head of the best evaluation so far, where there was one

Tensors are safetensors and everything else is json, whose floats come back to the last bit; nothing is pickled. Knows
files, not training: what the tensors and the state mean is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ptengine.errors import InputError
from ptengine.files import save_safetensors_atomic, write_json_atomic
from ptengine.training.folders import write_folder

__all__ = [
    "Checkpoint",
    "checkpoint_steps",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_checkpoint",
    "write_checkpoint",
]

FORMAT = 1
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read: `tensors` by file stem, `state` the json values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(
    output_dir: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write ``output_dir/checkpoint-<step>``. A complete one of that step is kept as it is, a torn one replaced."""
    path = output_dir / f"{_PREFIX}{step}"
    if path.exists() and _damage(path) is None:
        return path

    def write(folder: Path) -> None:
        for stem, group in tensors.items():
            save_safetensors_atomic(folder / f"{stem}.safetensors", group)
        write_json_atomic(folder / "state.json", dict(state))
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
        write_json_atomic(folder / "manifest.json", {"format": FORMAT, "step": step, "files": files})

    return write_folder(path, write)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint folder `path`.

    Raises:
        InputError: it does not exist or is torn; the message says what is missing or does not match.
    """
    if not path.is_dir():
        raise InputError(f"expected a checkpoint folder, got {str(path)!r}, which does not exist")
    if damage := _damage(path):
        raise InputError(f"expected a complete checkpoint, got {str(path)!r}: {damage}")
    state = json.loads((path / "state.json").read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, int(state["step"]), tensors, state)


def newest_checkpoint(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint in `output_dir`, and one line about each newer one that is torn."""
    torn = []
    for step in reversed(checkpoint_steps(output_dir)):
        path = output_dir / f"{_PREFIX}{step}"
        if damage := _damage(path):
            torn.append(f"{path} is torn ({damage})")
        else:
            return read_checkpoint(path), torn
    return None, torn


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of the checkpoint folders in `output_dir`, torn ones included, in order."""
    if not output_dir.is_dir():  # Python 3.13 lists no folder whose name no system takes
        return []
    names = [entry.name.removeprefix(_PREFIX) for entry in output_dir.glob(f"{_PREFIX}*") if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def prune_checkpoints(output_dir: Path, limit: int | None, newest: int, best: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        output_dir: the run's folder.
        limit: how many to keep; None keeps all.
        newest: the step just written and known to be complete: it stays, whatever other names stand in the folder.
        best: the step of the best prompt, which stays too, or None.
    """
    steps = checkpoint_steps(output_dir)
    if limit is None:
        return
    removable = [step for step in steps if step not in (newest, best)]
    for step in removable[: max(len(steps) - limit, 0)]:
        shutil.rmtree(output_dir / f"{_PREFIX}{step}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None for a complete one."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r} instead of {FORMAT}"
        expected: dict[str, dict[str, Any]] = manifest["files"]
        for name, facts in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
