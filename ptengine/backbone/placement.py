"""Where virtual tokens stand in rows that hold them: before the text, or between its tokens as a template says.

Knows counts and places only: no embeddings, no prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.backbone.packing import PackedBatch
from ptengine.errors import InputError

__all__ = ["places_in_rows", "row_order"]


def places_in_rows(batch: PackedBatch, virtual: list[int], lengths: list[int]) -> Tensor:
    """Of every virtual token of every row, the number of text tokens before it: int64 [V], row by row.

    Args:
        batch: whose `virtual_at` says so; None stands for before the text.
        virtual: [rows], virtual tokens of each row; a row with none may have places, which are passed over.
        lengths: [rows], tokens of each row's text.

    Raises:
        InputError: not one place for each virtual token of a row, places that go back, or one outside its row.
    """
    if batch.virtual_at is None:
        return torch.zeros(sum(virtual), dtype=torch.int64, device=batch.input_ids.device)
    places = batch.virtual_at  # [rows, P]
    wrong = next((row for row, size in enumerate(virtual) if size not in (0, places.shape[1])), None)
    if wrong is not None:
        raise InputError(
            f"row {wrong}: expected a prompt of {places.shape[1]} virtual tokens, as many as the row has places, "
            f"got {virtual[wrong]}"
        )
    limits = torch.tensor(lengths, device=places.device)[:, None]  # [rows, 1]
    bad = ((places < 0) | (places > limits)).any(dim=1) | (places.diff(dim=1) < 0).any(dim=1)  # [rows]
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"row {row}: expected places of virtual tokens in order, from 0 to its {lengths[row]} tokens, "
            f"got {places[row].tolist()[:20]}"
        )
    present = torch.tensor([size > 0 for size in virtual], device=places.device)  # [rows]
    return places[present].flatten()  # [V]


def row_order(batch: PackedBatch, virtual_of_row: Tensor, places: Tensor) -> Tensor:
    """The order of V virtual tokens and N text tokens, numbered in that order, within their rows: int64 [V + N].

    Args:
        batch: the texts.
        virtual_of_row: int64 [rows], virtual tokens of each row.
        places: int64 [V], from `places_in_rows`.
    """
    starts, device = batch.cu_seqlens[:-1].long(), places.device  # [rows]
    numbers = torch.arange(batch.num_rows, device=device)  # [rows]
    row_of_text = batch.row_of_token()  # [N]
    within = torch.arange(batch.num_tokens, device=device) - starts[row_of_text]  # [N]
    row_of_virtual = torch.repeat_interleave(numbers, virtual_of_row, output_size=places.numel())  # [V]
    row = torch.cat([row_of_virtual, row_of_text])  # [V + N]
    # A virtual token at place t stands right before text token t.
    rank = torch.cat([2 * places, 2 * within + 1])  # [V + N]
    return torch.argsort(row * (2 * batch.max_seqlen + 2) + rank, stable=True)
