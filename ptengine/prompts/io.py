"""Saved prompts: a directory with `prompt.json` and `prompt.safetensors`.

The weights file carries the description as well, in its header, and that copy is the one that is read: weights and
description change in one rename, so a save that fails or is killed at any moment leaves the earlier prompt whole.
`prompt.json` is the same description for people and scripts. Knows nothing of any single method.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptengine import __version__
from ptengine.backbone.spec import backbone_spec
from ptengine.errors import InputError
from ptengine.files import json_bytes, make_directory, safetensors_bytes, write_together
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.registry import prompt_class

if TYPE_CHECKING:
    from ptengine.prompts.base import Prompt

__all__ = [
    "FORMAT_VERSION",
    "JSON_NAME",
    "WEIGHTS_NAME",
    "load_prompt",
    "read_prompt",
    "read_safetensors",
    "save_prompt",
]

FORMAT_VERSION = 1
JSON_NAME = "prompt.json"
WEIGHTS_NAME = "prompt.safetensors"

_HEADER_KEY = "ptengine"


def save_prompt(prompt: Prompt, directory: str | os.PathLike[str], *, folded: bool = True) -> Path:
    """Write `prompt` in fp32 to `directory` (made if need be): `folded`, or with everything that is trained.

    Both files are written and fsynced under temporary names first; then `prompt.json` and, last, `prompt.safetensors`
    are renamed into place. If anything fails, the prompt that stood there before still loads. Other files in the
    directory are not touched. The same prompt gives the same bytes.

    Returns:
        The directory.

    Raises:
        InputError: the directory cannot be made or written.
        OSError: the disk is full or fails.
    """
    kept = prompt.fold() if folded else prompt
    description = {
        "format_version": FORMAT_VERSION,
        "method": kept.method,
        "num_virtual_tokens": kept.num_virtual_tokens,
        "config": kept.config(),
        "backbone": kept.facts.to_json(),
        "ptengine_version": __version__,
    }
    weights = {name: tensor.float() for name, tensor in kept.state_dict().items()}
    header = {_HEADER_KEY: json.dumps(description, allow_nan=False)}
    contents = {JSON_NAME: json_bytes(description), WEIGHTS_NAME: safetensors_bytes(weights, header)}
    target = make_directory(directory)
    write_together(target, contents)
    return target


def load_prompt(directory: str | os.PathLike[str], model: Any) -> Prompt:
    """Read a prompt written by `Prompt.save` for use with `model`.

    Returns:
        The prompt, fp32, on the device of the model's word embeddings, bit for bit as saved.

    Raises:
        InputError: a file is missing or damaged, of a newer format or an unknown method; or the model is not the
            backbone the prompt was made for: the message names the field, what the prompt expects and what the model
            has.
        UnsupportedModelError: the model is of no supported type.
    """
    present = backbone_facts(model)
    return read_prompt(directory, present).to(backbone_spec(model).word_embeddings.weight.device)


def read_prompt(directory: str | os.PathLike[str], present: BackboneFacts | None = None) -> Prompt:
    """As `load_prompt`, on the CPU and without a model; `present` are the facts of the backbone it must be made for."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"expected the directory of a saved prompt, got {str(directory)!r}, which is not a directory")
    _check_json(directory / JSON_NAME)
    path = directory / WEIGHTS_NAME
    tensors, header = read_safetensors(path)
    description = _description(path, header)
    facts = BackboneFacts.from_json(description["backbone"])
    if present is not None:
        facts.require_same(present, f"the prompt in {str(directory)!r}")
    # On the meta device a damaged description allocates nothing; the tensors are put in place once they fit.
    with torch.device("meta"):
        prompt = prompt_class(description["method"]).empty(facts, description["config"])
    _fill(prompt, tensors, path)
    return prompt


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (CPU) and header strings of a safetensors file.

    Raises:
        InputError: the file is missing, unreadable, cut short or not of this format.
    """
    if not path.is_file():
        raise InputError(f"expected the file {str(path)!r}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a safetensors file, got {str(path)!r}: {error}") from error


def _check_json(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"expected a saved prompt in {str(path.parent)!r}, but there is no {path.name}")
    try:
        json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"expected a json file, got {str(path)!r}: {error}") from error


def _description(path: Path, header: dict[str, str]) -> dict[str, Any]:
    if _HEADER_KEY not in header:
        raise InputError(f"expected a saved prompt, got {str(path)!r}, whose header does not describe one")
    try:
        description = json.loads(header[_HEADER_KEY])
    except json.JSONDecodeError as error:
        raise InputError(
            f"expected a saved prompt, got {str(path)!r}, whose description is damaged: {error}"
        ) from error
    if not isinstance(description, dict):
        raise InputError(f"expected a saved prompt, got {str(path)!r}, whose description is not a json object")
    if description.get("format_version") != FORMAT_VERSION:
        got = description.get("format_version")
        raise InputError(f"expected a saved prompt of format version {FORMAT_VERSION}, got {got!r} in {str(path)!r}")
    for name in ("method", "config", "backbone"):
        if name not in description:
            raise InputError(f"expected {name!r} in the description of a saved prompt, but {str(path)!r} has none")
    return description


def _fill(prompt: Prompt, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = {name: (list(tensor.shape), torch.float32) for name, tensor in prompt.state_dict().items()}
    got = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wanted != got:
        raise InputError(f"expected the tensors {wanted} in {str(path)!r}, got {got}")
    prompt.load_state_dict(tensors, assign=True)
