"""Packed batches: rows of tokens laid one after another, without padding.

This is the only form in which text reaches the backbone, so left-padded, right-padded and unpadded input give the same
numbers by construction. Knows tensors only: no tokenizer, no model, no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ptengine.errors import InputError

__all__ = [
    "IGNORE_INDEX",
    "PackedBatch",
    "check_vocabulary",
    "cut_rows",
    "join_batches",
    "pack_padded",
    "pack_rows",
    "read_back",
    "sources_and_targets",
]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """B rows of together N tokens.

    Attributes:
        input_ids: int64 [N].
        cu_seqlens: int32 [B + 1], 0 first and N last; row b is ``input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]``.
        max_seqlen: the longest row, in tokens.
        labels: int64 [N] or None. As in transformers, ``labels[i]`` is the token AT position i, predicted from the
            position before it; -100 marks positions without a label.
        row_labels: int64 [B] or None: one class per row, for models with a sequence-classification head; or [B, 2]: the
            first and the last token of each row's answer, for models that answer questions.
        token_type_ids: int64 [N] or None.
        virtual_at: int64 [B, P] or None: where in each row the P virtual tokens of its prompt stand, in order: before
            the row's token 0, 1, ... or, at the row's length, behind its last. None: before the row.
        source_lengths: int64 [B] or None: tokens at the beginning of each row that an encoder-decoder's encoder reads;
            the others are its target.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None = None
    row_labels: Tensor | None = None
    token_type_ids: Tensor | None = None
    virtual_at: Tensor | None = None
    source_lengths: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def row_of_token(self) -> Tensor:
        """The row that each token stands in: int64 [N]. N is known here, so that no GPU is waited for."""
        rows = torch.arange(self.num_rows, device=self.cu_seqlens.device)
        return torch.repeat_interleave(rows, self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def to(self, device: torch.device | str) -> PackedBatch:
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def pack_rows(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None = None,
    row_labels: Sequence[int] | Sequence[Sequence[int]] | None = None,
    token_type_ids: Sequence[Sequence[int]] | None = None,
    virtual_at: Sequence[Sequence[int]] | None = None,
) -> PackedBatch:
    """Pack rows of token ids (and labels of the same lengths) into one batch.

    Rows may be empty; a batch of no rows is refused with `InputError`, as are labels of another length than their row
    and rows with places for different numbers of virtual tokens.
    """
    if not rows:
        raise InputError("expected at least one row to pack, got none")
    lengths = [len(row) for row in rows]
    for name, other in (("labels", labels), ("token_type_ids", token_type_ids)):
        if other is not None and [len(row) for row in other] != lengths:
            raise InputError(f"expected {name} of the rows' own lengths {lengths}, got {[len(row) for row in other]}")
    if row_labels is not None and len(row_labels) != len(rows):
        raise InputError(f"expected one row label per row ({len(rows)}), got {len(row_labels)}")
    if virtual_at is not None and (len(virtual_at) != len(rows) or len({len(places) for places in virtual_at}) > 1):
        raise InputError(
            f"expected the places of as many virtual tokens in each of the {len(rows)} rows, "
            f"got {[len(places) for places in virtual_at]}"
        )

    def flat(nested: Sequence[Sequence[int]] | None) -> Tensor | None:
        return None if nested is None else torch.tensor([x for row in nested for x in row], dtype=torch.int64)

    input_ids = flat(rows)
    assert input_ids is not None
    return PackedBatch(
        input_ids=input_ids,
        cu_seqlens=_cumulative(torch.tensor(lengths)),
        max_seqlen=max(lengths),
        labels=flat(labels),
        row_labels=None if row_labels is None else torch.tensor(list(row_labels), dtype=torch.int64),
        token_type_ids=flat(token_type_ids),
        virtual_at=None if virtual_at is None else torch.tensor([list(x) for x in virtual_at], dtype=torch.int64),
    )


def pack_padded(input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> PackedBatch:
    """Drop the padding of a stock batch, wherever it stands.

    Args:
        input_ids: int64 [B, T].
        attention_mask: [B, T], nonzero where there is a token; None means no padding.
        labels: int64 [B, T] or None. Labels on padding are dropped with it.
    """
    if input_ids.dim() != 2:
        raise InputError(f"expected input_ids of shape [B, T], got {list(input_ids.shape)}")
    for name, other in (("attention_mask", attention_mask), ("labels", labels)):
        if other is not None and other.shape != input_ids.shape:
            raise InputError(f"expected {name} of shape {list(input_ids.shape)}, got {list(other.shape)}")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()  # [B, T]
    lengths = keep.sum(dim=1)  # [B]
    return PackedBatch(
        input_ids=input_ids[keep],
        cu_seqlens=_cumulative(lengths),
        max_seqlen=int(lengths.max()),
        labels=None if labels is None else labels[keep],
    )


def join_batches(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Packed batches one after another as one, on their device: tokens, their labels and segments, lengths of sources.

    Classes of rows are left out: batches of different tasks may be joined. Where only some have segments the others are
    of segment 0, which is what a model takes for none.

    Raises:
        InputError: no batches, some with and some without labels or sources, or one that places virtual tokens in its
            rows.
    """
    if not batches:
        raise InputError("expected at least one batch to join, got none")
    if any(batch.virtual_at is not None for batch in batches):
        raise InputError("expected batches behind their prompts to join, got one with virtual tokens inside its rows")
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if labels and len(labels) < len(batches):
        raise InputError(f"expected batches with labels, got {len(batches) - len(labels)} without")
    sources = [batch.source_lengths for batch in batches if batch.source_lengths is not None]
    if sources and len(sources) < len(batches):
        raise InputError(f"expected batches with sources, got {len(batches) - len(sources)} without")
    segments = [batch.token_type_ids for batch in batches]
    if any(types is not None for types in segments):
        segments = [
            torch.zeros_like(batch.input_ids) if types is None else types
            for batch, types in zip(batches, segments, strict=True)
        ]
    begin, ends = 0, [batches[0].cu_seqlens[:1]]
    for batch in batches:
        ends.append(batch.cu_seqlens[1:] + begin)
        begin += batch.num_tokens
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        cu_seqlens=torch.cat(ends),
        max_seqlen=max(batch.max_seqlen for batch in batches),
        labels=torch.cat(labels) if labels else None,
        token_type_ids=None if segments[0] is None else torch.cat(segments),  # type: ignore[arg-type]
        source_lengths=torch.cat(sources) if sources else None,
    )


def read_back(batch: PackedBatch, read: Tensor | None = None) -> tuple[list[int], list[int], int, int]:
    """The rows' lengths, `read` [rows], the least and the greatest token id (0 without tokens), for which a GPU is
    waited for once."""
    lengths = batch.cu_seqlens.diff()  # [rows]
    parts = [lengths, lengths if read is None else read]
    if batch.num_tokens == 0:
        return lengths.tolist(), parts[1].tolist(), 0, 0
    *both, least, most = torch.cat([*parts, torch.stack(batch.input_ids.aminmax())]).tolist()
    return both[: batch.num_rows], both[batch.num_rows :], least, most


def cut_rows(batch: PackedBatch, lengths: Tensor, sizes: Sequence[int]) -> PackedBatch:
    """The first tokens of each row, as many as `lengths` [rows] says, which are `sizes`; without labels."""
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # [rows + 1]
    total = sum(sizes)
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=lengths.device), lengths, output_size=total)
    within = torch.arange(total, device=lengths.device) - cu_seqlens[rows]  # [total]
    return PackedBatch(
        input_ids=batch.input_ids[batch.cu_seqlens.long()[rows] + within],
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(sizes, default=0),
    )


def check_vocabulary(batch: PackedBatch, known: int, least: int, most: int) -> None:
    """Refuse ids from `least` to `most` beyond a table of `known` rows: on CUDA they would end the process's context.

    Raises:
        InputError: naming the first row that has one.
    """
    if least < 0 or most >= known:
        token = least if least < 0 else most
        at = int((batch.input_ids == token).nonzero()[0])
        row = int((batch.cu_seqlens[1:] <= at).sum())
        raise InputError(f"row {row}: expected token ids from 0 to {known - 1}, the model's vocabulary, got {token}")


def sources_and_targets(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """The rows of a batch with `source_lengths` as what the encoder reads, without labels, and what the decoder writes.

    Raises:
        InputError: the batch has no `source_lengths`, or places virtual tokens in its rows.
    """
    if batch.source_lengths is None:
        raise InputError("expected a batch with source_lengths, got none")
    if batch.virtual_at is not None:
        raise InputError("expected sources behind their prompts, got a batch with virtual tokens inside its rows")
    lengths = batch.cu_seqlens.diff().long()  # [B]
    row_of_token = batch.row_of_token()  # [N]
    within = torch.arange(batch.num_tokens, device=lengths.device) - batch.cu_seqlens[:-1].long()[row_of_token]  # [N]
    is_source = within < batch.source_lengths[row_of_token]  # [N]
    parts = []
    for chosen, sizes in ((is_source, batch.source_lengths), (~is_source, lengths - batch.source_lengths)):
        labels = None if batch.labels is None or chosen is is_source else batch.labels[chosen]
        parts.append(PackedBatch(batch.input_ids[chosen], _cumulative(sizes), int(sizes.max()), labels))
    return parts[0], parts[1]


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # [B + 1]
