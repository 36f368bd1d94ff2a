"""From what the LM head reads to logits and losses over the vocabulary.

Knows the frozen head; nothing of prompts, of batches and of the layers before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.quantized import plain_weight
from ptengine.backbone.spec import BackboneSpec
from ptengine.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["LabelHidden", "label_cross_entropy", "vocabulary_logits"]


@dataclass(frozen=True)
class LabelHidden:
    """Attributes:
    hidden: [n, d], what the LM head's matrix reads to predict each label.
    labels: int64 [n].
    rows: int64 [n], the row of the batch each label stands in.
    """

    hidden: Tensor
    labels: Tensor
    rows: Tensor


def vocabulary_logits(spec: BackboneSpec, hidden: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """What the stock model makes of what its LM head reads, [n, d]: logits [n, V], with `logit_bias` [V] added."""
    head: Any = spec.lm_head
    logits: Tensor = head(hidden)
    if logit_bias is not None:
        logits = logits + logit_bias
    if spec.logit_scale != 1:
        logits = logits * spec.logit_scale
    if spec.logit_softcap is not None:
        logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
    return logits


def label_cross_entropy(
    spec: BackboneSpec,
    found: LabelHidden,
    label_smoothing: float,
    reduction: str,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Of the labels, through the frozen LM head: a scalar, or [n] with the reduction "none".

    `logit_bias` [V] is what the model adds to the logits of its head.
    """
    hidden, weight, bias = _head(spec, found.hidden, logit_bias)
    return linear_cross_entropy(
        hidden, weight, found.labels, bias=bias, softcap=spec.logit_softcap, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip


def _head(spec: BackboneSpec, hidden: Tensor, logit_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states in the dtype of the LM head, its weight [V, d] and its bias [V] or None; logits are scaled."""
    head: Any = spec.lm_head
    weight = plain_weight(head)
    bias: Tensor | None = getattr(head, "bias", None)
    if logit_bias is not None:
        bias = logit_bias.to(weight.dtype) if bias is None else bias + logit_bias
    hidden = hidden.to(weight.dtype)
    if spec.logit_scale != 1:  # of hidden [n, d], not of logits [n, V]
        hidden, bias = hidden * spec.logit_scale, None if bias is None else bias * spec.logit_scale
    return hidden, weight, bias
