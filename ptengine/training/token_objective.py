"""The objective of token classification: a trained head gives every word its label.

Knows the patched backbone, prompts and encoded rows; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import token_head
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import EncodedRow, classification_metrics, entity_metrics
from ptengine.prompts.base import Prompt
from ptengine.training.head_objective import Head, HeadObjective, own_head
from ptengine.training.objective_base import EvalResult, lower

__all__ = ["EntityObjective", "TokenObjective"]


class TokenObjective(HeadObjective):
    """The loss stands on labelled tokens, each at its own position; a row's prediction is its labels with blanks."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "weighted_f1")
    default_metric: ClassVar[str] = "accuracy"

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool, labels: Sequence[str]) -> None:
        super().__init__(model, spec, bf16)
        self._labels = labels

    def count_labels(self, batch: PackedBatch) -> int:
        return 0 if batch.labels is None else int((batch.labels != IGNORE_INDEX).sum())

    def loss_of(self, hidden: Tensor, batch: PackedBatch, head: Head, label_smoothing: float) -> Tensor:
        logits, labels = self._labelled(hidden, batch, head)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    @torch.no_grad()
    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        lowered = lower(prompt)
        total = 0.0
        predicted: list[int] = []
        for part in self._batches(rows, batch_size, check):
            batch = self.collate(part)
            logits, labels = self._labelled(self._hidden(lowered, batch), batch, own_head(prompt))
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            predicted += logits.argmax(dim=1).tolist()
        gold = [[label for label in row.labels if label != IGNORE_INDEX] for row in rows]
        flat, remaining = [label for row in gold for label in row], iter(predicted)
        named = [[self._labels[next(remaining)] for _ in row] for row in gold]
        metrics = {"loss": total / len(flat), **classification_metrics(flat, predicted, self._labels)}
        metrics |= self._more_metrics([[self._labels[label] for label in row] for row in gold], named)
        return EvalResult(metrics, [" ".join(row) for row in named], len(rows))

    def _more_metrics(self, gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
        return {}

    def _labelled(self, hidden: Tensor, batch: PackedBatch, head: Head) -> tuple[Tensor, Tensor]:
        """Logits fp32 [n, C] of the labelled tokens, and their classes int64 [n]."""
        assert batch.labels is not None
        wanted = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]  # [n]
        with self._autocast():
            logits = token_head(self._model, hidden, wanted, head)  # [n, C]
        return logits.float(), batch.labels[wanted]


class EntityObjective(TokenObjective):
    """Labels that mark entities, which are judged as wholes."""

    metric_names: ClassVar[tuple[str, ...]] = (
        *TokenObjective.metric_names, "entity_precision", "entity_recall", "entity_f1",
    )  # fmt: skip
    default_metric: ClassVar[str] = "entity_f1"

    def _more_metrics(self, gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
        return entity_metrics(gold, predicted)
