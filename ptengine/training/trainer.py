"""The trainer: tunes one prompt (and a classification head) against a frozen backbone, and can always go on.

This is the boundary: everything a user hands over is checked here, before any work. The run itself is `Run`.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptengine.backbone.heads import task_head
from ptengine.backbone.spec import backbone_spec
from ptengine.configuration import TrainingConfig
from ptengine.data import ClassificationTask, EncodedRow, Task
from ptengine.data.collation import batch_starts
from ptengine.data.sources import name_of
from ptengine.errors import InputError
from ptengine.files import make_directory
from ptengine.garbage import settled_objects
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training.checkpoints import Checkpoint, checkpoint_steps
from ptengine.training.conditions import training_conditions
from ptengine.training.folders import clean_leftovers, exclusive
from ptengine.training.freezing import head_parameters
from ptengine.training.identity import environment, fingerprint_model, fingerprint_rows, run_identity
from ptengine.training.interruption import Interruption
from ptengine.training.journal import LOG_NAME, Journal, draw_curve
from ptengine.training.loop import Loop
from ptengine.training.objective import make_objective
from ptengine.training.optimization import warmup_steps
from ptengine.training.preparation import (
    DataSource,
    check_batches,
    check_checkpointing,
    check_evaluation,
    check_head,
    check_places,
    check_prompt,
    encode,
    row_limits,
)
from ptengine.training.randomness import Generators, seed_everything
from ptengine.training.resumption import PROMPT_NAME, Resume, require_exact, starting_point
from ptengine.training.run import Interrupted, Plan, Run
from ptengine.training.saving import RunSaver, restore_run
from ptengine.training.step_loss import StepLoss, TaskLoss

__all__ = ["TRACES", "Trainer", "TrainingResult", "leave", "peak_memory"]

TRACES = (LOG_NAME, "best", PROMPT_NAME, "curve.png")
"""What a run leaves in its folder, besides checkpoints."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run did and where it left it.

    Attributes:
        losses: training loss of every optimiser step from the first on, those before a resumption included.
        evaluations: every evaluation in order: ``step``, ``epoch`` and the metrics.
        best: the entry of `evaluations` that `metric_for_best_model` picked; None without evaluations.
        metrics: the metrics of the evaluation of the weights that the prompt now has: those of `best` with
            `load_best_model_at_end`, else of the last evaluation; empty without evaluations.
        steps: optimiser steps done.
        epochs: passes over the training data done.
        stopped_early: whether `early_stopping_patience` ended the run.
        seconds: wall time of this call of `fit`.
        tokens_per_second: text tokens (virtual tokens not counted) per second of this call's optimiser steps; 0.0 where
            there was none left to do.
        peak_memory: bytes: on CUDA the most allocated during the run, elsewhere the largest resident size the process
            has had so far.
        prompt_path: folder for `ptengine.load_prompt`, with ``head.safetensors`` where a head was trained.
        best_path: the same for the best evaluation; None without evaluations.
        log_path, curve_path: the JSONL log and the curve.
        checkpoints: the checkpoint folders that are there, oldest first.
    """

    losses: list[float]
    evaluations: list[dict[str, float]]
    best: dict[str, float] | None
    metrics: dict[str, float]
    steps: int
    epochs: float
    stopped_early: bool
    seconds: float
    tokens_per_second: float
    peak_memory: int
    prompt_path: Path
    best_path: Path | None
    log_path: Path
    curve_path: Path
    checkpoints: list[Path]


class Trainer:
    """Tunes `prompt` against a frozen `model`.

    The backbone's weights never change: for the run it is patched (`ptengine.patched`), in eval mode and without
    gradients; all three are put back afterwards. A task such as `SequenceClassificationTask` also trains the model's
    head, in place, or that of a `HeadedPrompt`, which leaves the model as it is.

    Args:
        model: a transformers model.
        prompt: what is trained, in place; moved to the model's device. None trains the head alone.
        train_data: a path, a list of dicts or a `datasets.Dataset`, see `ptengine.data.load_rows`; or rows that `task`
            has encoded already.
        eval_data: the same, or None.
        config: the settings.
        task: what a row asks of the model: a task of `ptengine.data`.
        tokenizer: the model's tokenizer.
        step_loss: what an optimiser step minimises; None means the task's loss on the training data alone.

    Raises:
        InputError: anything that does not fit, named: see `TrainingConfig` and `ptengine.data`; also a prompt made for
            another backbone, a prompt longer than the context, evaluation settings without evaluation data, a metric
            the task does not have.
        UnsupportedModelError: the model type is not supported.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt | None,
        train_data: DataSource,
        eval_data: DataSource | None = None,
        config: TrainingConfig | None = None,
        *,
        task: Task,
        tokenizer: Any,
        step_loss: StepLoss | None = None,
    ) -> None:
        if not isinstance(config, TrainingConfig):
            raise InputError(f"expected config, a TrainingConfig, got {type(config).__name__}")
        if not isinstance(task, Task):
            raise InputError(f"expected task, a task of ptengine.data, got {type(task).__name__}")
        spec = backbone_spec(model)
        if step_loss is not None and not isinstance(step_loss, StepLoss):
            raise InputError(
                f"expected step_loss with parts() and identity() (ptengine.training.step_loss), got "
                f"{type(step_loss).__name__}"
            )
        check_prompt(prompt, model)
        check_places(task, prompt)
        check_head(task, prompt)
        if isinstance(task, ClassificationTask) and not task.template.is_behind_prompt and prompt is not None:
            warnings.warn(
                "the template places virtual tokens behind text, so every row runs its own; before all text they "
                "would run once for all rows",
                stacklevel=2,
            )
        self.model = model
        self.prompt = prompt
        self.config = config
        self.task = task
        self.step_loss = TaskLoss() if step_loss is None else step_loss
        self._objective = make_objective(task, model, spec, tokenizer, config.bf16)
        in_place = task.trains_head and not isinstance(prompt, HeadedPrompt)
        self._head = head_parameters(model) if in_place else {}
        self._not_frozen = set(task_head(model)) if task.trains_head else set()  # or not read
        self.device = spec.word_embeddings.weight.device
        self._check_trainable()
        check_checkpointing(spec, prompt, config.gradient_checkpointing)
        self._check_evaluation(eval_data is not None)
        self._train = encode(task, train_data, tokenizer, prompt, spec, name="train", **row_limits(config)).rows
        batch_size = config.per_device_train_batch_size
        check_batches(
            self._objective, len(self._train), batch_size, name_of(train_data, "train"), "per_device_train_batch_size"
        )
        self._eval: list[EncodedRow] = []
        if eval_data is not None:
            self._eval = encode(task, eval_data, tokenizer, prompt, spec, name="eval", **row_limits(config)).rows
            check_evaluation(
                self._objective,
                self._eval,
                config.per_device_eval_batch_size,
                name_of(eval_data, "eval"),
                "per_device_eval_batch_size",
            )
        if prompt is not None:
            prompt.to(self.device)
        batches = len(batch_starts(len(self._train), batch_size, self._objective.least_rows))
        self._steps_per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        self._total_steps = (
            config.max_steps
            if config.max_steps != -1
            else max(math.ceil(round(config.num_train_epochs * self._steps_per_epoch, 6)), 1)
        )
        warmup_steps(config, self._total_steps)

    def fit(self, resume: Resume = False, *, on_start: Callable[[], object] | None = None) -> TrainingResult:
        """Train, and write everything into ``config.output_dir``.

        Resuming is exact: on one machine and one version of torch the resumed run's losses, evaluations and final
        prompt equal those of the uninterrupted run bit for bit on CPU. For that the settings, the data, the prompt's
        method and shapes, and the backbone must be those of the checkpoint. Free to change are `output_dir`,
        `save_strategy`, `save_steps`, `save_total_limit`, `logging_steps`, `load_best_model_at_end`, `report_to`,
        `disable_tqdm`, and, with a constant schedule without `warmup_ratio`, `max_steps` and `num_train_epochs` (a run
        is evaluated after its last step, so a longer one may have an evaluation less). Resuming a finished run does no
        steps and returns its result.

        Args:
            resume: False starts a new run in an output_dir without one. True goes on from the newest complete
                checkpoint in output_dir (a torn one is named in a warning and passed over), and from the start where
                there is none, so a job that may be killed at any time can always pass True; only the prompt of a
                finished run that kept no checkpoint is not replaced. A path goes on from that checkpoint folder;
                output_dir must then hold no newer one.
            on_start: called once nothing is left to refuse and output_dir is there and held, before the first step: for
                files that describe the run and must not be replaced by a run that is refused.

        Returns:
            What was done.

        Raises:
            InputError: output_dir already holds a run and `resume` is False, or a finished one without a checkpoint;
                another run is training in it; the checkpoint is missing or torn; or something differs from the
                checkpoint that must not, with both values.
            TrainingDiverged: a loss, gradient or evaluation is not finite. The step that showed it is not taken, the
                prompt keeps the weights from before it, and nothing saved is touched.
            SystemExit: status 143 after SIGTERM, once a checkpoint is written.
            KeyboardInterrupt: after SIGINT, once a checkpoint is written; a second SIGINT does not wait for it.
        """
        started = time.perf_counter()
        plan = self.make_plan()
        if not plan.output_dir.exists():
            _start(plan, resume)  # a refusal leaves no folder behind
        with exclusive(make_directory(plan.output_dir)):
            checkpoint = _start(plan, resume)
            clean_leftovers(plan.output_dir)
            if on_start is not None:
                on_start()
            result = None
            prompts = [] if self.prompt is None else [self.prompt]
            with (
                training_conditions(self.model, prompts, self._head, self.device, self.config.gradient_checkpointing),
                Interruption() as interruption,
            ):
                run = self.new_run(plan)
                if checkpoint is not None:
                    restore_run(run, checkpoint)
                with self.open_journal(run, show_bar=not self.config.disable_tqdm) as journal:
                    loop = Loop(
                        [(run, journal)],
                        lambda steps, check: [one.backward(batches, check) for one, batches in steps],
                        RunSaver(run, journal),
                        interruption,
                    )
                    try:
                        with settled_objects():
                            loop.go()
                        if run.diverged is not None:
                            raise run.diverged
                        result = self.conclude(run, journal, started)
                    except Interrupted:
                        journal.record("interrupted", run.progress.step, run.epoch, {})
        leave(interruption, done=result is not None)
        assert result is not None
        return result

    def new_run(self, plan: Plan, alone: bool = True) -> Run:
        """A run at its first step, inside `training_conditions`; unless `alone` with random numbers of its own."""
        seed_everything(self.config.seed)
        generators = Generators(own=not alone)
        return Run(plan, self._objective, self.prompt, self._head, self._train, self._eval, self.step_loss, generators)

    def open_journal(self, run: Run, show_bar: bool) -> Journal:
        """The journal of a run from where it stands."""
        return Journal(
            run.plan.output_dir,
            run.progress.step,
            run.plan.total_steps,
            redo_evaluation=run.progress.evaluation_due,
            show_bar=show_bar,
            tensorboard=self.config.report_to == "tensorboard",
        )

    def _check_trainable(self) -> None:
        parameters = [p for p in self.prompt.parameters() if p.requires_grad] if self.prompt is not None else []
        if not parameters and not self._head:
            raise InputError("expected something to train, got a prompt without trainable parameters and no head")
        for name, parameter in self.prompt.named_parameters() if self.prompt is not None else []:
            if parameter.dtype != torch.float32:
                raise InputError(
                    f"expected the prompt's {name} in float32 (bf16=True is enough), got {parameter.dtype}"
                )

    def _check_evaluation(self, has_data: bool) -> None:
        config = self.config
        if not has_data:
            for name in ("eval_strategy", "early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"):
                if getattr(config, name) not in (None, False, "no"):
                    raise InputError(f"expected eval_data with {name}={getattr(config, name)!r}, got None")
        names = self._objective.metric_names
        if config.metric_for_best_model is not None and config.metric_for_best_model not in names:
            raise InputError(
                f"expected metric_for_best_model among {', '.join(names)}, got {config.metric_for_best_model!r}"
            )

    def make_plan(self) -> Plan:
        """What a run will do: the settings with everything that they leave open filled in."""
        config = self.config
        metric = config.metric_for_best_model or self._objective.default_metric
        greater = config.greater_is_better
        rate = config.learning_rate
        if rate is None:
            rate = self.prompt.default_learning_rate() if self.prompt is not None else config.head_learning_rate
        return Plan(
            config=config,
            output_dir=Path(config.output_dir),
            learning_rate=rate,
            steps_per_epoch=self._steps_per_epoch,
            total_steps=self._total_steps,
            eval_strategy=config.eval_strategy or ("epoch" if self._eval else "no"),
            metric=metric,
            greater_is_better=not any(part in metric for part in ("loss", "perplexity"))
            if greater is None
            else greater,
            identity=run_identity(
                config,
                rate,
                self.prompt,
                self._head,
                fingerprint_model(self.model, skip=self._not_frozen),
                fingerprint_rows(self._train),
                fingerprint_rows(self._eval),
                self.step_loss.identity(),
            ),
            environment=environment(self.device),
        )

    def conclude(self, run: Run, journal: Journal, started: float) -> TrainingResult:
        """Write what a finished run leaves; `started` is when, by `time.perf_counter`.

        Raises:
            TrainingDiverged: a weight is not finite; no prompt is written.
        """
        progress, plan = run.progress, run.plan
        best = next((entry for entry in progress.evaluations if entry["step"] == progress.best_step), None)
        held = progress.evaluations[-1] if progress.evaluations else None
        if self.config.load_best_model_at_end and best is not None:
            run.load_best()
            held = best
        metrics = {name: value for name, value in (held or {}).items() if name not in ("step", "epoch")}
        prompt_path = run.export(plan.output_dir / PROMPT_NAME, held or {"step": progress.step, "epoch": run.epoch})
        points = [(int(entry["step"]), entry[plan.metric]) for entry in progress.evaluations]
        curve = draw_curve(plan.output_dir / "curve.png", progress.losses, points, plan.metric)
        seconds = time.perf_counter() - started
        speed = run.tokens / run.seconds if run.seconds else 0.0
        memory = peak_memory(self.device)
        journal.record(
            "end", progress.step, run.epoch, {"seconds": seconds, "tokens_per_second": speed, "peak_memory": memory}
        )
        return TrainingResult(
            losses=list(progress.losses),
            evaluations=list(progress.evaluations),
            best=best,
            metrics=metrics,
            steps=progress.step,
            epochs=run.epoch,
            stopped_early=progress.stopped_early,
            seconds=seconds,
            tokens_per_second=speed,
            peak_memory=memory,
            prompt_path=prompt_path,
            best_path=plan.output_dir / "best" if best is not None else None,
            log_path=journal.path,
            curve_path=curve,
            checkpoints=[plan.output_dir / f"checkpoint-{step}" for step in checkpoint_steps(plan.output_dir)],
        )


def _start(plan: Plan, resume: Resume) -> Checkpoint | None:
    """The checkpoint to go on from, found fit for it; None starts anew."""
    checkpoint = starting_point(plan.output_dir, resume, TRACES)
    if checkpoint is not None:
        if "runs" in checkpoint.state:
            raise InputError(f"expected a checkpoint of a single run, got {str(checkpoint.path)!r}, one of a PromptSet")
        require_exact(checkpoint.state, plan, str(checkpoint.path))
    return checkpoint


def leave(interruption: Interruption, done: bool) -> None:
    """Answer a signal, even if the run came to its end before it could be obeyed."""
    if interruption.received == signal.SIGINT:
        raise KeyboardInterrupt
    if not done or interruption.received is not None:
        sys.exit(128 + signal.SIGTERM)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # kilobytes, except on macOS
