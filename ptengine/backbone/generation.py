"""Text generation behind a prompt through the stock `generate`: the prompt runs once and is kept once.

Not one copy per row or beam: the keys and values of a prompt stay apart from the cache, which holds text alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.attention import PrefixContext
from ptengine.backbone.caches import cache_name, check_cache_name, whole_cache, with_settings
from ptengine.backbone.decoding import DecodingCache, decoder, decodes
from ptengine.backbone.gated import gated_parts
from ptengine.backbone.generation_steps import with_prefix
from ptengine.backbone.in_row_generation import generate_in_row
from ptengine.backbone.input_offsets import check_reach, stack_offsets
from ptengine.backbone.lowering import FixedPrompt, GatedTokens, KeyValuePrefix, LoweredPrompt, VirtualTokens
from ptengine.backbone.modes import Lowerable, eval_mode, lowered_for
from ptengine.backbone.packing import check_vocabulary, pack_rows
from ptengine.backbone.patching import patched, require_patched
from ptengine.backbone.seq2seq_generation import REFUSED, generate_targets
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.backbone.step import capture_prefixes, check_fit, stack_prefixes
from ptengine.backbone.text_dependent import own_prompts
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["generate", "generate_in_batches"]


Inputs = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | Mapping[str, Tensor]

# What would make the stock generate ignore the prefix or keep other rows than it is given.
_REFUSED = {
    "inputs_embeds": "give token ids or texts",
    "position_ids": "positions follow from the prompt and the padding",
    "past_key_values": "the cache is made per call",
}
# Searches that transformers has moved out into code on its hub, which it loads where `trust_remote_code` allows it, and
# the values that do not ask for them.
_MOVED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "penalty_alpha": ("contrastive search", (None, 0)),
    "dola_layers": ("DoLa", (None,)),
    "num_beam_groups": ("group beam search", (None, 1)),
    "constraints": ("constrained beam search", (None,)),
    "force_words_ids": ("constrained beam search", (None,)),
}
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def generate(
    model: Any,
    prompt: Lowerable | LoweredPrompt | Sequence[Lowerable | LoweredPrompt | None] | None,
    inputs: Inputs,
    tokenizer: Any = None,
    **generation_kwargs: Any,
) -> list[str] | Tensor:
    """Continue texts behind a prompt.

    Args:
        model: a supported causal model or encoder-decoder; it is patched for the call if it is not yet.
        prompt: one prompt for all inputs, a list with one prompt per input (an object given several times runs once),
            or None, as the prompt or in the list, for the frozen model alone.
        inputs: what is continued, or an encoder-decoder's sources: a text, texts, lists of token ids, an int64 tensor
            [B, T] without padding, or a mapping with `input_ids` and `attention_mask` [B, T], padded on any side. Every
            input needs at least one token. What the tokenizer puts behind a text (an EOS, if it does that) is left out
            of one that is continued, as in training.
        tokenizer: needed for texts; also gives the padding token.
        generation_kwargs: of transformers' `generate` (max_new_tokens, do_sample, num_beams, ...). `max_length` counts
            text tokens, not virtual ones; an encoder-decoder's count those of the target. Assisted decoding
            (`assistant_model`, `prompt_lookup_num_tokens`, `assistant_early_exit`) takes one input, as the stock one
            does; an assistant reads the text alone, or behind the prompt that is attached to it. A static cache holds
            text alone and its steps are not compiled; those of the default cache are one CUDA graph on a GPU.
            `stop_strings` are found with `tokenizer`.

    Returns:
        For texts a list of continuations without special tokens, ``num_return_sequences`` per input; otherwise int64
        [B, T + new] as from the stock `generate`, left-padded; of an encoder-decoder the targets [B, 1 + new] alone,
        from the start token on and padded behind their ends.

    Raises:
        InputError: an input is empty or not as described, the prompt does not fit the model, virtual tokens, text and
            new tokens together exceed the model's positions, or a search or a cache is asked for that cannot be had.
        UnsupportedModelError: the model cannot be patched, or its family does not generate behind such a prompt.
    """
    for name, reason in _REFUSED.items():
        if generation_kwargs.get(name) is not None:
            raise InputError(f"expected no {name}: {reason}")
    ids, as_text = _token_rows(model, inputs, tokenizer)
    with patched(model), eval_mode(model):
        spec = require_patched(model)
        tokens = [token for row in ids for token in row]
        check_vocabulary(pack_rows(ids), spec.vocab_size, min(tokens), max(tokens))
        if spec.kind == "encoder" or spec.lm_head is None:
            raise InputError(
                f"expected a causal model or an encoder-decoder with an LM head to generate with, got "
                f"{type(model).__name__}"
            )
        generation_kwargs = _settled(model, spec, len(ids), tokenizer, generation_kwargs)
        if spec.kind == "seq2seq":
            sequences, length = _generate_targets(model, spec, prompt, ids, tokenizer, generation_kwargs), 0
        elif spec.no_generation is not None and (
            spec.path == "shared" or _setting(model, generation_kwargs, "use_cache") is not False
        ):
            raise UnsupportedModelError(
                f"model type {spec.model_type!r} is not supported for generation: {spec.no_generation}"
            )
        elif spec.path == "in_row":
            length = max(len(row) for row in ids)
            sequences = _generate_in_row(model, spec, prompt, ids, tokenizer, generation_kwargs)
        else:
            sequences, length = _generate(model, spec, prompt, ids, tokenizer, generation_kwargs)
    if not as_text:
        return sequences
    return list(tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True))


def generate_in_batches(
    model: Any,
    prompt: Lowerable | None,
    rows: Sequence[list[int]],
    tokenizer: Any,
    batch_size: int,
    ending: Sequence[int] = (),
    **kwargs: Any,
) -> list[str]:
    """Continuations (or targets) of many rows of token ids, without special tokens, in the rows' order.

    Rows of like length share a batch, and a text ends at a token of `ending`, too: what the task closes its targets
    with need not be what ends the model's texts. Other arguments and errors as in `generate`.
    """
    if ending:
        kwargs["eos_token_id"] = list(dict.fromkeys([*_end_tokens(model, kwargs), *ending]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    writes_targets = backbone_spec(model).kind == "seq2seq"
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        written = generate(model, prompt, [rows[i] for i in part], tokenizer, **kwargs)  # [B, T + new]
        assert isinstance(written, Tensor)  # token ids in, token ids out
        longest = 0 if writes_targets else max(len(rows[i]) for i in part)
        decoded = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        for i, text in zip(part, decoded, strict=True):
            texts[i] = text
    return texts


def _settled(model: Any, spec: BackboneSpec, rows: int, tokenizer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the stock `generate` for a call that it can serve behind a prompt."""
    setting = partial(_setting, model, kwargs)
    for name, (search, harmless) in _MOVED.items():
        if setting(name) not in harmless and kwargs.get("custom_generate") is None:
            raise InputError(
                f"expected no {name}: {search} is no part of transformers any more; its code can be given as "
                "custom_generate"
            )
    assisted = next((name for name in _ASSISTED if setting(name) is not None), None)
    if assisted is not None and rows > 1:
        raise InputError(f"expected one input with {assisted}, got {rows}: assisted decoding takes one row at a time")
    check_cache_name(cache_name(model, kwargs), spec.word_embeddings.weight.device.type)
    if setting("stop_strings") is None and kwargs.get("assistant_tokenizer") is None:
        return kwargs
    if tokenizer is None:
        raise InputError("expected a tokenizer to go with stop_strings or an assistant_tokenizer, got None")
    return kwargs | {"tokenizer": tokenizer}


