"""One forward of a frozen encoder over a packed batch with its prompts, and its head behind it.

Virtual tokens stand in every row before the text and are gone from every result: heads read the text alone, whose first
token is the one that [CLS] heads read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.heads import head_output, with_weights
from ptengine.backbone.in_row import dense_slots
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch
from ptengine.backbone.patching import require_patched
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step import PackedLoss, Prompts, text_hidden
from ptengine.errors import InputError, UnsupportedModelError

__all__ = [
    "check_rows_of_text",
    "encoder_hidden",
    "masked_lm_logits",
    "masked_lm_loss",
    "masked_lm_losses",
    "sequence_head",
    "sequence_logits",
    "token_head",
    "token_logits",
]


def encoder_hidden(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> Tensor:
    """Last hidden states [N, d] of an encoder's texts behind their prompts, in the order of the batch's tokens.

    Args:
        model: a patched encoder, with or without a head.
        lowered: one prompt for all rows, several chosen by `prompt_ids`, or None for no prompt.
        batch: rows of N tokens; labels are not read.
        prompt_ids: [B], the prompt of each row; required exactly with several prompts.

    Raises:
        InputError: the model is not patched or no encoder, the prompt does not fit it, or a row with its prompt is
            longer than the model's positions.
        UnsupportedModelError: a prefix of keys and values for a model that takes virtual tokens alone.
    """
    spec = require_patched(model)
    if spec.kind != "encoder":
        raise InputError(f"expected an encoder, got {type(model).__name__}")
    return text_hidden(spec, lowered, batch, prompt_ids=prompt_ids)


def sequence_logits(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> Tensor:
    """Logits [B, C] of an encoder's own sequence-classification head over each row's text.

    Virtual tokens stand before the text in the row; a head that reads the first token ([CLS]) reads the first *text*
    token, one that takes a mean takes it over the text.

    Raises:
        InputError: as `encoder_hidden`; or the model has no sequence-classification head, or a row is empty.
        UnsupportedModelError: as `encoder_hidden`; or the head reads more than the last hidden states.
    """
    spec = _spec_with_head(model, "a sequence-classification head")
    check_rows_of_text(batch)
    return sequence_head(model, text_hidden(spec, lowered, batch, prompt_ids=prompt_ids), batch)


def sequence_head(
    model: Any, hidden: Tensor, batch: PackedBatch, weights: Mapping[str, nn.Parameter] | None = None
) -> Tensor:
    """The part of `sequence_logits` behind the last hidden states, fp [N, d] of the batch's tokens: [B, C].

    Args:
        batch: rows of at least one token.
        weights: parameters that stand in for those of these names in the model's head; None for the model's own.
    """
    spec = _spec_with_head(model, "a sequence-classification head")
    lengths = batch.cu_seqlens.diff().long().to(hidden.device)  # [B]
    slots, mask = dense_slots(lengths, batch.max_seqlen, batch.num_tokens)
    dense = hidden.new_zeros(mask.numel(), hidden.shape[1]).index_copy(0, slots, hidden)  # [B * T, d]
    logits = head_output(
        model if weights is None else with_weights(model, weights), spec.base_model, spec.pooling,
        dense.unflatten(0, mask.shape), mask,
    )  # fmt: skip
    if logits.dim() != 2:
        raise InputError(
            f"expected an encoder with a sequence-classification head, got {type(model).__name__}, whose logits are "
            f"{list(logits.shape)}"
        )
    return logits


def token_logits(
    model: Any,
    lowered: Prompts,
    batch: PackedBatch,
    *,
    tokens: Tensor | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> Tensor:
    """Logits [n, C] of an encoder's head that reads every token: masked-LM (C the vocabulary), token classification, or
    question answering (C is 2: start and end).

    Args:
        tokens: int64 [n], which of the batch's N tokens are wanted; None for all. The head runs on these alone.

    Raises:
        InputError: as `encoder_hidden`; or the model has no such head.
        UnsupportedModelError: as `encoder_hidden`; or the head reads more than the last hidden states.
    """
    spec = _spec_with_head(model, "a head that reads every token")
    return token_head(model, text_hidden(spec, lowered, batch, prompt_ids=prompt_ids), tokens)


def token_head(
    model: Any, hidden: Tensor, tokens: Tensor | None = None, weights: Mapping[str, nn.Parameter] | None = None
) -> Tensor:
    """The part of `token_logits` behind the last hidden states [N, d]: [n, C]; `weights` as in `sequence_head`."""
    spec = _spec_with_head(model, "a head that reads every token")
    if tokens is not None:
        hidden = hidden[tokens.to(hidden.device)]  # [n, d]
    mask = torch.ones(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)  # [1, n]
    owner = model if weights is None else with_weights(model, weights)
    logits = head_output(owner, spec.base_model, spec.pooling, hidden[None], mask)
    if logits.dim() != 3:
        raise InputError(
            f"expected an encoder whose head reads every token, got {type(model).__name__}, whose logits are "
            f"{list(logits.shape)}"
        )
    return logits[0]


def masked_lm_loss(
    model: Any,
    lowered: Prompts,
    batch: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> PackedLoss:
    """Mean cross-entropy of the labelled tokens, each predicted AT its own position, as masked language models do.

    Args:
        batch: with labels: the token that belongs at each masked position, -100 everywhere else.
        label_smoothing: in [0, 1).

    Raises:
        InputError: as `token_logits`; or the batch has no label.
        UnsupportedModelError: as `token_logits`.
    """
    losses, labels = masked_lm_losses(model, lowered, batch, prompt_ids=prompt_ids, label_smoothing=label_smoothing)
    return PackedLoss(losses.mean(), labels.numel())


def masked_lm_losses(
    model: Any,
    lowered: Prompts,
    batch: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every labelled token, fp32 [n], and these labels, int64 [n], in the order of the batch.

    Arguments and errors as of `masked_lm_loss`.
    """
    logits, labels = masked_lm_logits(model, lowered, batch, prompt_ids=prompt_ids)
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none"), labels


def masked_lm_logits(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Vocabulary logits fp32 [n, V] at the labelled tokens and these labels, int64 [n], in the order of the batch.

    Raises:
        InputError: as `token_logits`; or the batch has no label.
        UnsupportedModelError: as `token_logits`.
    """
    wanted = None if batch.labels is None else (batch.labels != IGNORE_INDEX).nonzero()[:, 0]  # [n]
    if batch.labels is None or wanted is None or wanted.numel() == 0:
        raise InputError("expected a batch with at least one labelled token, got none")
    logits = token_logits(model, lowered, batch, tokens=wanted, prompt_ids=prompt_ids).float()  # [n, V]
    return logits, batch.labels[wanted].to(logits.device)


def check_rows_of_text(batch: PackedBatch) -> None:
    """Refuse rows without a token."""
    lengths = batch.cu_seqlens.diff()  # [B]
    if bool((lengths == 0).any()):
        raise InputError(f"expected rows of at least one token, got an empty row {int((lengths == 0).nonzero()[0])}")


def _spec_with_head(model: Any, head: str) -> BackboneSpec:
    """The facts of a patched encoder that has `head`, which errors name; raises as `sequence_logits`."""
    spec = require_patched(model)
    if spec.kind != "encoder" or model is spec.base_model:
        raise InputError(f"expected an encoder with {head}, got {type(model).__name__}")
    if spec.no_head is not None:
        raise UnsupportedModelError(f"the head of {type(model).__name__} is not supported: {spec.no_head}")
    return spec
