"""Objectives of encoders: classification by a trained head, and by what a masked language model writes into a blank.

Knows the patched backbone, prompts and encoded rows; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import masked_lm_logits, masked_lm_loss, sequence_head
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import BoundVerbalizer, EncodedRow, SequenceClassificationTask
from ptengine.prompts.base import Prompt
from ptengine.training.head_objective import Head, HeadObjective, own_head
from ptengine.training.objective_base import BaseObjective, EvalResult, class_result, label_scores, lower

__all__ = ["MaskedObjective", "SequenceObjective"]


class SequenceObjective(HeadObjective):
    """Classification by a trained head on top of an encoder."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "weighted_f1")
    default_metric: ClassVar[str] = "accuracy"

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool, task: SequenceClassificationTask) -> None:
        super().__init__(model, spec, bf16)
        self._labels = task.labels

    def count_labels(self, batch: PackedBatch) -> int:
        return batch.num_rows

    def loss_of(self, hidden: Tensor, batch: PackedBatch, head: Head, label_smoothing: float) -> Tensor:
        return F.cross_entropy(self._logits(hidden, batch, head), _classes(batch), label_smoothing=label_smoothing)

    def logits(self, prompt: Prompt | None, batch: PackedBatch) -> Tensor:
        """Of the labels, fp32 [B, C]."""
        return self._logits(self._hidden(lower(prompt), batch), batch, own_head(prompt))

    def _logits(self, hidden: Tensor, batch: PackedBatch, head: Head) -> Tensor:
        with self._autocast():
            return sequence_head(self._model, hidden, batch, head).float()  # [B, C]

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
            logits = self._logits(self._hidden(lowered, batch), batch, own_head(prompt))  # [B, C]
            total += F.cross_entropy(logits, _classes(batch), reduction="sum").item()
            predicted += logits.argmax(dim=1).tolist()
        return class_result(total / len(rows), rows, predicted, self._labels)


def _classes(batch: PackedBatch) -> Tensor:
    assert batch.row_labels is not None
    return batch.row_labels


class MaskedObjective(BaseObjective):
    """Classification by words at a mask: the loss is that of the label's first word among the whole vocabulary."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "weighted_f1")
    default_metric: ClassVar[str] = "accuracy"

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool, bound: BoundVerbalizer) -> None:
        super().__init__(model, spec, bf16)
        self._bound = bound

    def count_labels(self, batch: PackedBatch) -> int:
        return batch.num_rows

    def loss(self, prompt: Prompt | None, batch: PackedBatch, label_smoothing: float) -> Tensor:
        lowered = lower(prompt)
        with self._autocast():
            return masked_lm_loss(self._model, lowered, batch, label_smoothing=label_smoothing).loss

    @torch.no_grad()
    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        lowered = lower(prompt)
        words = torch.tensor([word[0] for word in self._bound.words], device=self._device)  # [W]
        total = 0.0
        predicted: list[int] = []
        for part in self._batches(rows, batch_size, check):
            batch = self.collate(part)
            with self._autocast():
                logits, wanted = masked_lm_logits(self._model, lowered, batch)  # [B, V], [B]
            total += F.cross_entropy(logits, wanted, reduction="sum").item()
            # The row's log normaliser is equal for all words.
            predicted += label_scores(logits[:, words], self._bound).argmax(dim=1).tolist()
        return class_result(total / len(rows), rows, predicted, self._bound.labels)
