"""One step of a frozen encoder-decoder over packed sources and targets with its prompts.

Virtual tokens stand before the source in the encoder's rows. A prefix of keys and values stands before the target in
every layer of the decoder's self-attention, which reads it from where it lies; the stock model, which counts positions
and relative biases by its cache, is given one with that many empty slots. The LM head runs on labelled positions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ptengine.backbone.attention import KEYWORD, PrefixContext
from ptengine.backbone.heads import narrowed_to
from ptengine.backbone.in_row import dense_slots
from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch
from ptengine.backbone.patching import require_patched
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step import Layout, PackedLoss, Prompts, checked_prompts, lay_out, stack_prefixes
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["seq2seq_log_probs", "seq2seq_logits", "seq2seq_loss"]


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
        InputError: the model is not patched or no encoder-decoder, sources and targets differ in rows, a target is
            empty, nothing is labelled, the prompt does not fit the model, or a row is longer than its positions.
        UnsupportedModelError: a prefix for a model that takes virtual tokens alone.
    """
    logits, labels, _ = seq2seq_logits(model, lowered, sources, targets, prompt_ids=prompt_ids)
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return PackedLoss(loss, labels.numel())


def seq2seq_log_probs(
    model: Any, lowered: Prompts, sources: PackedBatch, targets: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """log p of every labelled token: fp32 [n], and the row it stands in: int64 [n]. Arguments as in `seq2seq_loss`."""
    logits, labels, rows = seq2seq_logits(model, lowered, sources, targets, prompt_ids=prompt_ids)
    return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0], rows


def seq2seq_logits(
    model: Any, lowered: Prompts, sources: PackedBatch, targets: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V] that predict the labelled tokens, the labels int64 [n] and their rows int64 [n], in order.

    Arguments as in `seq2seq_loss`.
    """
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
    if not bool(wanted.any()):
        raise InputError("expected targets with at least one labelled token, got none")
    prompts, ids = checked_prompts(spec, lowered, sources, prompt_ids)
    prefixes = [prompt for prompt in prompts if isinstance(prompt, KeyValuePrefix)]
    layout = lay_out(spec, [] if prefixes else prompts, [-1] * len(ids) if prefixes else ids, sources)
    behind = [prefixes[prompt].num_virtual_tokens if prefixes and prompt >= 0 else 0 for prompt in ids]  # [B]
    _check_room(spec, behind, lengths.tolist())
    row_of_token = torch.repeat_interleave(torch.arange(len(ids), device=device), lengths)  # [N]
    logits, places = [], []
    for rows in _groups(spec, layout, behind):
        chosen = torch.isin(row_of_token, rows) & wanted  # [N]
        context = _context(prefixes, [ids[row] for row in rows.tolist()], behind[int(rows[0])], device)
        logits.append(_group_logits(model, layout, targets, rows, wanted, context))
        places.append(chosen.nonzero()[:, 0])
    order = torch.cat(places).argsort()  # [n]
    return torch.cat(logits)[order], labels[wanted], row_of_token[wanted]


def _check_room(spec: BackboneSpec, behind: list[int], lengths: list[int]) -> None:
    for row, (size, length) in enumerate(zip(behind, lengths, strict=True)):
        if size + length > spec.max_positions:
            raise InputError(
                f"row {row}: expected at most {spec.max_positions} positions, got a prefix of {size} and {length} "
                "tokens of target"
            )


def _groups(spec: BackboneSpec, layout: Layout, behind: list[int]) -> Iterator[Tensor]:
    """Rows that run as one batch: behind prefixes of one length, and of one length where padding changes numbers."""
    keys = torch.tensor(behind, device=layout.embeds.device)[:, None]  # [B, 1]
    if not spec.pads:
        keys = torch.cat([keys, layout.cu_seqlens.diff().long()[:, None]], dim=1)  # [B, 2]
    kinds, group = torch.unique(keys, dim=0, return_inverse=True)
    for index in range(len(kinds)):
        yield (group == index).nonzero()[:, 0]


def _context(prefixes: list[KeyValuePrefix], ids: list[int], size: int, device: torch.device) -> PrefixContext | None:
    """What the decoder's self-attention of rows behind prefixes of `size` tokens reads; None without a prefix."""
    if not size:
        return None
    keys, values, lengths = stack_prefixes(prefixes, device)
    prompt_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    return PrefixContext(
        keys=keys, values=values, prompt_ids=prompt_ids, prefix_lengths=lengths, empty_slots=size
    )  # fmt: skip


def _group_logits(
    model: Any, layout: Layout, targets: PackedBatch, rows: Tensor, wanted: Tensor, context: PrefixContext | None
) -> Tensor:
    """Logits [n, V] of the wanted tokens of some rows, which run as one stock batch padded behind its texts."""
    spec = require_patched(model)
    places, slots, mask = _dense(layout.cu_seqlens, rows)
    dtype = spec.word_embeddings.weight.dtype
    embeds = layout.embeds.new_zeros(mask.numel(), layout.embeds.shape[1], dtype=dtype)  # [b * S, d]
    embeds = embeds.index_copy(0, slots, layout.embeds[places].to(dtype))
    places, slots, shape = _dense(targets.cu_seqlens, rows)
    tokens = targets.input_ids.new_full((shape.numel(),), IGNORE_INDEX).index_copy(0, slots, targets.input_ids[places])
    call: dict[str, Any] = {"use_cache": False}
    if context is not None:
        call |= {"past_key_values": _empty_cache(spec, context, len(rows)), KEYWORD: context}
    with narrowed_to(slots[wanted[places]]) as ran:
        logits: Tensor = model(
            inputs_embeds=embeds.unflatten(0, mask.shape), attention_mask=mask,
            decoder_input_ids=shifted(model, tokens.unflatten(0, shape.shape)), **call,
        ).logits  # fmt: skip
    if len(ran) != 1:
        raise UnsupportedModelError(f"the LM head of {type(model).__name__} ran {len(ran)} times in a call, not once")
    return logits[0]


def _dense(cu_seqlens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some packed rows: where their tokens stand among all, where in a batch padded behind them, and its mask."""
    lengths = cu_seqlens.diff().long()[rows]  # [b]
    slots, mask = dense_slots(lengths)
    within = slots % mask.shape[1]
    return torch.repeat_interleave(cu_seqlens[:-1].long()[rows], lengths) + within, slots, mask


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


def _empty_cache(spec: BackboneSpec, context: PrefixContext, batch: int) -> EncoderDecoderCache:
    """A cache of the decoder with the prefix's number of slots, all zero: stock models count by it."""
    weight = spec.word_embeddings.weight
    own: Any = DynamicCache()
    for layer in range(spec.num_layers):
        for_keys, for_values = (
            weight.new_zeros(1, 1, 1, 1).expand(batch, spec.num_kv_heads, context.empty_slots, width)
            for width in (spec.head_dim, spec.value_dim)
        )
        own.update(for_keys, for_values, layer)
    return EncoderDecoderCache(own, DynamicCache())