@torch.no_grad()
def _generate_targets(
    model: Any, spec: BackboneSpec, prompt: Any, ids: list[list[int]], tokenizer: Any, kwargs: dict[str, Any]
) -> Tensor:
    for name, reason in REFUSED.items():
        if kwargs.get(name) is not None:
            raise InputError(f"expected no {name}: {reason}")
    prompts, prompt_ids = _lowered(spec, prompt, len(ids))
    pad = _padding_token(model, tokenizer, kwargs)
    return generate_targets(model, spec, prompts, prompt_ids, ids, _new_tokens(model, 1, kwargs), pad, kwargs)


@torch.no_grad()
def _generate_in_row(
    model: Any, spec: BackboneSpec, prompt: Any, ids: list[list[int]], tokenizer: Any, kwargs: dict[str, Any]
) -> Tensor:
    name = cache_name(model, kwargs)
    if name not in (None, "dynamic"):
        raise InputError(f"expected the dynamic cache, in which virtual tokens have slots of their own, got {name!r}")
    lowered, chosen = _lowered(spec, prompt, len(ids))
    texts = pack_rows(ids).to(spec.word_embeddings.weight.device)
    prompts, prompt_ids = own_prompts(spec, lowered, chosen, texts)
    for one in prompts:
        check_fit(spec, one)  # nothing but virtual tokens fits
    virtual = [one for one in prompts if isinstance(one, VirtualTokens)]
    new = _new_tokens(model, max(len(row) for row in ids), kwargs)
    _check_length(spec, ids, [virtual[i] if i >= 0 else None for i in prompt_ids], new)
    limit = _setting(model, kwargs, "max_length")
    if limit is not None:  # rows that run without others' padding get one of their own
        kwargs = kwargs | {"max_length": limit}
    return generate_in_row(model, spec, virtual, prompt_ids, ids, _padding_token(model, tokenizer, kwargs), kwargs)


