"""The rows of an encoder-decoder with their prompts in place: what its encoder reads, and what stands before a target.

Virtual tokens stand before the source in the encoder's rows. A prefix of keys and values stands before the target in
every layer of the decoder's self-attention, which reads it from where it lies; the stock model, which counts positions
and relative biases by its cache, is given one with that many empty slots. Knows no labels and no LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ptengine.backbone.attention import PrefixContext
from ptengine.backbone.in_row import dense_slots
from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step import Layout, Prompts, checked_prompts, lay_out, stack_prefixes
from ptengine.errors import InputError

__all__ = ["SourceRows", "dense_rows", "empty_cache", "reserve", "source_rows"]


@dataclass(frozen=True)
class SourceRows:
    """Attributes:
    spec: of the model.
    layout: the sources, with virtual tokens before them.
    prefixes: what stands before targets; none where prompts are virtual tokens, or there is no prompt.
    ids: [B], the prompt of each row, -1 for none.
    behind: [B], tokens of the prefix that each row's target stands behind.
    """

    spec: BackboneSpec
    layout: Layout
    prefixes: list[KeyValuePrefix]
    ids: list[int]
    behind: list[int]

    def groups(self) -> Iterator[Tensor]:
        """Rows, int64 [b], that run as one batch.

        They are behind prefixes of one length, and of one length themselves where padding changes numbers.
        """
        keys = torch.tensor(self.behind, device=self.layout.embeds.device)[:, None]  # [B, 1]
        if not self.spec.pads:
            keys = torch.cat([keys, self.layout.cu_seqlens.diff().long()[:, None]], dim=1)  # [B, 2]
        kinds, group = torch.unique(keys, dim=0, return_inverse=True)
        for index in range(len(kinds)):
            yield (group == index).nonzero()[:, 0]

    def encoder_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [b, S, d] of some rows, padded behind their texts, and their mask int64 [b, S]."""
        places, slots, mask = dense_rows(self.layout.cu_seqlens, rows)
        dtype = self.spec.word_embeddings.weight.dtype
        embeds = self.layout.embeds.new_zeros(mask.numel(), self.layout.embeds.shape[1], dtype=dtype)  # [b * S, d]
        embeds = embeds.index_copy(0, slots, self.layout.embeds[places].to(dtype))
        return embeds.unflatten(0, mask.shape), mask

    def context(self, rows: Tensor) -> PrefixContext | None:
        """What the decoder's self-attention of the rows of one group reads; None without a prefix."""
        chosen = rows.tolist()
        size = self.behind[chosen[0]]
        if not size:
            return None
        device = self.layout.embeds.device
        keys, values, lengths = stack_prefixes(self.prefixes, device)
        return PrefixContext(
            keys=keys, values=values, prefix_lengths=lengths, empty_slots=size,
            prompt_ids=torch.tensor([self.ids[row] for row in chosen], dtype=torch.int32, device=device),
        )  # fmt: skip


def source_rows(
    spec: BackboneSpec, lowered: Prompts, sources: PackedBatch, prompt_ids: Sequence[int] | None
) -> SourceRows:
    """The sources on the model's device with their prompts in place, checked against the model."""
    sources = sources.to(spec.word_embeddings.weight.device)
    prompts, ids = checked_prompts(spec, lowered, sources, prompt_ids)
    prefixes = [prompt for prompt in prompts if isinstance(prompt, KeyValuePrefix)]
    layout = lay_out(spec, [] if prefixes else prompts, [-1] * len(ids) if prefixes else ids, sources)
    behind = [prefixes[prompt].num_virtual_tokens if prefixes and prompt >= 0 else 0 for prompt in ids]  # [B]
    if bool((layout.cu_seqlens.diff() == 0).any()):
        row = int((layout.cu_seqlens.diff() == 0).nonzero()[0])
        raise InputError(f"row {row}: expected a source of at least one token, or virtual tokens before it, got none")
    return SourceRows(spec, layout, prefixes, ids, behind)


def dense_rows(cu_seqlens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some packed rows: where their tokens stand among all, where in a batch padded behind them, and its mask."""
    lengths = cu_seqlens.diff().long()[rows]  # [b]
    slots, mask = dense_slots(lengths)
    row, within = slots // mask.shape[1], slots % mask.shape[1]  # [n]
    return cu_seqlens[:-1].long()[rows][row] + within, slots, mask


def empty_cache(spec: BackboneSpec, size: int, batch: int) -> EncoderDecoderCache:
    """A cache of the decoder with `size` slots, all zero, in each of `batch` rows: stock models count by it."""
    own: Any = DynamicCache()
    reserve(own, spec, size, batch)
    return EncoderDecoderCache(own, DynamicCache())


def reserve(own: Any, spec: BackboneSpec, size: int, batch: int) -> None:
    """Put `size` slots of zeros in each of `batch` rows into an empty cache of the decoder's self-attention."""
    weight = spec.word_embeddings.weight
    for layer in range(spec.num_layers):
        for_keys, for_values = (
            weight.new_zeros(1, 1, 1, 1).expand(batch, spec.num_kv_heads, size, width)
            for width in (spec.head_dim, spec.value_dim)
        )
        own.update(for_keys, for_values, layer)
