"""The objective of embeddings: texts find their pairs among the others of a batch.

Knows the patched backbone, prompts and encoded rows; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone.embedding import text_embeddings
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, pack_rows
from ptengine.backbone.spec import BackboneSpec
from ptengine.data import EncodedRow
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training.objective_base import BaseObjective, EvalResult, lower

__all__ = ["EmbeddingObjective", "LabelledEmbeddingObjective"]

_AT_ONCE = 1024  # texts whose similarities to all others are held together


class EmbeddingObjective(BaseObjective):
    """Judged by where each text's pair stands among all pairs of the data; a prediction is the cosine of a pair.

    ``recall_at_1`` is the share of texts whose pair comes first, ``mrr`` the mean of 1 / rank, equal texts being equal;
    ``loss`` is that of training, in batches of the evaluation's size. Those have two rows at least, since a text alone
    has no others to find its pair among: a last row by itself joins the batch before it.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "mrr", "recall_at_1")
    default_metric: ClassVar[str] = "mrr"
    least_rows: ClassVar[int] = 2

    def __init__(self, model: Any, spec: BackboneSpec, bf16: bool, temperature: float) -> None:
        super().__init__(model, spec, bf16)
        self._temperature = temperature

    def collate(self, rows: Sequence[EncodedRow]) -> PackedBatch:
        """The B texts, then their B pairs."""
        pairs = [row.pair_ids for row in rows if row.pair_ids is not None]
        matches = [int(row.class_id or 0) for row in rows]
        return pack_rows([*(row.input_ids for row in rows), *pairs], row_labels=[*matches, *matches]).to(self._device)

    def count_labels(self, batch: PackedBatch) -> int:
        return int(_matches(batch).sum())

    def loss(self, prompt: Prompt | None, batch: PackedBatch, label_smoothing: float) -> Tensor:
        """Mean over the pairs that match; 0 without any."""
        matches = _matches(batch)
        return self._sum(*self._embed(prompt, batch), matches, label_smoothing) / matches.sum().clamp(min=1)

    @torch.no_grad()
    def evaluate(
        self,
        prompt: Prompt | None,
        rows: Sequence[EncodedRow],
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        total = torch.zeros((), device=self._device)
        sides: list[tuple[Tensor, Tensor]] = []
        for part in self._batches(rows, batch_size, check):
            batch = self.collate(part)
            sides.append(self._embed(prompt, batch))
            total += self._sum(*sides[-1], _matches(batch), 0.0)
        texts, pairs = (torch.cat(side) for side in zip(*sides, strict=True))  # [n, d]
        matches = torch.tensor([row.class_id == 1 for row in rows], device=texts.device)  # [n]
        ranks = _ranks(texts, pairs)[matches]
        cosines = (texts * pairs).sum(1)  # [n]
        metrics = {
            "loss": total.item() / len(ranks),
            "mrr": ranks.float().reciprocal().mean().item(),
            "recall_at_1": (ranks == 1).float().mean().item(),
        }
        metrics |= self._more_metrics(matches.tolist(), cosines.tolist())
        return EvalResult(metrics, [f"{cosine:.6f}" for cosine in cosines.tolist()], len(rows))

    def _more_metrics(self, matches: list[bool], cosines: list[float]) -> dict[str, float]:
        return {}

    def _embed(self, prompt: Prompt | None, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        lowered = lower(prompt)
        with self._autocast():
            found = text_embeddings(self._model, lowered, batch)  # [2B, d]
        texts, pairs = found.float().chunk(2)
        return texts, pairs

    def _sum(self, texts: Tensor, pairs: Tensor, matches: Tensor, label_smoothing: float) -> Tensor:
        scores = texts @ pairs.T / self._temperature  # [B, B]
        own = torch.arange(len(texts), device=scores.device).where(matches, IGNORE_INDEX)  # [B]
        return F.cross_entropy(scores, own, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)


class LabelledEmbeddingObjective(EmbeddingObjective):
    """Where some pairs do not match: also how well the cosine tells which do, by scikit-learn."""

    metric_names: ClassVar[tuple[str, ...]] = (*EmbeddingObjective.metric_names, "average_precision", "roc_auc")
    default_metric: ClassVar[str] = "average_precision"

    def check_evaluable(self, rows: Sequence[EncodedRow], source_name: str) -> None:
        if all(row.class_id == 1 for row in rows):
            raise InputError(
                f"{source_name}: expected pairs that match and pairs that do not to evaluate on, got matching ones "
                "alone"
            )

    def _more_metrics(self, matches: list[bool], cosines: list[float]) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        return {
            "average_precision": float(average_precision_score(matches, cosines)),
            "roc_auc": float(roc_auc_score(matches, cosines)),
        }


def _matches(batch: PackedBatch) -> Tensor:
    """bool [B]."""
    assert batch.row_labels is not None
    return batch.row_labels.chunk(2)[0] == 1


def _ranks(texts: Tensor, pairs: Tensor) -> Tensor:
    """Of each text its pair's rank among all pairs, from 1: int64 [n]. Equal scores share the better rank."""
    ranks = []
    for start in range(0, len(texts), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        scores = texts[part] @ pairs.T  # [m, n]
        own = scores.diagonal(start)[:, None]  # [m, 1]
        # The same text twice has the same embedding up to the rounding of another batch.
        ranks.append((scores > own + 1e-6).sum(1) + 1)
    return torch.cat(ranks)
