"""What every objective is, and what they share: batches on the backbone's device, autocast, prompts lowered.

Knows no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import BoundVerbalizer, EncodedRow, classification_metrics, collate
from ptengine.data.collation import batch_starts
from ptengine.prompts.base import Prompt

__all__ = ["BaseObjective", "EvalResult", "Objective", "class_result", "label_scores", "lower", "perplexity"]

_MOST_NATS = 700.0  # e^700 is the last power of e that a float holds comfortably


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        metrics: name to value. ``loss`` is in nats, the mean over all with a label (tokens, rows, windows of a text,
            pairs); ``perplexity`` is e^loss, capped at e^700; the others are those of
            `ptengine.data.classification_metrics`, `generation_metrics`, `answer_metrics` and `entity_metrics`, and of
            `ptengine.training.embedding_objective`.
        predictions: one per row, in the data's order: the label's name, the generated text, the answer, the labels of
            the words, or the cosine of the pair. Empty where a generation task was scored without generating.
        n: rows evaluated.
    """

    metrics: dict[str, float]
    predictions: list[str]
    n: int


class Objective(Protocol):
    """Loss and evaluation of one task on one backbone.

    Attributes:
        metric_names: what `evaluate` returns.
        default_metric: the one that picks the best prompt unless told otherwise.
        least_rows: of a batch; fewer have no loss.
    """

    metric_names: ClassVar[tuple[str, ...]]
    default_metric: ClassVar[str]
    least_rows: ClassVar[int]

    def collate(self, rows: Sequence[EncodedRow]) -> PackedBatch:
        """Rows as one batch on the backbone's device."""
        ...

    def count_labels(self, batch: PackedBatch) -> int:
        """Over how many labels `loss` takes its mean."""
        ...

    def loss(self, prompt: Prompt | None, batch: PackedBatch, label_smoothing: float) -> Tensor:
        """Mean loss of the batch, a scalar in fp32; differentiable in the prompt (and the head)."""
        ...

    def check_evaluable(self, rows: Sequence[EncodedRow], source_name: str) -> None:
        """Raise `InputError` where `rows` leave a metric undefined."""
        ...

    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        """Evaluate without gradients. `check` is called before every batch and may raise to break off."""
        ...


class BaseObjective:
    least_rows: ClassVar[int] = 1

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool) -> None:
        self._model = model
        self._spec = spec
        self._device = spec.word_embeddings.weight.device
        self._bf16 = bf16

    def collate(self, rows: Sequence[EncodedRow]) -> PackedBatch:
        return collate(rows).to(self._device)

    def check_evaluable(self, rows: Sequence[EncodedRow], source_name: str) -> None:
        return

    def _autocast(self) -> torch.autocast:
        """Around the backbone only: prompts are lowered, and losses added up, in fp32."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def _batches(
        self, rows: Sequence[EncodedRow], batch_size: int, check: Callable[[], None]
    ) -> Iterator[Sequence[EncodedRow]]:
        bounds = [*batch_starts(len(rows), batch_size, self.least_rows), len(rows)]
        for start, end in pairwise(bounds):
            check()
            yield rows[start:end]


def lower(prompt: Prompt | None) -> LoweredPrompt | None:
    return None if prompt is None else prompt.lower()


def label_scores(words: Tensor, bound: BoundVerbalizer) -> Tensor:
    """The log of the sum of its words' probabilities for each label: [..., C] of log probabilities [..., W]."""
    member = torch.tensor(bound.word_labels)[:, None] == torch.arange(len(bound.labels))  # [W, C]
    outside = torch.zeros(member.shape).masked_fill(~member, -math.inf).to(words.device)
    return torch.logsumexp(words[..., :, None] + outside, dim=-2)


def class_result(
    loss: float, rows: Sequence[EncodedRow], predicted: Sequence[int], labels: Sequence[str]
) -> EvalResult:
    """What was found where every row has one class: its mean loss, and the class predicted for each."""
    gold: list[int] = [row.class_id for row in rows]  # type: ignore[misc]
    metrics = {"loss": loss, **classification_metrics(gold, predicted, labels)}
    return EvalResult(metrics, [labels[i] for i in predicted], len(rows))


def perplexity(loss: float) -> float:
    """e^loss, capped at e^700."""
    return math.exp(min(loss, _MOST_NATS))
