"""A tuned prompt with the model it was tuned for, ready to use: what `eval` and `generate` start from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptengine.commands.options import add_model_arguments
from ptengine.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from ptengine.data import Task
    from ptengine.prompts import Prompt

__all__ = ["Session", "add_prompt_argument", "add_session_arguments", "load_with_head", "open_prompt"]


@dataclass(frozen=True)
class Session:
    """Attributes:
    task: what the prompt was tuned for.
    model, tokenizer: the frozen model, with the trained head where the task has one.
    prompt: the tuned prompt; a head of its own is in the model.
    """

    task: Task
    model: Any
    tokenizer: Any
    prompt: Prompt


def add_prompt_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        metavar="DIR",
        required=True,
        help="output folder of ptengine tune or demo (or its prompt/ or best/)",
    )


def add_session_arguments(parser: argparse.ArgumentParser, model: str = "") -> None:
    """Which model stands behind the prompt: what its folder says, unless an option says otherwise."""
    add_model_arguments(
        parser, f"the one the prompt was tuned for{model}", "that of the tuning, or of --model", "that of the tuning"
    )


def open_prompt(args: argparse.Namespace) -> Session:
    """Load what ``--prompt`` names; ``--model``, ``--tokenizer`` and ``--dtype`` replace what its folder says.

    Raises:
        InputError: the folder is not whole, or the model is not one the prompt fits.
    """
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.commands.recipe import find_prompt, model_fingerprint
    from ptengine.prompts import HeadedPrompt

    folder, recipe = find_prompt(args.prompt)
    device = pick_device(args.device)
    model_path = args.model or recipe.model
    # A model given now brings its own tokenizer.
    tokenizer_path = args.tokenizer or (None if args.model else recipe.tokenizer)
    tokenizer = load_tokenizer(tokenizer_path, model_path)
    model = load_model(model_path, device, args.dtype or recipe.dtype, recipe.task)
    prompt = load_with_head(folder, model, recipe.task)
    # A model that is named now is taken as meant; one that changed where it lay is not.
    comparable = args.model is None and args.dtype in (None, recipe.dtype)
    if comparable and model_fingerprint(model, recipe.task) != recipe.fingerprint:
        raise InputError(
            f"expected the model that {args.prompt!r} was tuned for in {recipe.model or 'the embedded backbone'}, got "
            "other weights; --model PATH names the model to use"
        )
    if isinstance(prompt, HeadedPrompt):
        prompt.install_head(model)
        prompt = prompt.prompt
    return Session(recipe.task, model, tokenizer, prompt)


def load_with_head(folder: Path, model: Any, task: Task) -> Prompt:
    """The prompt in `folder`, for a task with a trained head a `HeadedPrompt`; the model's own head may change."""
    from ptengine.backbone.heads import task_head
    from ptengine.data.tasks import head_labels
    from ptengine.prompts import HeadedPrompt, load_prompt
    from ptengine.training import load_head
    from ptengine.training.preparation import check_head

    prompt = load_prompt(folder, model)
    check_head(task, prompt)
    if not task.trains_head or isinstance(prompt, HeadedPrompt):
        return prompt
    load_head(folder, model)
    return HeadedPrompt(model, prompt, head_labels(task), head=task_head(model))
