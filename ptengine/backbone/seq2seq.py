"""One step of a frozen encoder-decoder over packed sources and targets with its prompts.

The stock model runs under teacher forcing on rows that `ptengine.backbone.seq2seq_rows` has laid out. What its LM head
would read of the labelled positions is taken before it, so that a loss makes no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.attention import KEYWORD
from ptengine.backbone.heads import tapped
from ptengine.backbone.in_row import with_own_prompt
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch
from ptengine.backbone.patching import require_patched
from ptengine.backbone.seq2seq_rows import SourceRows, dense_rows, empty_cache, source_rows
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step import PackedLoss, Prompts
from ptengine.backbone.vocabulary import LabelHidden, label_cross_entropy, vocabulary_logits
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["seq2seq_hidden", "seq2seq_log_probs", "seq2seq_logits", "seq2seq_loss", "seq2seq_losses", "shifted"]


def seq2seq_loss(
    model: Any,
    lowered: Prompts,
    sources: PackedBatch,
    targets: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> PackedLoss:
    """Mean cross-entropy of the labelled tokens of the targets under teacher forcing, for training.

    The decoder reads the targets shifted by one as the stock model shifts its labels (`decoder_start_token_id` first;
    mBART its language code), so every token of a target is predicted.

    Args:
        model: a patched encoder-decoder with an LM head.
        lowered: one prompt for all rows, several chosen by `prompt_ids`, or None for no prompt.
        sources: B rows for the encoder; labels are not read.
        targets: B rows of at least one token, the end of the text included. Without `labels` every token counts, with
            them those that are not -100.
        prompt_ids: [B], the prompt of each row; required exactly with several prompts.
        label_smoothing: in [0, 1).

    Raises:
        InputError: the model is not patched or no encoder-decoder, sources and targets differ in rows, a source has
            neither tokens nor virtual ones, a target is empty, nothing is labelled, the prompt does not fit the model,
            or a row is longer than its positions.
        UnsupportedModelError: a prefix for a model that takes virtual tokens alone.
    """
    found = seq2seq_hidden(model, lowered, sources, targets, prompt_ids=prompt_ids)
    loss = label_cross_entropy(require_patched(model), found, label_smoothing, "mean", _logit_bias(model))
    return PackedLoss(loss, found.labels.numel())


def seq2seq_losses(
    model: Any,
    lowered: Prompts,
    sources: PackedBatch,
    targets: PackedBatch,
    *,
    prompt_ids: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every labelled token, of which `seq2seq_loss` is the mean: fp32 [n], differentiable.

    The second tensor is the row each stands in, int64 [n]. Arguments and errors as in `seq2seq_loss`.
    """
    found = seq2seq_hidden(model, lowered, sources, targets, prompt_ids=prompt_ids)
    losses = label_cross_entropy(require_patched(model), found, label_smoothing, "none", _logit_bias(model))
    return losses, found.rows


