"""`task.json`: what a folder of a tuned prompt says about its task and its model, so that it can be used later.

Knows the file; loading models is the business of `ptengine.commands.loading`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptengine.backbone.embedding import UNREAD
from ptengine.backbone.heads import task_head
from ptengine.commands.options import DTYPES, read_json
from ptengine.data import Task
from ptengine.data.serialization import task_from_json, task_to_json
from ptengine.errors import InputError
from ptengine.files import write_json_atomic
from ptengine.training.identity import fingerprint_model

__all__ = ["RECIPE_NAME", "Recipe", "find_prompt", "model_fingerprint"]

RECIPE_NAME = "task.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    task: what the prompt was tuned for.
    model: folder of the model; None for the embedded one.
    tokenizer: folder of the tokenizer; None for the model's own.
    dtype: of the model.
    fingerprint: of the frozen weights in that dtype (`ptengine.training.identity.fingerprint_model`): another model of
        the same shape would take the prompt and answer nonsense.
    """

    task: Task
    model: str | None
    tokenizer: str | None
    dtype: str
    fingerprint: str

    def write(self, folder: Path) -> Path:
        """Write ``task.json`` into `folder`, which must exist."""
        return write_json_atomic(
            folder / RECIPE_NAME,
            {
                "format_version": FORMAT_VERSION,
                "task": task_to_json(self.task),
                "model": self.model,
                "tokenizer": self.tokenizer,
                "dtype": self.dtype,
                "fingerprint": self.fingerprint,
            },
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in the file `path`.

        Raises:
            InputError: the file is missing, damaged, of another version, or holds something else.
        """
        value = read_json(path, "the task of a tuned prompt")
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            raise InputError(f"expected a task file of format version {FORMAT_VERSION}, got another in {str(path)!r}")
        if value.get("dtype") not in DTYPES:
            raise InputError(f"{path}: expected dtype, one of {', '.join(DTYPES)}, got {value.get('dtype')!r}")
        for name in ("model", "tokenizer"):
            if not isinstance(value.get(name), str | None):
                raise InputError(f"{path}: expected {name} as the path of a folder or null, got {value[name]!r}")
        if not isinstance(value.get("fingerprint"), str):
            raise InputError(f"{path}: expected the model's fingerprint, got {value.get('fingerprint')!r}")
        try:
            task = task_from_json(value.get("task"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return cls(task, value.get("model"), value.get("tokenizer"), value["dtype"], value["fingerprint"])


def model_fingerprint(model: Any, task: Task) -> str:
    """The fingerprint of the frozen part of `model`."""
    skip = set(task_head(model)) if task.trains_head else set()
    if task.kind == "embedding":
        skip = {name for name, _ in model.named_parameters() if name.startswith(UNREAD)}
    return fingerprint_model(model, skip=skip)


def find_prompt(folder: str) -> tuple[Path, Recipe]:
    """The folder that holds the prompt's weights, and its recipe.

    `folder` is an output folder of ``ptengine tune`` (its ``prompt/`` is taken), or ``prompt/`` or ``best/`` in one.

    Raises:
        InputError: there is no such folder, or no prompt or no recipe in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"expected --prompt, an output folder of ptengine tune, got {folder!r}, which is no folder")
    weights = path if (path / "prompt.json").is_file() else path / "prompt"
    if not (weights / "prompt.json").is_file():
        raise InputError(
            f"expected a tuned prompt in {folder!r}, but neither it nor its folder prompt holds prompt.json"
        )
    # A copy of the task beside the weights wins, so that a prompt's folder can be sent around with one.
    homes = [weights, weights.resolve().parent]
    found = next((home / RECIPE_NAME for home in homes if (home / RECIPE_NAME).is_file()), None)
    if found is None:
        raise InputError(f"expected {RECIPE_NAME} in {str(weights)!r} or the folder above it, got none")
    return weights, Recipe.read(found)
