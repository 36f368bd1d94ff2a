"""What every step of the stock `generate` is handed behind a prompt that is kept apart: its context and positions.

A wrapper around the model's `prepare_inputs_for_generation` adds them to what the stock method gives. Whose prompt that
is belongs to one `generate` call of one thread and one model: an assistant that proposes tokens in the same call has
its own inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.attention import KEYWORD, PrefixContext
from ptengine.backbone.caches import filled_slots, seen_slots
from ptengine.backbone.input_offsets import add_offsets
from ptengine.backbone.spec import BackboneSpec

__all__ = ["BehindPrefix", "with_prefix"]


@dataclass(frozen=True)
class _Behind:
    """What a `generate` call stands behind; its model is told by its word embeddings, which copies of it share."""

    word_embeddings: nn.Module
    context: PrefixContext
    virtual_tokens: Tensor  # int64 [B], of each row
    offsets: Tensor | None  # [N + 1, S, d]


_generating: ContextVar[_Behind | None] = ContextVar("ptengine_generating", default=None)


@contextmanager
def with_prefix(
    word_embeddings: nn.Module, context: PrefixContext, virtual_tokens: Tensor, offsets: Tensor | None = None
) -> Iterator[None]:
    """`generate` of the model with these `word_embeddings`, in this thread, sees `context` behind `virtual_tokens`.

    Args:
        word_embeddings: of a patched model.
        context: of the call.
        virtual_tokens: int64 [B].
        offsets: [N + 1, S, d], from `stack_offsets`, of the prompts that `context.prompt_ids` names.
    """
    token = _generating.set(_Behind(word_embeddings, context, virtual_tokens, offsets))
    try:
        yield
    finally:
        _generating.reset(token)


class BehindPrefix:
    """`prepare_inputs_for_generation` that adds the prefix and the positions behind it to the inputs of every step.

    An object and no closure: a deep copy of the model has one of its own, for its own embeddings.

    Args:
        prepare: the model's, bound to it.
        spec: the model's facts.
    """

    def __init__(self, prepare: Callable[..., dict[str, Any]], spec: BackboneSpec) -> None:
        functools.update_wrapper(self, prepare, assigned=("__name__", "__doc__"), updated=())  # and its signature
        self._prepare, self._spec = prepare, spec

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        spec, inputs = self._spec, self._prepare(input_ids, *args, **kwargs)
        active = _generating.get()
        if active is None or active.word_embeddings is not spec.word_embeddings:
            return inputs
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        rows, step = tokens.shape[:2]
        cache = inputs.get("past_key_values")
        mask = kwargs.get("attention_mask")  # [B, T so far]
        if mask is None:  # generate drops a mask of ones
            mask = torch.ones(rows, filled_slots(cache) + step, dtype=torch.int64, device=tokens.device)
        shift = active.virtual_tokens.repeat_interleave(rows // active.virtual_tokens.numel())[:, None]  # [B, 1]
        positions = (shift + mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)  # [B, T so far]
        starts = active.context.key_starts
        if starts is not None:  # a piece of a prefill may end before some rows begin
            starts = starts.clamp(max=mask.shape[1])
        context = replace(active.context, key_slots=seen_slots(cache, step), key_starts=starts)
        inputs |= {KEYWORD: context, "position_ids": positions[:, -step:] + spec.first_position}
        if active.offsets is not None and context.prompt_ids is not None:
            repeats = rows // context.prompt_ids.numel()  # of every row, by beams and returned sequences
            prompts = context.prompt_ids.long().repeat_interleave(repeats)[:, None]  # [B, 1]
            embeds = spec.word_embeddings(inputs["input_ids"])  # [B, step, d]
            inputs["inputs_embeds"] = add_offsets(embeds, active.offsets, prompts, (positions - shift)[:, -step:])
            inputs["input_ids"] = None
        return inputs
