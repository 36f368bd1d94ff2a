"""The task-tuned projector: one network that carries soft prompts of a source backbone to a target backbone.

It is trained with the target backbone on the tasks of some source prompts, and carries others (Su et al. 2022, arXiv
2111.06719, section 5). Knows prompts, tasks and the trainer; nothing of banks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.packing import PackedBatch
from ptengine.data import Task
from ptengine.errors import InputError
from ptengine.prompts import ProjectedPrompt
from ptengine.prompts.base import Prompt
from ptengine.training import Trainer, TrainingConfig, TrainingResult
from ptengine.training.objective import Objective
from ptengine.training.preparation import DataSource
from ptengine.training.step_loss import LossPart, MicroBatch, StepInfo
from ptengine.transfer.bank import weights_sha256
from ptengine.transfer.step_rows import TaskRows

__all__ = ["ProjectorLesson", "tune_projector"]


@dataclass(frozen=True)
class ProjectorLesson:
    """Attributes: `prompt`, tuned with the source backbone; the `task` it was tuned for, and rows of it, `data`."""

    prompt: Prompt
    task: Task
    data: DataSource


def tune_projector(
    model: Any,
    tokenizer: Any,
    lessons: Sequence[ProjectorLesson],
    training: TrainingConfig,
    *,
    mapping: Tensor | None = None,
    bottleneck_size: int | None = None,
    resume: bool = False,
) -> tuple[ProjectedPrompt, TrainingResult]:
    """Train a projector with the target backbone: a step's loss is the mean of the lessons' losses, each of its task
    behind its carried prompt.

    Args:
        model, tokenizer: the target backbone, frozen and causal.
        lessons: at least one; their prompts are of one source backbone.
        training: of the run; its batch size, seed and lengths hold for every lesson.
        mapping, bottleneck_size: as in `ProjectedPrompt`; `ptengine.transfer.vocabulary_map` gives a mapping.
        resume: as in `Trainer.fit`.

    Returns:
        The projector, which lowers to the first lesson's carried prompt and carries others by `project`; and its run.

    Raises:
        InputError: no lessons, prompts of several backbones, or as `ProjectedPrompt` and `Trainer`.
    """
    if not lessons:
        raise InputError("expected at least one lesson to tune a projector on, got none")
    first, *others = lessons
    projector = ProjectedPrompt(
        model, first.prompt, bottleneck_size=bottleneck_size, mapping=mapping, seed=training.seed
    )
    for lesson in others:
        projector.project(lesson.prompt)  # refuses what it cannot carry
    loss = _LessonsLoss(model, tokenizer, others, training) if others else None
    trainer = Trainer(
        model, projector, first.data, None, training, task=first.task, tokenizer=tokenizer, step_loss=loss
    )
    return projector, trainer.fit(resume=resume)


class _LessonsLoss:
    """The mean of all lessons' losses; a `ptengine.training.step_loss.StepLoss` that knows all but the first."""

    def __init__(self, model: Any, tokenizer: Any, others: Sequence[ProjectorLesson], config: TrainingConfig) -> None:
        self._others = [_Lesson(model, tokenizer, lesson, config) for lesson in others]

    def identity(self) -> dict[str, Any]:
        return {"lessons": [lesson.identity() for lesson in self._others]}

    def parts(
        self, objective: Objective, prompt: Prompt | None, batches: Sequence[MicroBatch], info: StepInfo
    ) -> Iterator[LossPart]:
        assert isinstance(prompt, ProjectedPrompt)  # `tune_projector` made the trainer
        share = 1 / (1 + len(self._others))
        for index, part in enumerate(batches):
            if index:
                info.check()
            loss = objective.loss(prompt, part.batch, info.label_smoothing) * (part.share * share)
            yield LossPart(loss, part.rows, part.batch.num_tokens)
        for lesson in self._others:
            for part in lesson.rows.batches(info.step):
                info.check()
                loss = lesson.loss(prompt, part.batch, info.label_smoothing) * (part.share * share)
                yield LossPart(loss, (), part.batch.num_tokens)


class _Lesson:
    def __init__(self, model: Any, tokenizer: Any, lesson: ProjectorLesson, config: TrainingConfig) -> None:
        self._prompt = lesson.prompt
        self.rows = TaskRows(lesson.task, lesson.data, model, tokenizer, lesson.prompt, config, "lesson")

    def identity(self) -> dict[str, Any]:
        return {"prompt": weights_sha256(self._prompt.fold()), **self.rows.identity()}

    def loss(self, projector: ProjectedPrompt, batch: PackedBatch, label_smoothing: float) -> Tensor:
        carried: Any = _Carried(projector, self._prompt)
        return self.rows.objective.loss(carried, batch, label_smoothing)


class _Carried:
    """A prompt behind the projector, for an objective, which asks a prompt for nothing but `lower`."""

    def __init__(self, projector: ProjectedPrompt, prompt: Prompt) -> None:
        self._projector, self._prompt = projector, prompt

    def lower(self) -> VirtualTokens:
        return self._projector.lower_other(self._prompt)
