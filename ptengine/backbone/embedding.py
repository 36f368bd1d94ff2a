"""Embeddings of texts: the mean of a frozen encoder's last hidden states over the text behind its prompt.

Knows nothing of tasks and of how prompts are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.encoders import check_rows_of_text, encoder_hidden
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.modes import Lowerable, eval_mode, lowered_for
from ptengine.backbone.packing import PackedBatch, pack_rows
from ptengine.backbone.patching import patched, require_patched
from ptengine.backbone.step import Prompts
from ptengine.checks import check_whole
from ptengine.errors import InputError

__all__ = ["UNREAD", "embed", "text_embeddings"]

UNREAD = "pooler."
"""What names of parameters begin with that no mean of hidden states reads, and that a checkpoint may lack."""


def text_embeddings(
    model: Any, lowered: Prompts, batch: PackedBatch, *, prompt_ids: Sequence[int] | None = None
) -> Tensor:
    """Unit vectors fp32 [B, d], one for each row: the mean of its tokens' last hidden states, scaled to length 1.

    The mean is over the text, special tokens included and virtual tokens not (Reimers and Gurevych 2019,
    arXiv 1908.10084).

    Args:
        model: a patched encoder, with or without a head.
        lowered: one prompt for all rows, several chosen by `prompt_ids`, or None for no prompt.
        batch: rows of at least one token.
        prompt_ids: as in `encoder_hidden`.

    Raises:
        InputError: as `encoder_hidden`; also an empty row.
        UnsupportedModelError: as `encoder_hidden`.
    """
    check_rows_of_text(batch)
    hidden = encoder_hidden(model, lowered, batch, prompt_ids=prompt_ids).float()  # [N, d]
    row_of_token, lengths = (x.to(hidden.device) for x in (batch.row_of_token(), batch.cu_seqlens.diff()))  # [N], [B]
    sums = hidden.new_zeros(batch.num_rows, hidden.shape[1]).index_add(0, row_of_token, hidden)  # [B, d]
    return torch.nn.functional.normalize(sums / lengths[:, None], dim=1)


def embed(
    model: Any,
    prompt: Lowerable | LoweredPrompt | None,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    truncation: bool = False,
) -> Tensor:
    """Unit vectors fp32 [n, d] of n texts behind a prompt; the dot product of two is their cosine similarity.

    Args:
        model: an encoder; it is patched for the call if it is not yet.
        prompt: a prompt for this model, such as one tuned for an `EmbeddingTask`; None for the frozen model alone.
        texts: at least one.
        tokenizer: the model's.
        batch_size: texts per forward, in order of length.
        max_length: longest text in tokens, special ones included; None means what the model's positions leave.
        truncation: cut longer texts; otherwise they are refused.

    Returns:
        On the model's device, in the order of `texts`.

    Raises:
        InputError: texts that are none, a text that is too long, no encoder, or a prompt that does not fit it.
        UnsupportedModelError: as `patch`.
    """
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"expected a list of at least one text, got {type(texts).__name__} {str(texts)[:60]!r}")
    check_whole("batch_size", batch_size)
    if max_length is not None:
        check_whole("max_length", max_length)
    with torch.no_grad(), patched(model), eval_mode(model):
        return _embed(model, prompt, texts, tokenizer, batch_size, max_length, truncation)


def _embed(
    model: Any, prompt: Any, texts: Sequence[str], tokenizer: Any, batch_size: int, max_length: int | None, cut: bool
) -> Tensor:
    spec = require_patched(model)
    lowered = None if prompt is None else lowered_for(spec, prompt)
    room = spec.max_positions - (0 if lowered is None else lowered.num_virtual_tokens)
    limit = room if max_length is None else max_length
    if limit > room:
        raise InputError(f"expected max_length of at most {room}, what the model's positions leave, got {max_length}")
    options = {"truncation": True, "max_length": limit} if cut else {}
    rows: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"]
    too_long = next((i for i, row in enumerate(rows) if len(row) > limit), None)
    if too_long is not None:
        raise InputError(
            f"text {too_long} (counting from 0): expected at most {limit} tokens, got {len(rows[too_long])}; "
            "truncation=True cuts"
        )
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = torch.cat([text_embeddings(model, lowered, pack_rows([rows[i] for i in part])) for part in parts])  # [n, d]
    return found[torch.tensor(order, device=found.device).argsort()]