@torch.no_grad()
def _generate(
    model: Any, spec: BackboneSpec, prompt: Any, ids: list[list[int]], tokenizer: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, int]:
    device = spec.word_embeddings.weight.device
    pad = _padding_token(model, tokenizer, kwargs)
    longest = max(len(row) for row in ids)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)  # [B, T]
    padding = torch.tensor([longest - len(row) for row in ids], device=device)  # [B]
    mask = (torch.arange(longest, device=device) >= padding[:, None]).long()  # [B, T]

    prompts, prompt_ids = _kept_prompts(model, spec, prompt, ids)
    prefixes = [one for one in prompts if isinstance(one, KeyValuePrefix)]
    sizes = [one.num_positions for one in prompts]
    virtual = torch.tensor([sizes[i] if i >= 0 else 0 for i in prompt_ids], device=device)  # [B]
    new = _new_tokens(model, longest, kwargs)
    _check_length(spec, ids, [prompts[i] if i >= 0 else None for i in prompt_ids], new)
    keys = values = lengths = None
    if prefixes:
        keys, values, lengths = stack_prefixes(prefixes, device)
    context = PrefixContext(
        keys=keys,
        values=values,
        prompt_ids=torch.tensor(prompt_ids, dtype=torch.int32, device=device),
        prefix_lengths=lengths,
        key_starts=padding.to(torch.int32),
        gated=gated_parts(spec, prompts, torch.tensor(prompt_ids, device=device), len(ids)),
    )
    runs = model
    offsets = stack_offsets(prompts, spec.word_embeddings.weight)
    # Offsets come as embeddings, which a step of token ids does not take.
    if offsets is None and not context.gated and decodes(model, spec, partial(_setting, model, kwargs)):
        kwargs = kwargs | {"past_key_values": DecodingCache()}
        runs = decoder(model, spec, context, kwargs["past_key_values"], new)
    elif _setting(model, kwargs, "use_cache") is not False:
        runs, kwargs = _with_cache(model, spec, longest + new, kwargs)
    with with_prefix(spec.word_embeddings, context, virtual, offsets):
        settings = with_settings(kwargs, pad_token_id=pad)
        sequences = runs.generate(input_ids=input_ids, attention_mask=mask, **settings)
    return sequences if isinstance(sequences, Tensor) else sequences.sequences, longest


