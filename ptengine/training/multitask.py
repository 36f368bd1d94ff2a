"""The loss that trains a `MultitaskPrompt` on rows of several tasks, with or without teachers.

Knows the patched backbone, prompts and packed batches; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone import label_hidden, packed_loss
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.patching import require_patched
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.multitask import MultitaskPrompt

__all__ = ["multitask_loss"]


def multitask_loss(
    model: Any,
    prompt: MultitaskPrompt,
    batch: PackedBatch,
    task_ids: Sequence[int],
    *,
    teachers: Sequence[Prompt] | None = None,
    distillation_weight: float = 0.9,
) -> Tensor:
    """Source training of MPT (Wang et al. 2023, arXiv 2303.02861), a scalar for `backward`.

    Without teachers the mean cross-entropy of the labels, each row behind the prompt of its task. With them
    L = CE + lambda * (KL + MSE): KL[teacher || student] between the distributions over the vocabulary, and the mean
    square distance between the last hidden states, both averaged over the labelled positions (the paper takes the
    hidden states of all positions).

    Args:
        model: a patched causal model whose parameters are frozen.
        prompt: the prompt in training.
        batch: with labels; rows of any tasks.
        task_ids: [B], the task of each row.
        teachers: one trained prompt per task that lowers to virtual tokens; they get no gradient.
        distillation_weight: lambda, at least 0; 0.9 as in the paper.

    Raises:
        InputError: as `packed_loss`; the number of teachers is not that of the tasks; a negative weight.
    """
    if not distillation_weight >= 0:
        raise InputError(f"expected distillation_weight of at least 0, got {distillation_weight!r}")
    lowered = prompt.lower_tasks()
    if teachers is None:
        return packed_loss(model, lowered, batch, prompt_ids=task_ids).loss
    if len(teachers) != len(lowered):
        raise InputError(f"expected one teacher for each of {len(lowered)} tasks, got {len(teachers)}")
    spec = require_patched(model)
    with torch.no_grad():
        wanted = label_hidden(model, [teacher.lower() for teacher in teachers], batch, prompt_ids=task_ids)
        target = vocabulary_logits(spec, wanted.hidden).float().log_softmax(-1)  # [n, V]
    found = label_hidden(model, lowered, batch, prompt_ids=task_ids)
    logits = vocabulary_logits(spec, found.hidden).float()  # [n, V]
    divergence = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
    distance = F.mse_loss(found.hidden.float(), wanted.hidden.float())
    return F.cross_entropy(logits, found.labels) + distillation_weight * (divergence + distance)
