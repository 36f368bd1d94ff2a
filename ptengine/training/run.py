"""The state of one run and what moves it: the two ends of an optimiser step, evaluations, the best prompt.

Everything a later step depends on is in `Run.snapshot` and comes back with `Run.restore`, so a run cut off anywhere and
resumed computes the same numbers. What lies between the ends of a step, and in which order runs move, is the loop's
business. Knows no user input; what reaches it has been checked by the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import LoweredPrompt
from ptengine.configuration import TrainingConfig
from ptengine.data import EncodedRow, ShuffledBatches
from ptengine.errors import TrainingDiverged
from ptengine.files import save_safetensors_atomic, write_json_atomic
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HEAD_PREFIX, HeadedPrompt
from ptengine.training.folders import write_folder
from ptengine.training.head_objective import HeadObjective, own_head
from ptengine.training.interruption import Interruption
from ptengine.training.journal import Journal
from ptengine.training.objective import Objective
from ptengine.training.optimization import (
    load_optimizer_state,
    load_schedule_state,
    make_optimizer,
    make_schedule,
    optimizer_state,
    schedule_state,
)
from ptengine.training.randomness import Generators
from ptengine.training.step_loss import MicroBatch, StepInfo, StepLoss, micro_batches

__all__ = ["HEAD_NAME", "Interrupted", "Plan", "Run"]

HEAD_NAME = "head.safetensors"


class Interrupted(Exception):
    """A signal asked the run to stop; its state is that of the last whole optimiser step."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, fixed before it starts."""

    config: TrainingConfig
    output_dir: Path
    learning_rate: float
    steps_per_epoch: int
    total_steps: int
    eval_strategy: str
    metric: str
    greater_is_better: bool
    identity: dict[str, Any]
    environment: dict[str, Any]


