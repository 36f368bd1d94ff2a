"""What one optimiser step minimises: by default the task's loss over its micro-batches, and the place for other losses.

A step's loss comes in parts, each backpropagated on its own so that only one forward's activations are held. It is a
function of the prompt, the micro-batches and the number of the step: whatever else it reads (rows of another task, a
prompt to stay near) is fixed before the run and named in `identity`, so a resumed run needs no state of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ptengine.backbone.packing import PackedBatch
from ptengine.data import EncodedRow
from ptengine.prompts.base import Prompt
from ptengine.training.objective import Objective

__all__ = ["LossPart", "MicroBatch", "StepInfo", "StepLoss", "TaskLoss", "micro_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the training data that one forward and backward of a step takes.

    Attributes:
        batch: the rows, on the backbone's device.
        rows: their numbers in the data.
        num_labels: over how many labels its loss is a mean.
        share: its share of the step's labels; the shares add up to 1. A step's loss is the mean over all of its labels,
            not over the micro-batches' means.
    """

    batch: PackedBatch
    rows: Sequence[int]
    num_labels: int
    share: float


def micro_batches(
    objective: Objective, rows: Sequence[EncodedRow], groups: Sequence[Sequence[int]]
) -> list[MicroBatch]:
    """One step's micro-batches: the `rows` that each of `groups` numbers."""
    batches = [objective.collate([rows[i] for i in group]) for group in groups]
    counts = [objective.count_labels(batch) for batch in batches]
    total = max(sum(counts), 1)  # pairs may all be such that do not match
    return [
        MicroBatch(batch, group, count, count / total)
        for batch, group, count in zip(batches, groups, counts, strict=True)
    ]


@dataclass(frozen=True)
class StepInfo:
    """Attributes:
    step: optimiser steps done before this one, from 0.
    total_steps: of the whole run.
    label_smoothing: of the run's configuration.
    check: to be called before every part but the first; may raise to break off, and the step is then not taken.
    """

    step: int
    total_steps: int
    label_smoothing: float
    check: Callable[[], None]


@dataclass(frozen=True)
class LossPart:
    """Attributes:
    loss: scalar with a graph to the prompt (or the head); the parts of a step add up to its loss.
    rows: rows of the training data it was computed from, none where it was computed from something else.
    num_tokens: text tokens it ran.
    """

    loss: Tensor
    rows: Sequence[int]
    num_tokens: int


@runtime_checkable
class StepLoss(Protocol):
    """What `ptengine.Trainer(..., step_loss=...)` takes."""

    def identity(self) -> dict[str, Any]:
        """Json values that must be equal for a run to go on exactly."""
        ...

    def parts(
        self, objective: Objective, prompt: Prompt | None, batches: Sequence[MicroBatch], info: StepInfo
    ) -> Iterator[LossPart]:
        """The parts of one step's loss, at least one; the caller calls backward on each before it asks for the next."""
        ...


class TaskLoss:
    """The mean of the task's loss over all labels of the step: equal to one large batch, whatever the rows' lengths."""

    def identity(self) -> dict[str, Any]:
        return {}

    def parts(
        self, objective: Objective, prompt: Prompt | None, batches: Sequence[MicroBatch], info: StepInfo
    ) -> Iterator[LossPart]:
        for index, part in enumerate(batches):
            if index:
                info.check()
            loss = objective.loss(prompt, part.batch, info.label_smoothing) * part.share
            yield LossPart(loss, part.rows, part.batch.num_tokens)