def _with_cache(model: Any, spec: BackboneSpec, slots: int, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model and the arguments with which `generate` has a cache, of `slots` tokens a row, that keeps them all."""
    name = cache_name(model, kwargs)
    if name is not None and "static" in name:  # a step reads how much of it is filled
        kwargs = with_settings(kwargs, disable_compile=True)
    if not spec.windowed:  # or the cache that generate makes would drop what has left a window
        return model, kwargs
    kwargs = with_settings(kwargs, cache_implementation=None)
    if model.generation_config.cache_implementation is not None:  # which takes the place of None
        model = copy.copy(model)  # of its own: another thread may generate with the model itself
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.cache_implementation = None
    return model, kwargs | {"past_key_values": whole_cache(name, spec.num_layers, slots)}


def _token_rows(model: Any, inputs: Inputs, tokenizer: Any) -> tuple[list[list[int]], bool]:
    """Token ids of every input without padding, and whether texts were given."""
    as_text = False
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InputError(
                f"expected input_ids in the mapping of inputs, got {', '.join(map(repr, inputs)) or 'none'}"
            )
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        for name, value in (("input_ids", tokens), ("attention_mask", mask)):
            if not isinstance(value, Tensor) and not (value is None and name == "attention_mask"):
                raise InputError(f"expected {name} as a tensor (return_tensors='pt'), got {type(value).__name__}")
        keep = torch.ones_like(tokens) if mask is None else mask
        if keep.shape != tokens.shape:
            raise InputError(f"expected attention_mask of shape {list(tokens.shape)}, got {list(keep.shape)}")
        rows = [row[kept.bool()].tolist() for row, kept in zip(tokens, keep, strict=True)]
    elif isinstance(inputs, Tensor):
        if inputs.dim() != 2:
            raise InputError(f"expected input_ids [B, T], got {list(inputs.shape)}")
        rows = inputs.tolist()
    elif not isinstance(inputs, Sequence):
        raise InputError(f"expected texts, lists of token ids, a tensor or a mapping, got {type(inputs).__name__}")
    elif inputs and all(isinstance(text, str) for text in inputs):
        if tokenizer is None:
            raise InputError("expected a tokenizer to go with texts, got None")
        as_text = True
        rows = [list(tokenizer(text)["input_ids"]) for text in inputs]
        if backbone_spec(model).kind != "seq2seq":  # whose sources stay closed
            rows = [_continued(row, tokenizer, text) for row, text in zip(rows, inputs, strict=True)]
    else:
        for index, row in enumerate(inputs):
            if not isinstance(row, Sequence | Tensor):
                raise InputError(f"input {index}: expected texts or token ids, got {type(row).__name__}")
        rows = [list(row) for row in inputs]  # type: ignore[arg-type]
    if not rows:
        raise InputError("expected at least one input, got none")
    for index, row in enumerate(rows):
        if not row:
            raise InputError(f"input {index}: expected at least one token, got an empty input")
        if not all(isinstance(token, int) for token in row):
            raise InputError(f"input {index}: expected texts or token ids, got {type(row[0]).__name__}")
    return rows, as_text


def _continued(tokens: list[int], tokenizer: Any, text: Any) -> list[int]:
    """The tokens of a text without what the tokenizer has put behind it, where its continuation is to stand."""
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for end in range(len(tokens), len(own) - 1, -1):  # from behind: a text without tokens keeps its BOS
        if tokens[end - len(own) : end] == own:
            return tokens[:end]
    return tokens


def _lowered(spec: BackboneSpec, prompt: Any, batch: int) -> tuple[list[LoweredPrompt], list[int]]:
    """Every distinct prompt once, and the prompt of every row among them, -1 for none."""
    if prompt is None:
        return [], [-1] * batch
    per_row = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * batch
    if len(per_row) != batch:
        raise InputError(f"expected one prompt or one per input ({batch}), got {len(per_row)}")
    distinct = {id(one): one for one in per_row if one is not None}
    order = {key: index for index, key in enumerate(distinct)}
    lowered = [lowered_for(spec, one) for one in distinct.values()]
    return lowered, [-1 if one is None else order[id(one)] for one in per_row]


def _kept_prompts(
    model: Any, spec: BackboneSpec, prompt: Any, ids: list[list[int]]
) -> tuple[list[KeyValuePrefix | GatedTokens], list[int]]:
    """Every distinct prompt once, its virtual tokens as keys and values, and the prompt of every row of token ids."""
    lowered, chosen = _lowered(spec, prompt, len(ids))
    texts = pack_rows(ids).to(spec.word_embeddings.weight.device)
    prompts, prompt_ids = own_prompts(spec, lowered, chosen, texts)
    for one in prompts:
        check_fit(spec, one)
    virtual = [one for one in prompts if isinstance(one, VirtualTokens)]
    captured = iter(capture_prefixes(model, virtual) if virtual else [])
    kept = [next(captured) if isinstance(one, VirtualTokens) else one for one in prompts]
    if len({type(one) for one in kept}) > 1:
        raise InputError("expected prompts of one kind to generate with, got prefixes beside gated tokens")
    device = spec.word_embeddings.weight.device
    dtype = spec.word_embeddings.weight.dtype  # once: attention would convert what differs in every step
    kept = [
        replace(one, keys=one.keys.to(device, dtype), values=one.values.to(device, dtype))
        if isinstance(one, KeyValuePrefix)
        else one
        for one in kept
    ]
    return kept, prompt_ids


def _padding_token(model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> int:
    """The declared token where there is one, then what ends a text: padding stands behind ended rows, too."""
    candidates = (
        kwargs.get("pad_token_id"),
        getattr(kwargs.get("generation_config"), "pad_token_id", None),
        getattr(tokenizer, "pad_token_id", None),
        model.generation_config.pad_token_id,
        getattr(tokenizer, "eos_token_id", None),
        *_end_tokens(model, kwargs),
    )
    return next((int(token) for token in candidates if token is not None), 0)


def _setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a `generate` call: given by itself, in a configuration, or, where that has none, the model's own."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _end_tokens(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """The tokens at which a `generate` call ends a row; a number below zero is none."""
    tokens = _setting(model, kwargs, "eos_token_id")
    return [] if tokens is None else [token for token in torch.as_tensor(tokens).flatten().tolist() if token >= 0]


def _new_tokens(model: Any, longest: int, kwargs: dict[str, Any]) -> int:
    """How many tokens each row of `longest` slots gets at most."""
    new = _setting(model, kwargs, "max_new_tokens")
    limit = _setting(model, kwargs, "max_length") or longest + 20
    return int(max(limit - longest, 0) if new is None else new)


def _check_length(spec: BackboneSpec, ids: list[list[int]], prompts: list[FixedPrompt | None], new: int) -> None:
    """Refuse before any work what would run beyond the position embeddings or a prompt's input offsets."""
    for row, (tokens, prompt) in enumerate(zip(ids, prompts, strict=True)):
        size = 0 if prompt is None else prompt.num_positions
        check_reach(prompt, len(tokens) + new, f"input {row} with {new} new tokens")
        if size + len(tokens) + new > spec.max_positions:
            raise InputError(
                f"input {row}: expected at most {spec.max_positions} positions, got {size} virtual tokens, "
                f"{len(tokens)} tokens of text and {new} new ones"
            )