@dataclass
class Progress:
    """Counters and history; json values but for the losses."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0
    evaluation_due: bool = False
    stopped_early: bool = False


class Run:
    """One run of a trainer, alone or beside others.

    Args:
        plan: what to do.
        objective: loss and evaluation of the task.
        prompt: what is trained, or None to train the head alone.
        head: trainable parameters of the backbone's head by name; empty for tasks without one, and where the prompt
            has a head of its own.
        train_rows: encoded training rows.
        eval_rows: encoded evaluation rows; empty where there are none.
        step_loss: what a step minimises.
        generators: the random numbers it draws, seeded.

    Attributes:
        tokens, seconds: text tokens and wall time of the optimiser steps since the run was made or restored.
        last_checkpoint: the newest folder that its state can be restored from.
        diverged: why the run cannot go on, or None.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        prompt: Prompt | None,
        head: Mapping[str, nn.Parameter],
        train_rows: Sequence[EncodedRow],
        eval_rows: Sequence[EncodedRow],
        step_loss: StepLoss,
        generators: Generators,
    ) -> None:
        self.plan = plan
        self.progress = Progress()
        self.tokens = 0
        self.seconds = 0.0
        self.last_checkpoint: Path | None = None
        self.diverged: TrainingDiverged | None = None
        self._generators = generators
        self._objective = objective
        self._prompt = prompt
        self._head = head
        self._train_rows = train_rows
        self._eval_rows = eval_rows
        self._step_loss = step_loss
        self._batches = ShuffledBatches(
            len(train_rows), plan.config.per_device_train_batch_size, plan.config.seed, objective.least_rows
        )
        self._best: dict[str, Tensor] = {}
        named = {n: p for n, p in prompt.named_parameters() if p.requires_grad} if prompt is not None else {}
        scales = prompt.learning_rate_factors() if prompt is not None else {}
        # The gradient's norm rounds by the order of its parts: the head's by name, as HeadedPrompt keeps them.
        self._trained = [*named.values(), *(head[name] for name in sorted(head))]
        heads = [*head.values()]
        if isinstance(prompt, HeadedPrompt):
            heads += [named.pop(name) for name in list(named) if name.startswith(HEAD_PREFIX)]
        self._optimizer = make_optimizer(
            plan.config,
            list(named.values()),
            heads,
            plan.learning_rate,
            [scales.get(name, 1.0) for name in named],
        )
        self._schedule = make_schedule(plan.config, self._optimizer, plan.total_steps)
        self._groups: list[list[int]] = []  # training rows of the step's micro-batches
        self._parts: list[Sequence[int]] = []  # and of the parts of its loss
        self._step_tokens = 0
        self._rate = self._norm = math.nan  # of the last step
        # Generators and sampler as they were after the last whole step: what a checkpoint holds, also in mid-step.
        self._randomness = generators.state()
        self._position = self._batches.state_dict()

    @property
    def epoch(self) -> float:
        return self.progress.step / self.plan.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether there is no step left to do, or none that could be done."""
        over = self.progress.step >= self.plan.total_steps or self.progress.stopped_early
        return over or self.diverged is not None

    def snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything a later step depends on: tensors by file stem, and json values."""
        moments, optimizer = optimizer_state(self._optimizer)
        generators, randomness = self._randomness
        run = {f"random.{name}": state for name, state in generators.items()}
        run["losses"] = torch.tensor(self.progress.losses, dtype=torch.float64)
        groups = {"optimizer": moments, "run": run, "best": self._best, **split_weights(self.weights())}
        progress = {name: value for name, value in vars(self.progress).items() if name != "losses"}
        state = {
            "step": self.progress.step,
            "progress": progress,
            "optimizer": optimizer,
            "schedule": schedule_state(self._schedule),
            "randomness": randomness,
            "sampler": self._position,
            "identity": self.plan.identity,
            "environment": self.plan.environment,
        }
        return {stem: group for stem, group in groups.items() if group}, state

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], path: Path) -> None:
        """Take over what `snapshot` gave, read from `path`, whose identity has been found equal."""
        run = tensors["run"]
        self.restore_history(tensors, state, path)
        self.load_weights(join_weights(tensors))
        load_optimizer_state(self._optimizer, tensors.get("optimizer", {}), state["optimizer"])
        load_schedule_state(self._schedule, state["schedule"])
        generators = {name.removeprefix("random."): value for name, value in run.items() if name.startswith("random.")}
        self._generators.load(generators, state["randomness"])
        self._randomness = self._generators.state()
        self._batches.load_state_dict(state["sampler"])
        self._position = state["sampler"]

    def restore_history(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], path: Path) -> None:
        """Take over losses, evaluations and the best prompt alone: what is left of a run that diverged."""
        self._best = tensors.get("best", {})
        self.progress = Progress(losses=tensors["run"]["losses"].tolist(), **state["progress"])
        self.last_checkpoint = path
        if self._best:
            self._write_best()

    def weights(self) -> dict[str, Tensor]:
        """Copies of what is trained, named ``prompt.<name>`` and ``head.<name>``."""
        prompt = self._prompt.state_dict() if self._prompt is not None else {}
        named = {f"prompt.{name}": tensor for name, tensor in prompt.items()}
        named |= {f"head.{name}": parameter for name, parameter in self._head.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        groups = split_weights(weights)
        if self._prompt is not None:
            self._prompt.load_state_dict(groups["prompt"])
        with torch.no_grad():
            for name, parameter in self._head.items():
                parameter.copy_(groups["head"][name])

    def load_best(self) -> None:
        """Put the weights of the best evaluation into the prompt and the head."""
        self.load_weights(self._best)

    def begin_step(self) -> list[MicroBatch]:
        """Take the rows of the next step; gradients begin at none."""
        self._groups = self._next_group()
        batches = micro_batches(self._objective, self._train_rows, self._groups)
        if self._prompt is not None:
            self._prompt.train()
        self._optimizer.zero_grad(set_to_none=True)
        self._parts = list(self._groups)
        self._step_tokens = sum(part.batch.num_tokens for part in batches)
        return batches

    def backward(self, batches: Sequence[MicroBatch], check: Callable[[], None]) -> list[Tensor]:
        """Add the gradients of a step; returns the parts of its loss, fp32. `check` is called between parts."""
        info = StepInfo(self.progress.step, self.plan.total_steps, self.plan.config.label_smoothing_factor, check)
        losses: list[Tensor] = []
        self._parts, self._step_tokens = [], 0
        with self._generators.in_place():
            for part in self._step_loss.parts(self._objective, self._prompt, batches, info):
                part.loss.backward()
                losses.append(part.loss.detach().float())
                self._parts.append(part.rows)
                self._step_tokens += part.num_tokens
        return losses

    def lower(self) -> LoweredPrompt:
        """The prompt as the backbone reads it, for a backward pass that several runs share."""
        assert self._prompt is not None
        with self._generators.in_place():
            return self._prompt.lower()

    def loss_of(self, hidden: Tensor, micro_batch: MicroBatch, label_smoothing: float) -> Tensor:
        """The loss of a micro-batch behind the prompt's own head, for a backward pass that several runs share."""
        assert isinstance(self._objective, HeadObjective)
        return self._objective.loss_of(hidden, micro_batch.batch, own_head(self._prompt), label_smoothing)

    def end_step(self, losses: Sequence[Tensor]) -> None:
        """Clip, and take the optimiser's step, with every part of the loss.

        Raises:
            TrainingDiverged: a loss or the gradient is not finite; the step is not taken.
        """
        progress, groups = self.progress, self._groups
        values = torch.stack(list(losses)).tolist()
        broken = [part for part, value in zip(self._parts, values, strict=True) if not math.isfinite(value)]
        if broken:
            raise self._diverged(progress.step + 1, "the loss is not finite", _flat(broken))
        self._norm = nn.utils.clip_grad_norm_(self._trained, self.plan.config.max_grad_norm or math.inf).item()
        if not math.isfinite(self._norm):
            raise self._diverged(progress.step + 1, f"the gradient has norm {self._norm}", _flat(groups))
        self._rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.step()
        self._schedule.step()
        self._randomness, self._position = self._generators.state(), self._batches.state_dict()
        progress.step += 1
        progress.losses.append(math.fsum(values))
        progress.evaluation_due = self.due(self.plan.eval_strategy, self.plan.config.eval_steps)

    def _next_group(self) -> list[list[int]]:
        """Training rows of the next step's micro-batches, all of one epoch."""
        groups: list[list[int]] = []
        while True:
            batch = next(self._batches)
            groups.append(batch.rows)
            last = batch.batch_index + 1 == self._batches.batches_per_epoch
            if last or len(groups) == self.plan.config.gradient_accumulation_steps:
                return groups

    def report(self, journal: Journal, seconds: float) -> None:
        """Tell the journal of the step just taken and of the seconds it took."""
        progress, every = self.progress, self.plan.config.logging_steps
        self.tokens += self._step_tokens
        self.seconds += seconds
        speed = self.tokens / self.seconds
        journal.advance(progress.losses[-1], speed)
        if progress.step % every and progress.step != self.plan.total_steps:
            return
        recent = progress.losses[(progress.step - 1) // every * every :]
        values = {
            "loss": math.fsum(recent) / len(recent),
            "learning_rate": self._rate,
            "grad_norm": self._norm,
            "tokens_per_second": speed,
            "seconds": self.seconds,
        }
        journal.record("train", progress.step, self.epoch, values)

    def evaluate(self, journal: Journal, interruption: Interruption) -> None:
        """Evaluate, remember a new best, and decide whether to stop.

        Raises:
            TrainingDiverged: a metric is not finite.
            Interrupted: a signal came; the evaluation is still due.
        """

        def check() -> None:
            if interruption.received is not None:
                raise Interrupted

        progress, plan = self.progress, self.plan
        if self._prompt is not None:
            self._prompt.eval()
        with self._generators.in_place():
            metrics = self._objective.evaluate(
                self._prompt, self._eval_rows, plan.config.per_device_eval_batch_size, check
            ).metrics
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise self._diverged(progress.step, f"the evaluation's {name} is {value}", _flat(self._groups))
        self._randomness = self._generators.state()
        progress.evaluation_due = False
        progress.evaluations.append({"step": progress.step, "epoch": self.epoch, **metrics})
        journal.record("eval", progress.step, self.epoch, metrics)
        value = metrics[plan.metric]
        best = progress.best_value
        if best is None or (value > best if plan.greater_is_better else value < best):
            progress.best_step, progress.best_value, progress.evaluations_since_best = progress.step, value, 0
            self._best = self.weights()
            self._write_best()
            return
        progress.evaluations_since_best += 1
        patience = plan.config.early_stopping_patience
        progress.stopped_early = patience is not None and progress.evaluations_since_best >= patience

    def _write_best(self) -> None:
        now = self.weights()
        best = next(entry for entry in self.progress.evaluations if entry["step"] == self.progress.best_step)
        try:
            self.load_best()
            self.export(self.plan.output_dir / "best", best)
        finally:
            self.load_weights(now)

    def export(self, folder: Path, facts: Mapping[str, Any]) -> Path:
        """Write the prompt (folded), the head and `facts` for use after training, in one step.

        Raises:
            TrainingDiverged: a weight is not finite; nothing is written.
        """
        self.require_finite()

        def write(fresh: Path) -> None:
            if self._prompt is not None:
                self._prompt.save(fresh)
            if self._head:
                save_safetensors_atomic(fresh / HEAD_NAME, self._head)
            write_json_atomic(fresh / "training.json", dict(facts))

        return write_folder(folder, write)

    def due(self, strategy: str, every: int | None) -> bool:
        """Whether something of `strategy` ("no", "steps" or "epoch") comes after the step just taken."""
        step = self.progress.step
        if strategy == "no":
            return False
        if step == self.plan.total_steps:
            return True
        return step % (self.plan.steps_per_epoch if strategy == "epoch" else every or 1) == 0

    def require_finite(self) -> None:
        """Refuse to write weights that an update has spoilt: the loss would show it only in the next step."""
        for name, tensor in self.weights().items():
            if not bool(tensor.isfinite().all()):
                raise self._diverged(self.progress.step, f"{name} is not finite after the step", _flat(self._groups))

    def _diverged(self, step: int, what: str, rows: Sequence[int]) -> TrainingDiverged:
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "nothing was saved yet"
        )
        return TrainingDiverged(
            f"training diverged at step {step}: {what}; training rows of the batch: {list(rows)}; {kept}", step, rows
        )


def _flat(groups: Sequence[Sequence[int]]) -> list[int]:
    return [row for group in groups for row in group]


def split_weights(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights by the part before the first dot of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        part, rest = name.split(".", 1)
        groups.setdefault(part, {})[rest] = tensor
    return groups


def join_weights(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `split_weights`, over the groups ``prompt`` and ``head``."""
    return {f"{part}.{name}": t for part in ("prompt", "head") for name, t in groups.get(part, {}).items()}
