"""`ptengine export`: a tuned prompt in the formats of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import check_output, choice
from ptengine.commands.session import add_prompt_argument, add_session_arguments, open_prompt
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.data import Task
    from ptengine.prompts import Prompt

FORMATS = ("peft", "prompt_embeds", "baked")
EXAMPLE = """  ptengine export --prompt out --format baked --output out-for-vllm
  ptengine export --prompt my-prompt --model path/to/llama --format peft --output my-prompt-for-peft"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_argument(parser)
    parser.add_argument(
        "--format",
        type=choice(*FORMATS),
        metavar="NAME",
        required=True,
        help="peft: a checkpoint of PEFT; prompt_embeds: the virtual tokens as a tensor, for vLLM and inputs_embeds; "
        "baked: a stock checkpoint of the model in which they are new tokens",
    )
    parser.add_argument("--peft-type", metavar="NAME", help="with peft: PROMPT_TUNING, CARTRIDGE, ... (default: plain)")
    parser.add_argument("--output", metavar="DIR", required=True, help="new or empty folder")
    add_session_arguments(parser, "; needed where the prompt's folder has no task.json")


def run(args: argparse.Namespace) -> Outcome:
    output = Path(args.output)
    check_output(output)
    if args.peft_type is not None and args.format != "peft":
        raise InputError(f"expected --peft-type with --format peft only, got --format {args.format}")
    model, tokenizer, prompt, task = _open(args)
    from ptengine import interop

    if args.format == "peft":
        task_type = None if task is None else _PEFT_TASKS.get(task.kind)
        interop.save_peft(prompt, output, model, task_type=task_type, peft_type=args.peft_type)
    elif args.format == "prompt_embeds":
        interop.save_prompt_embeds(model, prompt, output)
    else:
        interop.save_baked_checkpoint(model, prompt, tokenizer, output)
    data = {
        "command": "export",
        "prompt": args.prompt,
        "method": prompt.method,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "format": args.format,
        "output": args.output,
        "files": sorted(path.name for path in output.iterdir()),
    }
    lines = [f"{prompt.num_virtual_tokens} virtual tokens in {args.output}: {', '.join(data['files'])}"]
    return Outcome(data, (*lines, *_next(args)))


# PEFT's names of the tasks that it does not tell by the backbone alone.
_PEFT_TASKS = {
    "embedding": "FEATURE_EXTRACTION",
    "masked_classification": "FEATURE_EXTRACTION",
    "question_answering": "QUESTION_ANS",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
}


def _open(args: argparse.Namespace) -> tuple[Any, Any, Prompt, Task | None]:
    """Model, with the head that was trained with the prompt, tokenizer, prompt, and task where the folder has one.

    A folder that `Prompt.save` wrote has no task; ``--model`` then says what it is for.
    """
    from ptengine.commands.recipe import RECIPE_NAME

    folder = Path(args.prompt)
    homes = (folder, folder.resolve().parent)
    if not (folder / "prompt.json").is_file() or any((home / RECIPE_NAME).is_file() for home in homes):
        session = open_prompt(args)
        template = getattr(session.task, "template", None)
        if template is not None and not template.is_behind_prompt:
            raise InputError(
                "expected a prompt whose virtual tokens stand before the text, where other programs put them, got one "
                f"of the template {template.text!r}"
            )
        return session.model, session.tokenizer, session.prompt, session.task
    if args.model is None:
        raise InputError(
            f"expected --model with {args.prompt!r}, which has no {RECIPE_NAME} that says what the prompt was tuned for"
        )
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.prompts import load_prompt

    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer, args.model) if args.format == "baked" else None
    model = load_model(args.model, device, args.dtype or "float32")
    return model, tokenizer, load_prompt(folder, model), None


def _next(args: argparse.Namespace) -> tuple[str, ...]:
    if args.format == "peft":
        return (f"next: PeftModel.from_pretrained(model, {args.output!r})",)
    name = "prompt_embeds.json" if args.format == "prompt_embeds" else "soft_prompt.json"
    return (f"next: how to use it is in {Path(args.output) / name}",)
