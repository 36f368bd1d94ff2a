"""The rows of a stock batch with an attached prompt in place, and a bidirectional model's output without it.

Virtual tokens of a bidirectional model stand before the slots of every row; input offsets are added to the embeddings
of the text; padding is moved to where attention can leave it out, and the result moved back. Knows no hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.attention import PrefixContext
from ptengine.backbone.heads import pooled
from ptengine.backbone.input_offsets import add_offsets, check_reach, stack_offsets
from ptengine.backbone.lowering import FixedPrompt, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.stock_batch import StockBatch
from ptengine.errors import InputError, UnsupportedModelError

__all__ = [
    "StockContext",
    "gather_slots",
    "in_row",
    "padded_left",
    "text_part",
    "texts_first",
    "with_offsets",
    "without_first",
]


@dataclass(frozen=True)
class StockContext(PrefixContext):
    """The context of a stock batch, and how an encoder's rows were moved.

    Attributes:
        moved: int64 [B, T], where each slot of the batch went, None where nothing was moved.
        first: int64 [B], the slot of each row's first token as it was given.
    """

    moved: Tensor | None = None
    first: Tensor | None = None


def with_offsets(call: dict[str, Any], batch: StockBatch, lowered: FixedPrompt, spec: BackboneSpec) -> dict[str, Any]:
    """The call with the text's embeddings [B, T, d] in place of its ids, and the prompt's offsets added to them."""
    text = call.get("inputs_embeds")
    if text is None:
        text = spec.word_embeddings(call["input_ids"])
    table = stack_offsets([lowered], text)  # [2, S, d]
    assert table is not None
    within = batch.positions - lowered.num_virtual_tokens  # [B, T]
    check_reach(lowered, batch.reach - lowered.num_virtual_tokens, "the longest row")
    embeds = add_offsets(text, table, torch.zeros_like(within), within)
    return call | {"input_ids": None, "inputs_embeds": embeds}


def in_row(
    call: dict[str, Any], batch: StockBatch, virtual: VirtualTokens, spec: BackboneSpec
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """The call of a bidirectional model with P virtual tokens before the T slots of every row: [B, P + T].

    Texts behind padding are moved to where the virtual tokens end: a window of attention counts slots. Returns also
    each row's first slot with a token as it was given, int64 [B], and where each slot was put, int64 [B, T], or None;
    both are for `text_part`.
    """
    text = call.pop("inputs_embeds", None)  # [B, T, d]
    ids = call.pop("input_ids", None)
    if text is None:
        text = spec.word_embeddings(ids)
    rows, size, device = text.shape[0], virtual.num_virtual_tokens, text.device
    embeds = virtual.embeds.to(device=device, dtype=text.dtype).expand(rows, -1, -1)  # [B, P, d]
    kept = torch.ones(text.shape[:2], dtype=torch.bool, device=device) if batch.kept is None else batch.kept  # [B, T]
    first, moved, positions = kept.int().argmax(1), None, batch.positions
    if batch.starts is not None and spec.path == "shared":
        front = texts_first(kept)  # [B, T]
        text, kept, positions = (gather_slots(x, front) for x in (text, kept, positions))
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = gather_slots(call["token_type_ids"].expand(rows, -1), front)
        moved = front.argsort(1)
    call["inputs_embeds"] = torch.cat([embeds, text], dim=1)
    call["attention_mask"] = torch.cat([kept.new_ones(rows, size), kept], dim=1).long()
    if spec.path == "shared":
        virtual_positions = torch.arange(size, device=device).expand(rows, -1)  # [B, P]
        call["position_ids"] = torch.cat([virtual_positions, positions], dim=1) + spec.first_position  # [B, P + T]
    else:
        _require_counted(call, batch, spec)
    if call.get("token_type_ids") is not None:
        types = call["token_type_ids"]  # [B, T]
        call["token_type_ids"] = torch.cat([types.new_zeros(rows, size), types], dim=1)
    return call, first, moved


def _require_counted(call: dict[str, Any], batch: StockBatch, spec: BackboneSpec) -> None:
    """Refuse what a model that runs in the row alone, and counts its positions itself, would not get right."""
    reason = None
    if call.pop("position_ids", None) is not None:
        reason = "position_ids"
    elif batch.starts is not None:
        reason = "padding before a text"
    elif batch.right_padded and not spec.pads:
        reason = "padding, on which its numbers depend"
    if reason is not None:
        raise InputError(
            f"expected no {reason} with a prompt attached to model type {spec.model_type!r}, whose virtual tokens run "
            "in the row alone"
        )


def padded_left(call: dict[str, Any], batch: StockBatch, context: StockContext) -> tuple[dict[str, Any], StockContext]:
    """Move padding behind the texts of a bidirectional model to before them, where attention can leave it out.

    Nothing depends on a token's slot there, positions are given; `text_part` moves the result back.
    """
    if batch.kept is None:
        return call, context
    first = batch.kept.int().argmax(1)  # [B]
    if not batch.right_padded:
        return call, replace(context, first=first)
    rows, length = batch.kept.shape
    slots = torch.arange(length, device=first.device)
    behind = length - (batch.kept * (slots + 1)).amax(1, keepdim=True)  # [B, 1]
    source = (slots - behind) % length  # [B, T], where each slot's token comes from
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        if call.get(name) is not None:
            call[name] = gather_slots(call[name].expand(rows, *call[name].shape[1:]), source)
    starts = (length - batch.kept.sum(1)).to(torch.int32)  # [B]
    return call, replace(context, key_starts=starts, moved=(slots + behind) % length, first=first)


def text_part(spec: BackboneSpec, out: Any, first: Tensor | None, *, moved: Tensor | None = None, skip: int = 0) -> Any:
    """The output of a bidirectional model for the slots of the batch as it was given, pooled at each row's first token.

    Args:
        spec: of the model.
        out: of slots [B, skip + T].
        first: int64 [B], among the T; None where it is 0 and nothing was moved.
        moved: int64 [B, T], where each slot was put.
        skip: virtual tokens in the row.
    """
    if first is None:
        return out

    def text(hidden: Tensor) -> Tensor:
        kept = hidden[:, skip:]  # [B, T, d]
        return kept if moved is None else gather_slots(kept, moved)

    out["last_hidden_state"] = text(out["last_hidden_state"])
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(text(hidden) for hidden in out["hidden_states"])
    if out.get("pooler_output") is not None:
        if spec.pooling is None:
            raise UnsupportedModelError(
                f"model type {spec.model_type!r} is not supported with an attached prompt: its pooler does not read "
                "the first token alone"
            )
        first_token = gather_slots(out["last_hidden_state"], first[:, None])  # [B, 1, d]
        out["pooler_output"] = pooled(spec.base_model, first_token, spec.pooling)
    return out


def without_first(labels: Any, mask: Any) -> Tensor | None:
    """Labels [B, T] of a causal model without those of first tokens behind padding; None where the call has no such.

    The stock loss would take a padding slot's hidden state for what predicts them.
    """
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != labels.shape:
        return None
    first = (mask != 0).int().argmax(1, keepdim=True).to(labels.device)  # [B, 1], 0 in a row without padding before it
    kept = labels.gather(1, first).masked_fill(first > 0, IGNORE_INDEX)
    return labels.scatter(1, first, kept)


def texts_first(kept: Tensor) -> Tensor:
    """The slots in the order int64 [B, T] in which tokens, bool [B, T], stand before padding; `argsort` goes back."""
    return kept.int().argsort(dim=1, descending=True, stable=True)


def gather_slots(x: Tensor, slots: Tensor) -> Tensor:
    """x [B, T] or [B, T, d] at slots int64 [B, n] of each row."""
    return x.gather(1, slots if x.dim() == 2 else slots[..., None].expand(-1, -1, x.shape[2]))
