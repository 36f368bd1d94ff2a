"""`ptengine tune`: a prompt for the user's own data and model."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptengine.commands import Outcome
from ptengine.commands.options import (
    absolute,
    add_config_arguments,
    add_model_arguments,
    check_output,
    choice,
    config_options,
    unescape,
    whole,
)
from ptengine.commands.sweeping import add_sweep_arguments, check_sweep, is_sweep, run_sweep
from ptengine.commands.task_options import add_task_arguments, make_task
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.commands.recipe import Recipe
    from ptengine.data import Task
    from ptengine.prompts import Prompt
    from ptengine.training import TrainingResult

EXAMPLE = r"""  ptengine tune --train train.jsonl --eval validation.jsonl --test test.jsonl \
    --template 'Review: {text}\nGood or bad?' --label-words 'positive= good,negative= bad' \
    --model path/to/llama --method soft --num-virtual-tokens 20 --num-train-epochs 3 --output out
  ptengine eval --prompt out --data test.jsonl
  ptengine tune ... --seeds 1,2,3 --learning-rates 0.03,0.1,0.3 --output sweep   # nine runs at once"""

_PLAIN = {"soft": "soft_prompt", "prefix": "prefix", "cartridge": "cartridge", "llama-adapter": "llama_adapter"}
_COMPUTED = {
    "p-tuning": "p_tuning",
    "residual": "residual_prompt",
    "superpos": "superpos_prompt",
    "ulpt": "ulpt_prompt",
    "multitask": "multitask_prompt",
    "cpt": "context_prompt",
    "dept": "decomposed_prompt",
}
_OF_THE_TEXT = {"lopa": "lopa_prompt", "smop": "mixture_prompt", "attempt": "attempt_prompt"}
# Names as papers have them to those of the registry, which would have to import torch for `--help`.
METHODS = _PLAIN | _COMPUTED | _OF_THE_TEXT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data", "csv, json, jsonl or parquet files")
    data.add_argument("--train", metavar="FILE", required=True, help="rows to train on")
    data.add_argument("--eval", metavar="FILE", help="rows to evaluate on while training")
    data.add_argument("--test", metavar="FILE", help="rows to evaluate the tuned prompt on, once, at the end")
    add_task_arguments(parser)
    add_model_arguments(parser, "the embedded one")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--method", type=choice(*METHODS), default="soft", metavar="NAME",
        help="soft: virtual tokens before the text; prefix: keys and values in every layer; cartridge: those of a "
        "text; llama-adapter: gated tokens beside the text in the upper layers; virtual tokens computed from other "
        f"parameters: {', '.join(_COMPUTED)}; from these and each row's text: {', '.join(_OF_THE_TEXT)} "
        "(default: soft)",
    )  # fmt: skip
    prompt.add_argument("--num-virtual-tokens", type=whole(1), metavar="N", help="length of the prompt (default: 20)")
    prompt.add_argument(
        "--init", metavar="NAME",
        help="soft: random, sampled_vocab, text, class_labels, array or prompt; "
        "prefix: random, zero, text, array or prompt (default: random)",
    )  # fmt: skip
    prompt.add_argument("--init-text", metavar="TEXT", help="text to start from, with --init text")
    prompt.add_argument("--init-labels", metavar="A,B", help="labels to start from, with --init class_labels")
    prompt.add_argument("--init-array", metavar="FILE", help=".npy file to start from, with --init array")
    prompt.add_argument("--init-prompt", metavar="DIR", help="saved prompt to start from, with --init prompt")
    prompt.add_argument("--projection", action="store_true", help="prefix: train through an MLP, dropped at the end")
    prompt.add_argument("--projection-size", type=whole(1), metavar="N", help="width of that MLP (default: 512)")
    prompt.add_argument(
        "--prompt-option", metavar="NAME=VALUE", action="append", default=[],
        help="another option of the method's class, such as bottleneck_size=400; may be repeated",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", required=True, help="new folder for all results")
    run.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="CHECKPOINT",
        help="go on with the run in --output, from its newest checkpoint or the one given",
    )  # fmt: skip
    add_config_arguments(parser)
    add_sweep_arguments(parser)


