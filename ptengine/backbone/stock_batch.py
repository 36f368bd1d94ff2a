"""Reads a stock batch, [B, T] with a mask and perhaps a cache: where its tokens stand and which positions they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptengine.errors import InputError

__all__ = ["StockBatch", "read_batch"]


@dataclass(frozen=True)
class StockBatch:
    """Attributes:
    kept: bool [B, S], which of the S = past + T slots hold a token; None where all do.
    positions: int64 [B, T], of the text's tokens behind P virtual ones; 0 at padding.
    starts: int32 [B], the slot of each row's first token (S in a row without); None where no row is padded left.
    right_padded: whether a row has padding behind its tokens.
    any_empty: whether a row has no tokens.
    reach: one past the last position of any row.
    """

    kept: Tensor | None
    positions: Tensor
    starts: Tensor | None
    right_padded: bool
    any_empty: bool
    reach: int


def read_batch(call: dict[str, Any], shape: tuple[int, int], past: int, virtual: int, max_positions: int) -> StockBatch:
    """The layout of one call of a backbone.

    Args:
        call: the call's arguments; `attention_mask` [B, past + T] and `position_ids` [B or 1, T] are read.
        shape: (B, T).
        past: slots in the cache.
        virtual: P; the first token of a row without `position_ids` has this position.
        max_positions: of the backbone.

    Raises:
        InputError: a mask of another shape or with holes, positions that do not count up, or more than
            `max_positions` of them.
    """
    rows, length = shape
    slots = past + length
    mask, given = call.get("attention_mask"), _one_axis(call.get("position_ids"))
    if mask is None and given is None:
        _check_room(virtual, slots, max_positions)
        source: Tensor = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        positions = torch.arange(virtual + past, virtual + slots, device=source.device).expand(rows, length)
        return StockBatch(None, positions, None, False, slots == 0, virtual + slots)
    if mask is None:
        kept = torch.ones(rows, slots, dtype=torch.bool, device=given.device)  # type: ignore[union-attr]
    elif not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (rows, slots):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"expected attention_mask of shape [{rows}, {slots}] beside an attached prompt, got {got}")
    else:
        kept = mask != 0  # [B, S]
    count = kept.sum(1)  # [B]
    first = kept.int().argmax(1)  # [B], 0 in a row without tokens
    behind = kept.flip(1).int().argmax(1)  # [B], padding behind the last token
    text = kept.cumsum(1)[:, past:] - 1  # [B, T]
    now = kept[:, past:]  # [B, T]
    shift = torch.zeros_like(text)  # [B, T]
    if given is not None:
        if given.dim() != 2 or given.shape[0] not in (1, rows) or given.shape[1] != length:
            raise InputError(f"expected position_ids of shape [{rows}, {length}], got {list(given.shape)}")
        shift = (given - text).masked_fill(~now, 0)  # [B, T]
        # The shift of the row's first token of this call, for all its tokens.
        steady = shift.gather(1, now.int().argmax(1, keepdim=True))  # [B, 1]
        uneven = ((shift != steady) & now).any()
    else:
        uneven = torch.zeros((), dtype=torch.bool, device=kept.device)
    positions = (virtual + text + shift).masked_fill(~now, 0)  # [B, T]
    holes = (count > 0) & (first + count + behind != slots)  # [B]
    # One transfer for all that is asked on the host.
    facts = torch.stack(
        [holes.any(), uneven, first.max(), torch.where(count > 0, behind, 0).max(), (count == 0).any(),
         positions.max() + 1, positions.min()]
    ).tolist()  # fmt: skip
    any_holes, any_uneven, left, right, any_empty, reach, lowest = facts
    if any_holes:
        row = int(holes.nonzero()[0])
        raise InputError(
            f"row {row}: expected an attention_mask of ones with padding before or behind them, got holes between "
            "them (a batch padded on the right cannot be continued: pad on the left to generate)"
        )
    if any_uneven or lowest < 0:
        raise InputError(
            "expected position_ids that count a row's tokens up one by one, without the virtual tokens, got others: "
            "several texts in one row cannot share an attached prompt"
        )
    _check_room(virtual, int(reach) - virtual, max_positions)
    starts = None
    if left or any_empty:
        starts = torch.where(count > 0, first, slots).to(torch.int32)  # [B]
    return StockBatch(kept, positions, starts, bool(right), bool(any_empty), int(reach))


def _one_axis(positions: Tensor | None) -> Tensor | None:
    """Positions [B or 1, T] of a text, which models that see images give along several axes: [axes, B or 1, T].

    Raises:
        InputError: the axes differ, as those of images do.
    """
    if positions is None or positions.dim() != 3:
        return positions
    if bool((positions != positions[:1]).any()):
        raise InputError(
            "expected text alone beside an attached prompt in a model whose positions have several axes, got "
            "position_ids that differ between them, as those of images do"
        )
    return positions[0]


def _check_room(virtual: int, text: int, max_positions: int) -> None:
    if virtual + text > max_positions:
        raise InputError(
            f"expected at most {max_positions} positions, got {virtual} virtual tokens and {text} tokens of text"
        )
