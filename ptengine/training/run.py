"""The state of one run and what moves it: optimiser steps, evaluations, checkpoints.

Everything a later step depends on is in `Run.snapshot` and comes back with `Run.restore`, so a run cut off anywhere and
resumed computes the same numbers. Knows no user input; what reaches it has been checked by the trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.data import EncodedRow, ShuffledBatches
from ptengine.errors import TrainingDiverged
from ptengine.files import save_safetensors_atomic, write_json_atomic
from ptengine.prompts.base import Prompt
from ptengine.training.checkpoints import Checkpoint, prune_checkpoints, write_checkpoint
from ptengine.training.config import TrainingConfig
from ptengine.training.folders import write_folder
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
from ptengine.training.randomness import load_random_state, random_state
from ptengine.training.step_loss import MicroBatch, StepInfo, StepLoss

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
    """One run of a trainer.

    Args:
        plan: what to do.
        objective: loss and evaluation of the task.
        prompt: what is trained, or None to train the head alone.
        head: trainable parameters of the backbone's head by name; empty for tasks without one.
        train_rows: encoded training rows.
        eval_rows: encoded evaluation rows; empty where there are none.
        step_loss: what a step minimises.
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
    ) -> None:
        self.plan = plan
        self.progress = Progress()
        self.tokens = 0
        self.seconds = 0.0
        self.last_checkpoint: Path | None = None
        self._objective = objective
        self._prompt = prompt
        self._head = head
        self._train_rows = train_rows
        self._eval_rows = eval_rows
        self._step_loss = step_loss
        self._batches = ShuffledBatches(len(train_rows), plan.config.per_device_train_batch_size, plan.config.seed)
        self._best: dict[str, Tensor] = {}
        prompt_parameters = [p for p in prompt.parameters() if p.requires_grad] if prompt is not None else []
        self._trained = [*prompt_parameters, *head.values()]
        self._optimizer = make_optimizer(plan.config, prompt_parameters, list(head.values()), plan.learning_rate)
        self._schedule = make_schedule(plan.config, self._optimizer, plan.total_steps)
        self._rows: list[int] = []
        # Generators and sampler as they were after the last whole step: what a checkpoint holds, also in mid-step.
        self._randomness = random_state()
        self._position = self._batches.state_dict()

    @property
    def epoch(self) -> float:
        return self.progress.step / self.plan.steps_per_epoch

    def go(self, journal: Journal, interruption: Interruption) -> None:
        """Run to the end.

        Raises:
            TrainingDiverged: a loss, a gradient or an evaluation is not finite; nothing is written for that step.
            Interrupted: a signal came; a checkpoint of the last whole step has been written.
        """
        progress = self.progress
        try:
            while True:
                if progress.evaluation_due:
                    self._evaluate(journal, interruption)
                if self._save_due():
                    self._save(journal)
                if progress.step >= self.plan.total_steps or progress.stopped_early:
                    return
                if interruption.received is not None:
                    raise Interrupted
                self._step(journal, interruption)
        except Interrupted:
            self._save(journal)
            raise
        except TrainingDiverged as error:
            journal.record("diverged", error.step, self.epoch, {"message": str(error)})
            raise

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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of `checkpoint`, whose identity has been found equal."""
        tensors, state = checkpoint.tensors, checkpoint.state
        run = tensors["run"]
        self.load_weights(join_weights(tensors))
        load_optimizer_state(self._optimizer, tensors.get("optimizer", {}), state["optimizer"])
        load_schedule_state(self._schedule, state["schedule"])
        generators = {name.removeprefix("random."): value for name, value in run.items() if name.startswith("random.")}
        load_random_state(generators, state["randomness"])
        self._randomness = random_state()
        self._batches.load_state_dict(state["sampler"])
        self._position = state["sampler"]
        self._best = tensors.get("best", {})
        self.progress = Progress(losses=run["losses"].tolist(), **state["progress"])
        self.last_checkpoint = checkpoint.path
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

    def _step(self, journal: Journal, interruption: Interruption) -> None:
        """One optimiser step over the micro-batches of one group."""
        config, progress = self.plan.config, self.progress
        begun = time.perf_counter()
        groups = self._next_group()
        batches = [self._objective.collate([self._train_rows[i] for i in group]) for group in groups]
        counts = [self._objective.count_labels(batch) for batch in batches]
        # Mean over all labels of the step, not the mean of the micro-batches' means.
        micro = [
            MicroBatch(batch, group, count / sum(counts))
            for batch, group, count in zip(batches, groups, counts, strict=True)
        ]
        if self._prompt is not None:
            self._prompt.train()
        self._optimizer.zero_grad(set_to_none=True)

        def check() -> None:
            # The step so far is dropped: generators, weights and moments in `snapshot` are those before it.
            if interruption.received is not None:
                raise Interrupted

        info = StepInfo(progress.step, self.plan.total_steps, config.label_smoothing_factor, check)
        losses: list[Tensor] = []
        rows: list[Sequence[int]] = []
        tokens = 0
        for part in self._step_loss.parts(self._objective, self._prompt, micro, info):
            part.loss.backward()
            losses.append(part.loss.detach().float())
            rows.append(part.rows)
            tokens += part.num_tokens
        values = torch.stack(losses).tolist()
        broken = [part for part, value in zip(rows, values, strict=True) if not math.isfinite(value)]
        if broken:
            raise self._diverged(progress.step + 1, "the loss is not finite", _flat(broken))
        norm = nn.utils.clip_grad_norm_(self._trained, config.max_grad_norm or math.inf).item()
        if not math.isfinite(norm):
            raise self._diverged(progress.step + 1, f"the gradient has norm {norm}", _flat(groups))
        rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.step()
        self._schedule.step()
        self._rows = _flat(groups)
        self._randomness, self._position = random_state(), self._batches.state_dict()
        progress.step += 1
        progress.losses.append(math.fsum(values))
        progress.evaluation_due = self._due(self.plan.eval_strategy, config.eval_steps)
        self.tokens += tokens
        self.seconds += time.perf_counter() - begun
        self._report(journal, rate, norm)

    def _next_group(self) -> list[list[int]]:
        """Training rows of the next step's micro-batches, all of one epoch."""
        groups: list[list[int]] = []
        while True:
            batch = next(self._batches)
            groups.append(batch.rows)
            last = batch.batch_index + 1 == self._batches.batches_per_epoch
            if last or len(groups) == self.plan.config.gradient_accumulation_steps:
                return groups

    def _report(self, journal: Journal, rate: float, norm: float) -> None:
        progress, every = self.progress, self.plan.config.logging_steps
        speed = self.tokens / self.seconds
        journal.advance(progress.losses[-1], speed)
        if progress.step % every and progress.step != self.plan.total_steps:
            return
        recent = progress.losses[(progress.step - 1) // every * every :]
        values = {
            "loss": math.fsum(recent) / len(recent),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "seconds": self.seconds,
        }
        journal.record("train", progress.step, self.epoch, values)

    def _evaluate(self, journal: Journal, interruption: Interruption) -> None:
        """Evaluate, remember a new best, and decide whether to stop."""

        def check() -> None:
            if interruption.received is not None:
                raise Interrupted

        progress, plan = self.progress, self.plan
        if self._prompt is not None:
            self._prompt.eval()
        metrics = self._objective.evaluate(
            self._prompt, self._eval_rows, plan.config.per_device_eval_batch_size, check
        ).metrics
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise self._diverged(progress.step, f"the evaluation's {name} is {value}", self._rows)
        self._randomness = random_state()
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
        self._require_finite()

        def write(fresh: Path) -> None:
            if self._prompt is not None:
                self._prompt.save(fresh)
            if self._head:
                save_safetensors_atomic(fresh / HEAD_NAME, self._head)
            write_json_atomic(fresh / "training.json", dict(facts))

        return write_folder(folder, write)

    def _due(self, strategy: str, every: int | None) -> bool:
        step = self.progress.step
        if strategy == "no":
            return False
        if step == self.plan.total_steps:
            return True
        return step % (self.plan.steps_per_epoch if strategy == "epoch" else every or 1) == 0

    def _save_due(self) -> bool:
        if self.progress.step == 0 or self.plan.config.save_strategy == "no":
            return False
        return self.progress.stopped_early or self._due(self.plan.config.save_strategy, self.plan.config.save_steps)

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint of the last whole step, unless there is one, and thin out the older ones."""
        step = self.progress.step
        self._require_finite()
        path = self.plan.output_dir / f"checkpoint-{step}"
        if self.last_checkpoint == path:
            return
        self.last_checkpoint = write_checkpoint(self.plan.output_dir, step, *self.snapshot())
        journal.record("checkpoint", step, self.epoch, {"path": path.name})
        prune_checkpoints(self.plan.output_dir, self.plan.config.save_total_limit, step, self.progress.best_step)

    def _require_finite(self) -> None:
        """Refuse to write weights that an update has spoilt: the loss would show it only in the next step."""
        for name, tensor in self.weights().items():
            if not bool(tensor.isfinite().all()):
                raise self._diverged(self.progress.step, f"{name} is not finite after the step", self._rows)

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
