"""Runs rows with their virtual tokens in place through a stock model, with the attention it came with.

For models whose attention ptengine cannot take over. Exact because nothing is shared: every row holds its own copy of
the prompt, padded behind its last token, or not padded at all where the model's numbers do not bear it. Knows no
prompts and no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.spec import BackboneSpec

__all__ = ["carries_its_prompt", "dense_slots", "run_in_row", "stock_hidden", "with_own_prompt"]

# Whether the calls of this thread have their prompt in place, whatever prompt is attached to the model.
_own_prompt: ContextVar[bool] = ContextVar("ptengine_own_prompt", default=False)


@contextmanager
def with_own_prompt() -> Iterator[None]:
    """Stock calls inside the block, in this thread, have their prompt in place."""
    token = _own_prompt.set(True)
    try:
        yield
    finally:
        _own_prompt.reset(token)


def carries_its_prompt() -> bool:
    """Whether a call of this thread stands inside `with_own_prompt`."""
    return _own_prompt.get()


def run_in_row(spec: BackboneSpec, embeds: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """Last hidden states [N, d] of packed rows, each run as a row of a stock batch.

    Args:
        spec: of the model.
        embeds: [N, d], virtual tokens included.
        cu_seqlens: int32 [rows + 1]; rows may be empty.
        token_type_ids: int64 [N], or None for the model's default.
    """
    lengths = cu_seqlens.diff().long()  # [rows]
    rows = lengths.nonzero()[:, 0]  # [B]
    if spec.pads:
        return _batch(spec, embeds, cu_seqlens, token_type_ids, rows)[1]
    hidden, places = [], []
    for length in lengths[rows].unique().tolist():
        place, part = _batch(spec, embeds, cu_seqlens, token_type_ids, (lengths == length).nonzero()[:, 0])
        places.append(place)
        hidden.append(part)
    return torch.cat(hidden)[torch.cat(places).argsort()]  # [N, d]


def _batch(
    spec: BackboneSpec, embeds: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Some of the rows as one batch: where their tokens stand, int64 [n] among the N, and hidden states [n, d]."""
    lengths = cu_seqlens.diff().long()[rows]  # [B]
    starts = cu_seqlens[:-1].long()[rows]  # [B]
    slots, mask = dense_slots(lengths)
    places = starts[slots // mask.shape[1]] + slots % mask.shape[1]  # [n]
    batch = embeds.new_zeros(mask.numel(), embeds.shape[1]).index_copy(0, slots, embeds[places])  # [B * T, d]
    extra = {}
    if token_type_ids is not None:
        types = token_type_ids.new_zeros(mask.numel()).index_copy(0, slots, token_type_ids[places])  # [B * T]
        extra["token_type_ids"] = types.view(mask.shape)
    with with_own_prompt():
        dense = batch.unflatten(0, mask.shape)  # [B, T, d]
        hidden = stock_hidden(spec.base_model, dense, attention_mask=mask, **extra)  # [B, T, d]
    return places, hidden.flatten(0, 1)[slots]


def dense_slots(lengths: Tensor, longest: int | None = None, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the tokens of rows of `lengths` int64 [B] stand in a batch padded behind them.

    Args:
        longest, total: the greatest of `lengths` and their sum; a GPU is waited for where they are not known.

    Returns:
        slots int64 [total] among B * T, T being `longest`, and the batch's mask int64 [B, T].
    """
    if longest is None or total is None:
        longest, total = torch.stack([lengths.max(), lengths.sum()]).tolist()
    device = lengths.device
    mask = torch.arange(longest, device=device) < lengths[:, None]  # [B, T]
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)  # [total]
    before = lengths.cumsum(0) - lengths  # [B], tokens of the rows before
    return torch.arange(total, device=device) + rows * longest - before[rows], mask.long()


def stock_hidden(base: Any, embeds: Tensor | None = None, **call: Any) -> Tensor:
    """Last hidden states [B, T, d] of a model without its head on input embeddings [B, T, d], without a cache."""
    if embeds is not None:
        call["inputs_embeds"] = embeds.clone()  # which some models scale in place
    try:
        out = base(use_cache=False, **call)
    except TypeError as error:  # of models that never have one
        if "use_cache" not in str(error):
            raise
        out = base(**call)
    hidden: Tensor = out.last_hidden_state
    return hidden
