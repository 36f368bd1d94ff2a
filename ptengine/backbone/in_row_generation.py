"""Text generation by a causal model that runs its virtual tokens in the row, through the stock `generate`.

Rows are padded before their prompts where the model's numbers bear that; otherwise rows of one shape run together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.causal_rows import CausalRows, RowPrompts
from ptengine.backbone.in_row import with_own_prompt
from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec

__all__ = ["generate_in_row", "prompts_in_rows"]

_PREPARE = "prepare_inputs_for_generation"
_here: ContextVar[RowPrompts | None] = ContextVar("ptengine_prompts_in_rows", default=None)


def generate_in_row(
    model: Any,
    spec: BackboneSpec,
    prompts: Sequence[VirtualTokens],
    prompt_ids: Sequence[int],
    ids: Sequence[list[int]],
    pad: int,
    kwargs: dict[str, Any],
) -> Tensor:
    """Texts with their continuations, int64 [B * returned, T + new], padded on the left and behind their ends.

    Args:
        model: patched, in eval mode.
        spec: its facts, which may be those of a trial.
        prompts: distinct ones.
        prompt_ids: [B], the prompt of each text, -1 for none.
        ids: B texts.
        pad: the padding token.
        kwargs: of the stock `generate`.
    """
    device = spec.word_embeddings.weight.device
    longest = max(len(row) for row in ids)
    found: dict[int, list[Tensor]] = {}
    for group in _groups(spec, prompts, prompt_ids, ids):
        width = max(len(ids[row]) for row in group)
        tokens = torch.tensor([[pad] * (width - len(ids[row])) + ids[row] for row in group], device=device)  # [b, T]
        mask = torch.tensor([[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in group], device=device)
        used = sorted({prompt_ids[row] for row in group} - {-1})
        places = [used.index(prompt_ids[row]) if prompt_ids[row] >= 0 else -1 for row in group]
        chosen = torch.tensor(places, device=device)  # [b]
        given = {"input_ids": tokens, "attention_mask": mask, "pad_token_id": pad} | kwargs
        if width < longest and given.get("max_length") is not None:
            given["max_length"] -= longest - width  # which counts the padding of all rows
        own = [prompts[one] for one in used]
        sizes = [own[one].num_virtual_tokens if one >= 0 else 0 for one in places]
        slots = max(size + len(ids[row]) for size, row in zip(sizes, group, strict=True)) - width
        with prompts_in_rows(model, spec, own, chosen, slots):
            out = model.generate(**given)
        sequences = out if isinstance(out, Tensor) else out.sequences  # [b * returned, T + new]
        for row, part in zip(group, sequences.chunk(len(group)), strict=True):
            found[row] = [torch.nn.functional.pad(one, (longest - width, 0), value=pad) for one in part]
    return torch.nn.utils.rnn.pad_sequence(
        [one for row in range(len(ids)) for one in found[row]], batch_first=True, padding_value=pad
    )


@contextmanager
def prompts_in_rows(
    model: Any, spec: BackboneSpec, prompts: Sequence[VirtualTokens], prompt_ids: Tensor | None, slots: int
) -> Iterator[None]:
    """Stock calls of `model` inside the block, in this thread, have the prompts in their rows, and no other.

    Args:
        model: a causal model that runs prompts in the row.
        spec: its facts.
        prompts: N, at least one where any row has one.
        prompt_ids: int64 [B], the prompt of each row, -1 for none; None where all have the first.
        slots: as of `RowPrompts`.
    """
    calls = CausalRows(model, lambda: spec, _here.get)
    handles = calls.install(spec.base_model)
    own = vars(model).get(_PREPARE)
    if hasattr(model, _PREPARE):
        setattr(model, _PREPARE, calls.wrap_prepare(getattr(model, _PREPARE)))
    token = _here.set(RowPrompts(prompts, prompt_ids, calls, slots))
    try:
        with with_own_prompt():
            yield
    finally:
        _here.reset(token)
        for handle in handles:
            handle.remove()
        vars(model).pop(_PREPARE, None)
        if own is not None:
            setattr(model, _PREPARE, own)


def _groups(
    spec: BackboneSpec, prompts: Sequence[VirtualTokens], prompt_ids: Sequence[int], ids: Sequence[list[int]]
) -> list[list[int]]:
    """Rows that run as one batch."""
    if spec.pads_left:
        return [list(range(len(ids)))]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (tokens, chosen) in enumerate(zip(ids, prompt_ids, strict=True)):
        size = prompts[chosen].num_virtual_tokens if chosen >= 0 else 0
        groups.setdefault((len(tokens), size), []).append(row)
    return list(groups.values())
