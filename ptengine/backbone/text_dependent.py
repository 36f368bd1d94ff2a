"""Gives every row its own virtual tokens where a prompt depends on the text.

What such a prompt may read of a row is its input alone: in a causal model the tokens before the row's first label,
which are all there are when a text is generated; elsewhere the whole row, whose labels stand apart from it. Knows
packed batches and word embeddings; not how a prompt comes to its virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptengine.backbone.in_row import dense_slots
from ptengine.backbone.lowering import FixedPrompt, LoweredPrompt, TextDependentTokens, VirtualTokens
from ptengine.backbone.packing import IGNORE_INDEX, PackedBatch, check_vocabulary, read_back
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError

__all__ = ["own_prompts", "require_fixed"]


def own_prompts(
    spec: BackboneSpec, prompts: Sequence[LoweredPrompt], ids: list[int], batch: PackedBatch
) -> tuple[list[FixedPrompt], list[int]]:
    """The prompts, each that depends on the text as one for every row that reads it, and the prompt of every row.

    Args:
        spec: of the model.
        prompts: N.
        ids: the prompt of every row among them, -1 for none.
        batch: on the device of the word embeddings.

    Raises:
        InputError: a row of such a prompt has no input to read, or a token that the model does not embed.
    """
    fixed: list[FixedPrompt] = []
    new_ids = list(ids)
    checked = False
    for index, prompt in enumerate(prompts):
        rows = [row for row, chosen in enumerate(ids) if chosen == index]
        if not isinstance(prompt, TextDependentTokens):
            added: list[FixedPrompt] = [prompt]
            places = [len(fixed)] * len(rows)
        else:
            if not checked:
                *_, least, most = read_back(batch)
                check_vocabulary(batch, spec.word_embeddings.weight.shape[0], least, most)
                checked = True
            added = _of_rows(spec, prompt, rows, batch)
            places = list(range(len(fixed), len(fixed) + len(rows)))
        for row, place in zip(rows, places, strict=True):
            new_ids[row] = place
        fixed += added
    return fixed, new_ids


def require_fixed(lowered: LoweredPrompt) -> FixedPrompt:
    """Refuse what depends on the text: a training row's target would be among what the prompt reads."""
    if isinstance(lowered, TextDependentTokens):
        raise InputError(
            "expected a prompt that no text changes, got one that depends on it: a stock call does not say where a "
            "row's input ends and its target begins (use ptengine.Trainer, evaluate and generate)"
        )
    return lowered


def _of_rows(spec: BackboneSpec, prompt: TextDependentTokens, rows: list[int], batch: PackedBatch) -> list[FixedPrompt]:
    """The virtual tokens of each of some rows."""
    if not rows:
        return []
    device = batch.input_ids.device
    chosen = torch.tensor(rows, device=device)  # [b]
    lengths = _input_lengths(batch, before_labels=spec.kind == "causal")[chosen]  # [b]
    if bool((lengths == 0).any()):
        row = rows[int((lengths == 0).nonzero()[0])]
        raise InputError(
            f"row {row}: expected at least one token of input (before the first label) behind a prompt that depends on "
            "the text, got none"
        )
    slots, mask = dense_slots(lengths)  # [n], [b, T]
    starts = batch.cu_seqlens[:-1].long()[chosen]  # [b]
    places = starts[slots // mask.shape[1]] + slots % mask.shape[1]  # [n]
    tokens: Tensor = spec.word_embeddings(batch.input_ids[places])  # [n, d]
    texts = tokens.new_zeros(mask.numel(), tokens.shape[1]).index_copy(0, slots, tokens)  # [b * T, d]
    # What computes the virtual tokens is part of the fp32 master, also where the backbone runs under autocast.
    with torch.autocast(device.type, enabled=False):
        embeds = prompt.of_texts(texts.unflatten(0, mask.shape), lengths)  # [b, P, d]
    return [VirtualTokens(own) for own in embeds.unbind(0)]


def _input_lengths(batch: PackedBatch, before_labels: bool) -> Tensor:
    """Tokens of each row that are its input: int64 [B]."""
    lengths = batch.cu_seqlens.diff().long()  # [B]
    if batch.labels is None or not before_labels:
        return lengths
    row_of_token = batch.row_of_token()  # [N]
    within = torch.arange(batch.num_tokens, device=lengths.device) - batch.cu_seqlens[:-1].long()[row_of_token]  # [N]
    candidates = torch.where(batch.labels != IGNORE_INDEX, within, lengths[row_of_token])  # [N]
    return lengths.scatter_reduce(0, row_of_token, candidates, "amin")  # a row without labels keeps its length
