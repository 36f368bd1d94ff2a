"""How much each virtual token, and each piece of one, matters to the loss of given rows: XPrompt's scores.

Knows the patched backbone and prompts; trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone import label_log_probs
from ptengine.backbone.lowering import GatedTokens, KeyValuePrefix, VirtualTokens, detached
from ptengine.backbone.modes import lowered_as_used
from ptengine.backbone.packing import PackedBatch
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.training.freezing import frozen
from ptengine.training.preparation import check_prompt

__all__ = ["Importance", "prompt_importance"]


@dataclass(frozen=True)
class Importance:
    """Attributes:
    tokens: fp32 [P], the mean over rows of |dL/dg_i|, where g_i = 1 multiplies virtual token i.
    pieces: fp32 [P, k], the same for every piece.
    """

    tokens: Tensor
    pieces: Tensor


def prompt_importance(model: Any, prompt: Prompt, batches: Iterable[PackedBatch], num_pieces: int = 16) -> Importance:
    """Importance of a prompt's tokens and pieces (Ma et al. 2022, arXiv 2210.04457).

    I = E_x |dL(x)/dg| at g = 1, with a factor g for every token and one for every piece (the d elements of a token in
    `num_pieces` equal parts), L(x) the mean cross-entropy of the labels of row x. Every row gets a copy of the prompt,
    so one backward pass over a batch gives every row's own gradient: B*P virtual tokens instead of P.

    Args:
        model: a causal model with an LM head; patched, frozen and in eval mode for the call, then put back.
        prompt: a prompt that lowers to virtual tokens; not changed.
        batches: with labels.
        num_pieces: k, which divides d; 16 as in the paper.

    Raises:
        InputError: the prompt is for another backbone, lowers to a prefix or depends on the text, `num_pieces` does not
            divide d, there is no row, or a row has no label that can be predicted.
    """
    if not isinstance(prompt, Prompt):
        raise InputError(f"expected a ptengine prompt, got {type(prompt).__name__}")
    check_prompt(prompt, model)
    width = backbone_spec(model).hidden_size
    if width % check_whole("num_pieces", num_pieces):
        raise InputError(f"expected num_pieces that divides the model's width {width}, got {num_pieces!r}")
    with torch.no_grad():
        lowered = lowered_as_used(prompt)
    if not isinstance(lowered, VirtualTokens):
        kind = {KeyValuePrefix: "prefix", GatedTokens: "gated tokens"}.get(type(lowered), "text-dependent tokens")
        raise InputError(f"expected a prompt of virtual tokens, got the {kind} of {type(prompt).__name__}")
    lowered = detached(lowered)
    embeds = lowered.embeds  # [P, d]
    tokens, pieces = torch.zeros(len(embeds)), torch.zeros(len(embeds), num_pieces)
    rows = 0
    with frozen(model):
        for batch in batches:
            gradient = _row_gradients(model, lowered, batch)  # [B, P, d]
            # d(g * e)/dg = e, so a factor's gradient is the sum of e times the gradient of e over what it multiplies.
            by_piece = (gradient * embeds).unflatten(-1, (num_pieces, -1)).sum(-1)  # [B, P, k]
            tokens += by_piece.sum(-1).abs().sum(0).cpu()
            pieces += by_piece.abs().sum(0).cpu()
            rows += batch.num_rows
    if not rows:
        raise InputError("expected at least one row to measure importance on, got none")
    return Importance(tokens / rows, pieces / rows)


def _row_gradients(model: Any, lowered: VirtualTokens, batch: PackedBatch) -> Tensor:
    """dL(x)/dE for every row x of the batch: [B, P, d]."""
    with torch.enable_grad():
        copies = [lowered.embeds.clone().requires_grad_() for _ in range(batch.num_rows)]
        log_probs, at = label_log_probs(
            model, [replace(lowered, embeds=copy) for copy in copies], batch, prompt_ids=range(batch.num_rows)
        )  # [n], [n]
        counts = torch.bincount(at, minlength=batch.num_rows)  # [B]
        if not bool(counts.all()):
            raise InputError(
                f"expected a label in every row, got none in row {int((counts == 0).nonzero()[0])} of a batch"
            )
        loss = -(log_probs.float() / counts[at]).sum()  # the sum of the rows' means
        return torch.stack(torch.autograd.grad(loss, copies))