def seq2seq_log_probs(
    model: Any, lowered: Prompts, sources: PackedBatch, targets: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """log p of every labelled token: fp32 [n], and the row it stands in: int64 [n]. Arguments as in `seq2seq_loss`."""
    losses, rows = seq2seq_losses(model, lowered, sources, targets, prompt_ids=prompt_ids)
    return -losses, rows


def seq2seq_logits(
    model: Any, lowered: Prompts, sources: PackedBatch, targets: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V] that predict the labelled tokens, the labels int64 [n] and their rows int64 [n], in order.

    Arguments as in `seq2seq_loss`.
    """
    found = seq2seq_hidden(model, lowered, sources, targets, prompt_ids=prompt_ids)
    logits = vocabulary_logits(require_patched(model), found.hidden, _logit_bias(model))
    return logits, found.labels, found.rows


def seq2seq_hidden(
    model: Any, lowered: Prompts, sources: PackedBatch, targets: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> LabelHidden:
    """What the LM head reads to predict the labels, in the order of the labels. Arguments as in `seq2seq_loss`."""
    spec = require_patched(model)
    if spec.kind != "seq2seq":
        raise InputError(f"expected an encoder-decoder with an LM head, got {type(model).__name__}")
    device = spec.word_embeddings.weight.device
    sources, targets = sources.to(device), targets.to(device)
    if sources.num_rows != targets.num_rows:
        raise InputError(f"expected as many targets as sources ({sources.num_rows}), got {targets.num_rows}")
    lengths = targets.cu_seqlens.diff().long()  # [B]
    if bool((lengths == 0).any()):
        raise InputError(f"expected targets of at least one token, got an empty row {int((lengths == 0).nonzero()[0])}")
    labels = targets.input_ids if targets.labels is None else targets.labels  # [N]
    wanted = labels != IGNORE_INDEX  # [N]
    labelled = wanted.nonzero()[:, 0]  # [n]
    if labelled.numel() == 0:
        raise InputError("expected targets with at least one labelled token, got none")
    laid = source_rows(spec, lowered, sources, prompt_ids)
    _check_room(spec, laid.behind, lengths.tolist())
    row_of_token = targets.row_of_token()  # [N]
    groups = [*laid.groups()]
    places = [(torch.isin(row_of_token, rows) & wanted).nonzero()[:, 0] for rows in groups]
    hidden = [_group_hidden(model, laid, targets, rows, wanted) for rows in groups]
    order = torch.cat(places).argsort()  # [n]
    return LabelHidden(torch.cat(hidden)[order], labels[labelled], row_of_token[labelled])


def _check_room(spec: BackboneSpec, behind: list[int], lengths: list[int]) -> None:
    for row, (size, length) in enumerate(zip(behind, lengths, strict=True)):
        if size + length > spec.max_positions:
            raise InputError(
                f"row {row}: expected at most {spec.max_positions} positions, got a prefix of {size} and {length} "
                "tokens of target"
            )


def _group_hidden(model: Any, laid: SourceRows, targets: PackedBatch, rows: Tensor, wanted: Tensor) -> Tensor:
    """Of the wanted tokens of the rows of a group, which run as one stock batch: what the LM head reads [n, d]."""
    embeds, mask = laid.encoder_inputs(rows)
    places, slots, shape = dense_rows(targets.cu_seqlens, rows)
    tokens = targets.input_ids.new_full((shape.numel(),), IGNORE_INDEX).index_copy(0, slots, targets.input_ids[places])
    call: dict[str, Any] = {"use_cache": False}
    context = laid.context(rows)
    if context is not None:
        call |= {"past_key_values": empty_cache(laid.spec, context.empty_slots, len(rows)), KEYWORD: context}
    with tapped(slots[wanted[places]]) as taken, with_own_prompt():
        model(
            inputs_embeds=embeds, attention_mask=mask,
            decoder_input_ids=shifted(model, tokens.unflatten(0, shape.shape)), **call,
        )  # fmt: skip
    if len(taken) != 1:
        raise UnsupportedModelError(f"the LM head of {type(model).__name__} ran {len(taken)} times in a call, not once")
    return taken[0]


def _logit_bias(model: Any) -> Tensor | None:
    """What BART and its kin add to the logits [V] behind the LM head."""
    bias = getattr(model, "final_logits_bias", None)
    return bias[0] if isinstance(bias, Tensor) else None


def shifted(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads to predict `labels` int64 [B, T], padded with -100: as the stock model shifts them."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        try:
            inputs: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        except (AttributeError, ValueError) as error:
            raise InputError(
                f"expected a model whose configuration says how a target begins (decoder_start_token_id), got {error}"
            ) from error
        return inputs
    start = next(
        (
            token
            for holder in (model.config, getattr(model, "generation_config", None))
            if isinstance(token := getattr(holder, "decoder_start_token_id", None), int)
        ),
        None,
    )
    if start is None:
        raise InputError("expected a model whose configuration has decoder_start_token_id, got None")
    inputs = torch.nn.functional.pad(labels, (1, -1), value=start)
    return inputs.masked_fill(inputs == IGNORE_INDEX, getattr(model.config, "pad_token_id", None) or 0)
