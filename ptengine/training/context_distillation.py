"""What teaches a prompt to stand for a text: the answers of the model that sees the whole text.

Knows the patched backbone, prompts and packed batches; no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone import label_hidden
from ptengine.backbone.lowering import KeyValuePrefix, VirtualTokens
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.patching import require_patched
from ptengine.backbone.step import capture_prefix
from ptengine.backbone.vocabulary import vocabulary_logits
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt

__all__ = ["context_distillation_loss", "text_prefix"]


@torch.no_grad()
def text_prefix(model: Any, input_ids: Sequence[int]) -> KeyValuePrefix:
    """The keys and values of a text: what a model has before it that has read the whole text. Computed once.

    Args:
        model: a patched causal model.
        input_ids: the token ids of the text, at most as many as the model has positions.

    Raises:
        InputError: no tokens, ids that the model does not have, too many of them, or no causal model.
    """
    spec = require_patched(model)
    ids = torch.as_tensor(list(input_ids))
    if ids.numel() == 0 or ids.dim() != 1 or not 0 <= int(ids.min()) <= int(ids.max()) < spec.vocab_size:
        raise InputError(f"expected token ids from 0 to {spec.vocab_size - 1}, at least one, got {ids.tolist()[:8]}")
    return capture_prefix(model, VirtualTokens(spec.word_embeddings(ids.to(spec.word_embeddings.weight.device))))


def context_distillation_loss(
    model: Any, prompt: Prompt, batch: PackedBatch, teacher: KeyValuePrefix, *, top_k: int = 20
) -> Tensor:
    """Sum over the teacher's top k tokens of p (log p - log q), meaned over labelled positions: a scalar.

    p is what the model predicts behind the whole text (`text_prefix`), q what it predicts behind the prompt, both over
    the whole vocabulary; which token is the label does not matter, only where one stands. With k the vocabulary this
    is KL[p || q]; Eyuboglu et al. 2025 (arXiv 2506.06266) keep a few tokens, which hold nearly all of p.

    Args:
        model: a patched causal model with an LM head whose parameters are frozen.
        prompt: the prompt in training, such as a `Cartridge`.
        batch: rows about the text, with labels where the answers stand.
        teacher: from `text_prefix`; it gets no gradient.
        top_k: k, from 1 to the vocabulary.

    Raises:
        InputError: `top_k` is out of range; a label at a row's first token, which virtual tokens predict and the
            teacher cannot; or as `packed_loss`.
    """
    spec = require_patched(model)
    check_whole("top_k", top_k, 1, spec.vocab_size)
    with torch.no_grad():
        seen = label_hidden(model, teacher, batch)
        log_p, tokens = vocabulary_logits(spec, seen.hidden).float().log_softmax(-1).topk(top_k, dim=-1)  # [n, k]
    found = label_hidden(model, prompt.lower(), batch)
    if len(found.labels) != len(seen.labels):
        raise InputError("expected no label at a row's first token, which nothing but virtual tokens predicts, got one")
    log_q = vocabulary_logits(spec, found.hidden).float().log_softmax(-1).gather(-1, tokens)  # [n, k]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
