"""One task, many seeds and learning rates: every pair is a member of one `PromptSet`, and the best of them is told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptengine.backbone.spec import backbone_spec
from ptengine.configuration import TrainingConfig
from ptengine.data import Task
from ptengine.errors import InputError
from ptengine.files import write_json_atomic
from ptengine.prompts.base import Prompt
from ptengine.training.folders import copy_folder
from ptengine.training.preparation import DataSource, check_prompt, encode, row_limits
from ptengine.training.prompt_set import PromptSet, PromptSetResult
from ptengine.training.resumption import Resume
from ptengine.training.trainer import Trainer, TrainingResult

__all__ = ["RateSummary", "SweepResult", "SweepRun", "describe", "sweep"]


@dataclass(frozen=True)
class SweepRun:
    """One seed at one learning rate.

    Attributes:
        seed, learning_rate: of the run.
        output_dir: its folder.
        prompt: what was trained.
        result: what its `Trainer.fit` would have returned; None where it diverged.
        value: the metric at its best evaluation; None where it has none.
        diverged: why it has no result, or None.
    """

    seed: int
    learning_rate: float
    output_dir: Path
    prompt: Prompt
    result: TrainingResult | None
    value: float | None
    diverged: str | None


@dataclass(frozen=True)
class RateSummary:
    """A learning rate over its seeds.

    Attributes:
        learning_rate: of the runs; None where each has its prompt's own and they differ, as `PTuning`'s do.
        mean, std: of the metric at the best evaluations of the runs that did not diverge, with the sample's standard
            deviation; None and 0.0 where there are too few.
        runs, diverged: how many runs there were, and how many of them diverged.
    """

    learning_rate: float | None
    mean: float | None
    std: float
    runs: int
    diverged: int


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        runs: learning rate by learning rate, in it seed by seed, as given.
        best: the run with the best evaluation (the first of equals); None where all diverged.
        metric: what was compared.
        rates: every learning rate over its seeds, as given. The best mean is a sounder choice than the best run.
        prompt_path: folder of the best run's best prompt, for `ptengine.load_prompt`; None where all diverged.
        training: what the set did.
    """

    runs: list[SweepRun]
    best: SweepRun | None
    metric: str
    rates: list[RateSummary]
    prompt_path: Path | None
    training: PromptSetResult


