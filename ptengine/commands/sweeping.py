"""`ptengine tune` with several seeds or learning rates: all runs at once, and the best prompt kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptengine.commands.options import number, seed, whole
from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.commands.recipe import Recipe
    from ptengine.prompts import Prompt
    from ptengine.training import SweepResult, SweepRun, TrainingConfig

__all__ = ["add_sweep_arguments", "check_sweep", "is_sweep", "run_sweep"]

T = TypeVar("T")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sweep", "several runs at once, in one batch a step; the best by --eval is kept as the output's prompt"
    )
    group.add_argument("--seeds", type=_listed(seed), metavar="N,N,...", help="a run for each, instead of --seed")
    group.add_argument(
        "--learning-rates", type=_listed(number), metavar="X,X,...", help="a run for each, instead of --learning-rate"
    )
    group.add_argument(
        "--max-tokens-per-batch", type=whole(1), metavar="N",
        help="cut a step of all runs into forwards of at most so many tokens, to save memory (default: never)",
    )  # fmt: skip


def is_sweep(args: argparse.Namespace) -> bool:
    return args.seeds is not None or args.learning_rates is not None


def check_sweep(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if not is_sweep(args):
        if args.max_tokens_per_batch is not None:
            raise InputError("expected --seeds or --learning-rates with --max-tokens-per-batch, got neither")
        return
    for several, one in (("seeds", "seed"), ("learning_rates", "learning_rate")):
        if getattr(args, several) is not None and one in vars(args):
            names = [f"--{name.replace('_', '-')}" for name in (several, one)]
            raise InputError(f"expected {names[0]} or {names[1]}, got both")
    if args.eval is None:
        raise InputError("expected --eval, by which a sweep compares its runs, got none")


def run_sweep(
    args: argparse.Namespace,
    config: TrainingConfig,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    make_prompt: Callable[[int], Prompt],
) -> tuple[dict[str, Any], list[str], Prompt | None]:
    """What the sweep found: for machines, for people, and its best prompt, None where every run diverged."""
    from ptengine.prompts import load_prompt
    from ptengine.training import sweep
    from ptengine.training.preparation import for_task
    from ptengine.training.sweeping import describe

    found = sweep(
        model,
        lambda seed: for_task(model, make_prompt(seed), recipe.task, seed),
        args.train,
        args.eval,
        config,
        task=recipe.task,
        tokenizer=tokenizer,
        seeds=args.seeds,
        learning_rates=args.learning_rates,
        max_tokens_per_batch=args.max_tokens_per_batch,
        resume=args.resume,
    )
    for folder in (Path(args.output), *(run.output_dir for run in found.runs)):
        recipe.write(folder)
    best = found.best
    data = {
        "command": "tune",
        "output": args.output,
        "method": args.method,
        "sweep": describe(found),
        "steps": found.training.steps,
        "metrics": _metrics(best),
        "seconds": found.training.seconds,
        "tokens_per_second": found.training.tokens_per_second,
        "peak_memory": found.training.peak_memory,
        "prompt": None if found.prompt_path is None else str(found.prompt_path),
    }
    prompt = None if found.prompt_path is None else load_prompt(found.prompt_path, model)
    return data, _lines(args.output, found), prompt


def _metrics(best: SweepRun | None) -> dict[str, float]:
    if best is None or best.result is None or best.result.best is None:
        return {}
    return {name: value for name, value in best.result.best.items() if name not in ("step", "epoch")}


def _lines(output: str, found: SweepResult) -> list[str]:
    done = found.training
    lines = [
        f"{len(found.runs)} runs at once, {done.steps} steps in {done.seconds:.1f} s, "
        f"{done.tokens_per_second:.0f} tokens/s"
    ]
    for rate in found.rates:
        said = (
            "no result" if rate.mean is None else f"{found.metric} {rate.mean:.4f}, standard deviation {rate.std:.4f}"
        )
        lost = f", {rate.diverged} diverged" if rate.diverged else ""
        shown = "of each prompt" if rate.learning_rate is None else f"{rate.learning_rate:g}"
        lines.append(f"learning rate {shown}: {said}, {rate.runs} {'run' if rate.runs == 1 else 'runs'}{lost}")
    if found.best is None:
        return [*lines, "every run diverged: lower the learning rates"]
    best = found.best
    lines.append(
        f"best: seed {best.seed}, learning rate {best.learning_rate:g}, {found.metric} {best.value:.4f}; "
        f"its prompt in {Path(output) / 'prompt'}"
    )
    return lines


def _listed(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argparse type: values of one kind with commas between them."""

    def split(text: str) -> list[T]:
        return [convert(part.strip()) for part in text.split(",")]

    return split
