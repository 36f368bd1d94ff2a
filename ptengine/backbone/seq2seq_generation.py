"""Text generation by an encoder-decoder behind a prompt, through the stock `generate`.

Virtual tokens stand in the encoder's rows, and the stock loop runs the encoder once. A prefix before the target is read
from where it lies in every step; the decoder's cache has empty slots in its place, by which stock models count.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ptengine.backbone.attention import KEYWORD, PrefixContext
from ptengine.backbone.caches import cache_name, with_settings
from ptengine.backbone.in_row import with_own_prompt
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.packing import pack_rows
from ptengine.backbone.seq2seq_rows import empty_cache, reserve, source_rows
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["REFUSED", "generate_targets"]

_PREPARE = "prepare_inputs_for_generation"

REFUSED = {
    "encoder_outputs": "the encoder runs in the call, behind the prompt",
    "decoder_input_ids": "every target begins with the model's start token",
    "decoder_attention_mask": "targets have no padding before them",
    "assistant_model": "it would be handed the prompt; inside `with prompt.attached(model):` model.generate takes one",
    "assistant_early_exit": "its early layers would be handed the prompt a second time",
}
"""Arguments of the stock `generate` that would leave out the prompt, and why they are not needed."""


def generate_targets(
    model: Any,
    spec: BackboneSpec,
    prompts: Sequence[LoweredPrompt],
    prompt_ids: list[int],
    ids: list[list[int]],
    new_tokens: int,
    pad: int,
    kwargs: dict[str, Any],
) -> Tensor:
    """Targets of every source: int64 [B * returned, T], each from the start token on and padded behind its end.

    Args:
        model: a patched encoder-decoder in eval mode.
        spec: its facts.
        prompts: distinct ones.
        prompt_ids: [B], the prompt of each source, -1 for none.
        ids: B sources.
        new_tokens: at most, of each target.
        pad: the padding token.
        kwargs: of the stock `generate`.

    Raises:
        InputError: a prompt does not fit the model, a source or a target needs more positions than it has, or a cache
            other than the dynamic one is asked for behind a prefix.
        UnsupportedModelError: a prefix for a model that does not generate behind one.
    """
    laid = source_rows(spec, list(prompts) or None, pack_rows(ids), prompt_ids if prompts else None)
    if laid.prefixes and spec.no_generation is not None:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported for generation behind a prefix: {spec.no_generation}"
        )
    name = cache_name(model, kwargs)
    if laid.prefixes and name not in (None, "dynamic"):
        raise InputError(f"expected the dynamic cache behind a prefix, in which its slots stand empty, got {name!r}")
    for row, size in enumerate(laid.behind):
        if size + 1 + new_tokens > spec.max_positions:
            raise InputError(
                f"input {row}: expected at most {spec.max_positions} positions of a target, got a prefix of {size}, "
                f"the start token and {new_tokens} new ones"
            )
    found: dict[int, list[Tensor]] = {}
    for rows in laid.groups():
        embeds, mask = laid.encoder_inputs(rows)
        context, own = laid.context(rows), {}
        if context is not None and kwargs.get("use_cache", True) is not False:
            # The one that generate would make drops what has left a window, and with it the count of tokens.
            kwargs = with_settings(kwargs, cache_implementation=None)
            own = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
        runs = model if context is None else _behind(model, spec, context)
        with with_own_prompt():
            out = runs.generate(inputs_embeds=embeds, attention_mask=mask, **({"pad_token_id": pad} | kwargs | own))
        sequences = out if isinstance(out, Tensor) else out.sequences  # [b * returned, T]
        for row, part in zip(rows.tolist(), sequences.chunk(len(rows)), strict=True):
            found[row] = list(part)
    return torch.nn.utils.rnn.pad_sequence(
        [target for row in range(len(ids)) for target in found[row]], batch_first=True, padding_value=pad
    )


def _behind(model: Any, spec: BackboneSpec, context: PrefixContext) -> Any:
    """The model as `generate` is to be called on: it shares everything, and each of its steps sees the prefix."""
    facade = copy.copy(model)  # of its own: another thread may generate with the model itself
    prepare = getattr(model, _PREPARE)

    @functools.wraps(prepare)
    def wrapped(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        cache = inputs.get("past_key_values")
        if inputs.get("use_cache") is False or cache is None:
            inputs["past_key_values"] = empty_cache(spec, context.empty_slots, len(input_ids))
        elif cache.get_seq_length() == 0:
            reserve(cache.self_attention_cache, spec, context.empty_slots, len(input_ids))
        return inputs | {KEYWORD: context}

    setattr(facade, _PREPARE, wrapped)
    return facade