def run(args: argparse.Namespace) -> Outcome:
    from ptengine.commands.loading import load_model, load_tokenizer, pick_device
    from ptengine.commands.recipe import Recipe, model_fingerprint
    from ptengine.data.tasks import placed_virtual_tokens
    from ptengine.files import write_json_atomic
    from ptengine.prompts import create, prompt_class
    from ptengine.training import Trainer, TrainingConfig, evaluate
    from ptengine.training.evaluation import evaluation_options

    check_sweep(args)
    config = TrainingConfig(output_dir=args.output, **config_options(args))
    output = Path(args.output)
    if args.resume is False:
        check_output(output, hint="; --resume goes on with the run in it")
    task = make_task(args)
    options = _prompt_options(args, placed_virtual_tokens(task))
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer, args.model)
    dtype = args.dtype or "float32"
    model = load_model(args.model, device, dtype, task, config.seed)
    for name in ("tokenizer", "seed"):
        if name in inspect.signature(prompt_class(METHODS[args.method])).parameters:
            options[name] = tokenizer if name == "tokenizer" else config.seed

    def make_prompt(seed: int) -> Prompt:
        return create(METHODS[args.method], model, **(options | ({"seed": seed} if "seed" in options else {})))

    prompt: Prompt | None = make_prompt(config.seed)
    recipe = Recipe(task, absolute(args.model), absolute(args.tokenizer), dtype, model_fingerprint(model, task))
    if args.test is not None:
        _check_test(args, config, task, tokenizer, prompt, model)
    if args.resume is not False:
        _check_recipe(output, recipe)
    if is_sweep(args):
        data, lines, prompt = run_sweep(args, config, recipe, model, tokenizer, make_prompt)
    else:
        trainer = Trainer(model, prompt, args.train, args.eval, config, task=task, tokenizer=tokenizer)
        # Only then: a run that is refused must not say of the one that is there which model it was for.
        data = _describe(args, trainer.fit(resume=args.resume, on_start=lambda: recipe.write(output)))
        lines = _run_lines(data)
    if args.test is not None and prompt is not None:
        judged = evaluate(
            model,
            prompt,
            task,
            args.test,
            tokenizer,
            **evaluation_options(config),
        )
        data["test"] = {"file": args.test, "rows": judged.n, "metrics": judged.metrics}
    write_json_atomic(output / "metrics.json", data)
    return Outcome(data, (*lines, *_end_lines(args.output, data, task)), status=0 if prompt is not None else 1)


def _check_recipe(output: Path, recipe: Recipe) -> None:
    """A resumed run must be of the task that the folder says it is."""
    from ptengine.commands.recipe import RECIPE_NAME

    path = output / RECIPE_NAME
    if path.is_file() and recipe.read(path).task != recipe.task:
        raise InputError(f"expected the task of the run to go on with, as in {str(path)!r}, got another one")


def _check_test(args: argparse.Namespace, config: Any, task: Task, tokenizer: Any, prompt: Any, model: Any) -> None:
    """A defect of the test file must come to light before the training, not after it."""
    from ptengine.backbone import backbone_spec
    from ptengine.training.objective import make_objective
    from ptengine.training.preparation import check_evaluation, encode, row_limits

    spec = backbone_spec(model)
    rows = encode(task, args.test, tokenizer, prompt, spec, name="test", **row_limits(config)).rows
    objective = make_objective(task, model, spec, tokenizer, config.bf16)
    check_evaluation(objective, rows, config.per_device_eval_batch_size, args.test, "--per-device-eval-batch-size")


def _prompt_options(args: argparse.Namespace, placed: int | None) -> dict[str, Any]:
    """Options of the prompt's class that were given; its length is what the template places, where it places any."""
    labels = args.init_labels.split(",") if args.init_labels is not None else None
    given = {
        "num_virtual_tokens": args.num_virtual_tokens if placed is None else placed,
        "init": args.init,
        "init_text": unescape(args.init_text) if args.init_text is not None else None,
        "class_labels": labels,
        "array": args.init_array,
        "prompt": args.init_prompt,
        "projection": args.projection or None,
        "projection_size": args.projection_size,
    }
    if placed is not None and args.num_virtual_tokens not in (None, placed):
        raise InputError(
            f"expected --num-virtual-tokens {placed}, as many as the template places, got {args.num_virtual_tokens}"
        )
    options = {name: value for name, value in given.items() if value is not None}
    for entry in args.prompt_option:
        name, equals, text = entry.partition("=")
        if not equals or not name:
            raise InputError(f"expected --prompt-option as NAME=VALUE, got {entry!r}")
        if name in options or name in _SET_ELSEWHERE:
            raise InputError(f"expected --prompt-option to name what no other option sets, got {name!r}")
        options[name] = _value(text)
    return options


_SET_ELSEWHERE = ("model", "seed", "tokenizer", "num_virtual_tokens", "projection", "projection_size")


def _value(text: str) -> Any:
    """A json value where it is one (numbers, true, false), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _describe(args: argparse.Namespace, result: TrainingResult) -> dict[str, Any]:
    return {
        "command": "tune",
        "output": args.output,
        "method": args.method,
        "steps": result.steps,
        "epochs": result.epochs,
        "stopped_early": result.stopped_early,
        "final_loss": result.losses[-1],
        "metrics": result.metrics,
        "best": result.best,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory": result.peak_memory,
        "prompt": str(result.prompt_path),
        "best_prompt": None if result.best_path is None else str(result.best_path),
        "log": str(result.log_path),
        "curve": str(result.curve_path),
    }


def _run_lines(data: dict[str, Any]) -> list[str]:
    return [
        f"{data['steps']} steps in {data['seconds']:.1f} s, {data['tokens_per_second']:.0f} tokens/s, "
        f"last loss {data['final_loss']:.4f}" + (", stopped early" if data["stopped_early"] else ""),
        f"prompt in {data['prompt']}, curve in {data['curve']}, log in {data['log']}",
    ]


def _end_lines(output: str, data: dict[str, Any], task: Task) -> list[str]:
    lines = []
    for name, metrics in (("eval", data["metrics"]), ("test", data.get("test", {}).get("metrics", {}))):
        if metrics:
            lines.append(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    if data["prompt"] is not None:
        lines.append(f"next: ptengine eval --prompt {output} --data FILE")
        if task.kind != "embedding":
            lines.append(f"      ptengine generate --prompt {output} --data FILE")
    return lines
