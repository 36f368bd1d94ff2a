"""The objective of extractive question answering: a trained head points at an answer's first and last token.

Knows the patched backbone, prompts and encoded rows; no optimiser and no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptengine.backbone import token_head
from ptengine.backbone.in_row import dense_slots
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import EncodedRow, answer_metrics
from ptengine.data.encoding import AnswerWindow
from ptengine.prompts.base import Prompt
from ptengine.training.head_objective import Head, HeadObjective, own_head
from ptengine.training.objective_base import EvalResult, lower

__all__ = ["AnswerObjective"]


class AnswerObjective(HeadObjective):
    """The loss of a row is the mean of those of start and end, each among the row's own tokens."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "exact_match", "f1")
    default_metric: ClassVar[str] = "f1"

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool, max_answer_length: int) -> None:
        super().__init__(model, spec, bf16)
        self._longest = max_answer_length

    def count_labels(self, batch: PackedBatch) -> int:
        return batch.num_rows

    def loss_of(self, hidden: Tensor, batch: PackedBatch, head: Head, label_smoothing: float) -> Tensor:
        log_probs, mask = _among_rows(self._logits(hidden, head), batch)
        answers = batch.row_labels
        assert answers is not None
        losses = -log_probs.gather(1, answers[:, None, :])[:, 0]  # [B, 2]
        if label_smoothing:
            smooth = -log_probs.masked_fill(~mask, 0).sum(1) / mask.sum(1)  # [B, 2]
            losses = (1 - label_smoothing) * losses + label_smoothing * smooth
        return losses.mean()

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
        best: dict[int, tuple[float, str]] = {}  # of each row of the data, over its windows
        references: dict[int, tuple[str, ...]] = {}
        for part in self._batches(rows, batch_size, check):
            batch = self.collate(part)
            assert batch.row_labels is not None
            logits = self._logits(self._hidden(lowered, batch), own_head(prompt))  # [N, 2]
            log_probs, _ = _among_rows(logits, batch)
            total -= log_probs.gather(1, batch.row_labels[:, None, :]).sum().item() / 2
            for row, own in zip(part, logits.cpu().split(batch.cu_seqlens.diff().tolist()), strict=True):
                assert row.window is not None
                references[row.index] = row.references
                found = self._answer(own, row.window)
                best[row.index] = max(best.get(row.index, found), found, key=lambda one: one[0])
        predictions = [text for _, text in best.values()]
        metrics = {"loss": total / len(rows), **answer_metrics(predictions, list(references.values()))}
        return EvalResult(metrics, predictions, len(best))

    def _answer(self, logits: Tensor, window: AnswerWindow) -> tuple[float, str]:
        """The score and the text of the best answer in a window of T tokens; -inf and no text where it has none."""
        outside = torch.tensor([offset is None for offset in window.offsets])  # [T]
        start, end = logits.masked_fill(outside[:, None], -math.inf).unbind(1)  # [T], [T]
        allowed = torch.ones(len(start), len(end), dtype=torch.bool).triu().tril(self._longest - 1)
        scores = (start[:, None] + end).masked_fill(~allowed, -math.inf)  # [T, T]: from, to
        first, last = divmod(int(scores.argmax()), len(end))
        begins, ends = window.offsets[first], window.offsets[last]
        if begins is None or ends is None:
            return -math.inf, ""
        return float(scores[first, last]), window.context[begins[0] : ends[1]]

    def _logits(self, hidden: Tensor, head: Head) -> Tensor:
        with self._autocast():
            return token_head(self._model, hidden, weights=head).float()  # [N, 2]


def _among_rows(logits: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Log probabilities among each row's tokens, [B, T, 2] of logits [N, 2], and where there is one, bool [B, T, 1]."""
    slots, mask = dense_slots(batch.cu_seqlens.diff().long(), batch.max_seqlen, batch.num_tokens)
    dense = logits.new_full((mask.numel(), 2), -math.inf).index_copy(0, slots, logits)  # [B * T, 2]
    return dense.unflatten(0, mask.shape).log_softmax(dim=1), mask.bool()[:, :, None]