def sweep(
    model: Any,
    make_prompt: Callable[[int], Prompt],
    train_data: DataSource,
    eval_data: DataSource,
    config: TrainingConfig,
    *,
    task: Task,
    tokenizer: Any,
    seeds: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    max_tokens_per_batch: int | None = None,
    resume: Resume = False,
) -> SweepResult:
    """Train a prompt for every seed and learning rate, all at once, and compare them on `eval_data`.

    Each run has the numbers of a `Trainer` with that seed and rate alone (see `PromptSet`) and its folder in
    ``config.output_dir``, ``seed-<seed>-lr-<rate>``. Beside them stand the set's checkpoints, ``sweep.json`` with what
    was found, and ``prompt/`` with the best run's best prompt. That run was picked on `eval_data`: judge it on other
    rows.

    Args:
        model: one that `PromptSet` takes.
        make_prompt: from a seed to a new prompt, such as ``lambda seed: ptengine.SoftPrompt(model, seed=seed)``. Called
            for every run; all its prompts have one P.
        train_data, eval_data, task, tokenizer: as in `Trainer`.
        config: the settings of all runs but for seed, learning rate and folder; evaluations may not be turned off.
        seeds: of the prompt, of the order of rows and of every number drawn; None means that of `config`.
        learning_rates: peak rates; None means that of `config`.
        max_tokens_per_batch: as in `PromptSet`.
        resume: as in `PromptSet.fit`.

    Raises:
        InputError: no seeds or rates, or one twice; no evaluations to compare; and as `Trainer` and `PromptSet`.
        SystemExit, KeyboardInterrupt: as `PromptSet.fit`.
    """
    if not isinstance(config, TrainingConfig):
        raise InputError(f"expected config, a TrainingConfig, got {type(config).__name__}")
    if config.eval_strategy == "no":
        raise InputError("expected eval_strategy 'steps' or 'epoch', by which a sweep compares its runs, got 'no'")
    given_rates = [config.learning_rate] if learning_rates is None else list(learning_rates)
    configs = [
        replace(config, seed=seed, learning_rate=rate)
        for rate in _distinct("learning_rates", given_rates)
        for seed in _distinct("seeds", [config.seed] if seeds is None else list(seeds))
    ]
    prompts = [make_prompt(config.seed) for config in configs]
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise InputError(f"expected make_prompt to return a ptengine prompt, got {type(prompt).__name__}")
        check_prompt(prompt, model)
    spec = backbone_spec(model)
    train, held = (
        encode(task, data, tokenizer, prompts[0], spec, name=name, **row_limits(config))
        for data, name in ((train_data, "train"), (eval_data, "eval"))
    )
    # Of numpy, a rate would name its folder otherwise, and its comparisons give no Python numbers to write as json.
    rates = [
        prompt.default_learning_rate() if one.learning_rate is None else float(one.learning_rate)
        for one, prompt in zip(configs, prompts, strict=True)
    ]
    root = Path(config.output_dir)
    folders = [root / f"seed-{one.seed}-lr-{rate!r}" for one, rate in zip(configs, rates, strict=True)]
    trainers = [
        Trainer(model, prompt, train, held, replace(one, output_dir=str(folder)), task=task, tokenizer=tokenizer)
        for one, prompt, folder in zip(configs, prompts, folders, strict=True)
    ]
    trained = PromptSet(trainers, root, max_tokens_per_batch=max_tokens_per_batch).fit(resume)
    plan = trainers[0].make_plan()
    runs = []
    for one, rate, folder, prompt, member in zip(configs, rates, folders, prompts, trained.members, strict=True):
        result = member if isinstance(member, TrainingResult) else None
        value = None if result is None or result.best is None else result.best[plan.metric]
        runs.append(SweepRun(one.seed, rate, folder, prompt, result, value, None if result else str(member)))
    given = [one.learning_rate for one in configs]
    found = _compare(runs, given, plan.metric, plan.greater_is_better, trained)
    if found.best is not None and found.best.result is not None and found.best.result.best_path is not None:
        copy_folder(found.best.result.best_path, root / "prompt")
        found = replace(found, prompt_path=root / "prompt")
    write_json_atomic(root / "sweep.json", describe(found))
    return found


def describe(found: SweepResult) -> dict[str, Any]:
    """A sweep's findings as json values."""
    return {
        "metric": found.metric,
        "best": None if found.best is None else found.best.output_dir.name,
        "rates": [vars(rate) for rate in found.rates],
        "runs": [
            {
                "folder": run.output_dir.name,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "value": run.value,
                "diverged": run.diverged,
                "steps": None if run.result is None else run.result.steps,
                "stopped_early": None if run.result is None else run.result.stopped_early,
                "best": None if run.result is None else run.result.best,
            }
            for run in found.runs
        ],
    }


def _distinct(name: str, values: Sequence[Any]) -> Sequence[Any]:
    if not values or len(set(values)) < len(values):
        raise InputError(f"expected {name}, one or more different values, got {list(values)}")
    return values


def _compare(
    runs: Sequence[SweepRun], given: Sequence[float | None], metric: str, greater: bool, trained: PromptSetResult
) -> SweepResult:
    """`given` are the runs' rates as asked for, None for that of the prompt."""
    sign = 1 if greater else -1
    judged = [run for run in runs if run.value is not None]
    best = max(judged, key=lambda run: sign * (run.value or 0.0), default=None)
    rates = []
    for rate in dict.fromkeys(given):
        group = [run for run, asked in zip(runs, given, strict=True) if asked == rate]
        values = [run.value for run in group if run.value is not None]
        mean = math.fsum(values) / len(values) if values else None
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        own = {run.learning_rate for run in group}
        diverged = sum(run.diverged is not None for run in group)
        rates.append(RateSummary(own.pop() if len(own) == 1 else None, mean, spread, len(group), diverged))
    return SweepResult(list(runs), best, metric, rates, None, trained)
