"""Lets the stock calls of an encoder-decoder see an attached prompt.

A hook on the encoder puts virtual tokens into its rows, before texts whose padding it moves behind them; what the
encoder gives back remembers which prompt and which slots it saw, and a hook on the model hands the decoder that mask.
Before a prefix the hook on the model gives the decoder the prefix's keys and values, and its cache empty slots in their
place. Which prompt a call sees is the caller's business.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from ptengine.backbone.attached_rows import gather_slots, texts_first
from ptengine.backbone.attention import KEYWORD, PrefixContext
from ptengine.backbone.caches import filled_slots, is_static, keep_all_tokens, require_seen
from ptengine.backbone.in_row import carries_its_prompt
from ptengine.backbone.input_offsets import add_offsets, check_reach, stack_offsets
from ptengine.backbone.lowering import FixedPrompt, KeyValuePrefix, VirtualTokens
from ptengine.backbone.patching import require_patched
from ptengine.backbone.seq2seq_rows import empty_cache, reserve
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["Attached", "PairHooks"]

_SEEN = "_ptengine_prompt"  # attribute of a cache: a weak reference to the prompt its target stands behind
_ROWS = "_ptengine_rows"  # attribute of an encoder's output: that of its prompt, its mask [B, P + S], and its slots

# Tensors that a call may have besides these are read by one half of the model alone, in a length that has changed.
_KNOWN = frozenset({
    "attention_mask", "cache_position", "decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds",
    "input_ids", "inputs_embeds", "labels", "num_items_in_batch",
})  # fmt: skip
_FOR_BOTH = ("output_hidden_states", "output_attentions")


class Attached(Protocol):
    """A prompt on the model; `is_prefix` tells whether it lowers to keys and values."""

    prompt: nn.Module
    is_prefix: bool

    def lowered(self, spec: BackboneSpec) -> FixedPrompt: ...


class PairHooks:
    """Hooks on a patched encoder-decoder and its encoder.

    Args:
        model: with its LM head.
        current: gives what the thread that calls has attached.
        recomputes: whether layers run again in the backward pass of a call.
    """

    def __init__(self, model: Any, current: Callable[[], Attached], recomputes: Callable[[], bool]) -> None:
        self._model, self._current, self._recomputes = model, current, recomputes
        self._encoder: nn.Module = model.get_encoder()
        self._seen = threading.local()  # `rows`: what the call of the encoder that is under way has in its rows
        self._names = {
            module: list(inspect.signature(type(module).forward).parameters)[1:] for module in (model, self._encoder)
        }

    def install(self) -> list[Any]:
        """Handles whose `remove` takes the hooks out."""
        return [
            self._encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True),
            self._encoder.register_forward_hook(self._behind_encoder, with_kwargs=True),
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._behind, with_kwargs=True),
        ]

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._names[module], args, strict=False)) | kwargs

    def _before_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Virtual tokens before the texts of every row; padding behind them."""
        self._seen.rows = None
        if carries_its_prompt() or self._current().is_prefix:
            return None
        call = self._call(encoder, args, kwargs)
        ids, text = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            return None  # the stock model says what it expects
        if call.get("return_dict") is False:
            raise InputError("expected return_dict=True beside a prompt attached to an encoder-decoder, got False")
        spec, attached = require_patched(self._model), self._current()
        lowered = attached.lowered(spec)
        assert isinstance(lowered, VirtualTokens)
        given = text if ids is None else ids
        assert isinstance(given, Tensor)
        if given.dim() != (2 if text is None else 3):
            raise InputError(f"expected a batch of sources beside an attached prompt, got {list(given.shape)}")
        kept, front = _read_sources(call.get("attention_mask"), given)  # [B, S] both
        size, longest = lowered.num_virtual_tokens, int(kept.sum(1).max())
        if size + longest > spec.max_positions:
            raise InputError(
                f"expected at most {spec.max_positions} positions, got {size} virtual tokens and {longest} tokens of "
                "source"
            )
        if not spec.pads and not bool(kept.all()):
            raise InputError(
                f"expected no padding with a prompt attached to model type {spec.model_type!r}, whose numbers depend "
                "on it"
            )
        words = gather_slots(spec.word_embeddings(ids) if text is None else text, front)  # [B, S, d]
        words = _with_offsets(lowered, words, longest)
        virtual = lowered.embeds.to(words).expand(len(words), -1, -1)  # [B, P, d]
        mask = torch.cat([kept.new_ones(len(kept), size), kept], dim=1).long()  # [B, P + S]
        call |= {"inputs_embeds": torch.cat([virtual, words], dim=1), "attention_mask": mask}
        self._seen.rows = (weakref.ref(attached.prompt), mask, front)
        return (), call

    def _behind_encoder(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], out: Any) -> None:
        if self._seen.rows is not None:
            setattr(out, _ROWS, self._seen.rows)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the decoder what stands before its target, or the mask of what the encoder has read."""
        if carries_its_prompt():
            return None
        attached = self._current()
        call = self._call(model, args, kwargs)
        if call.get("return_dict") is False:
            raise InputError("expected return_dict=True beside a prompt attached to an encoder-decoder, got False")
        other = sorted(name for name, x in call.items() if isinstance(x, Tensor) and name not in _KNOWN)
        if other:
            raise InputError(f"expected no {other[0]} beside a prompt attached to an encoder-decoder")
        past = _past(call.get("past_key_values"), attached)
        if attached.is_prefix:
            return (), self._with_prefix(call, attached, past)
        return (), self._with_sources(call, attached.prompt)

    def _with_sources(self, call: dict[str, Any], prompt: nn.Module) -> dict[str, Any]:
        out = call.get("encoder_outputs")
        if out is None:
            names = ("input_ids", "inputs_embeds", "attention_mask", *_FOR_BOTH)
            out = self._encoder(**{name: call[name] for name in names if call.get(name) is not None})
        rows = getattr(out, _ROWS, None)
        if rows is None or rows[0]() is not prompt:
            raise InputError("expected encoder_outputs of a call that saw this prompt, got others")
        mask = rows[1]  # [B, P + S]
        repeats = out[0].shape[0] // mask.shape[0]  # by beams and returned sequences
        return call | {"encoder_outputs": out, "attention_mask": mask.repeat_interleave(repeats, dim=0)}

    def _with_prefix(self, call: dict[str, Any], attached: Attached, past: int) -> dict[str, Any]:
        if self._recomputes():
            raise InputError(
                "expected no gradient checkpointing with a prefix attached to an encoder-decoder, whose layers are "
                "given no cache to count by when they run again"
            )
        spec = require_patched(self._model)
        lowered = attached.lowered(spec)
        assert isinstance(lowered, KeyValuePrefix)
        size = lowered.num_virtual_tokens
        rows, length = _target_shape(self._model, call)
        if max(past, size) + length > spec.max_positions:
            raise InputError(
                f"expected at most {spec.max_positions} positions, got a prefix of {size} and "
                f"{max(past - size, 0) + length} tokens of target"
            )
        _require_right_padded(call.pop("decoder_attention_mask", None))
        cache = call.get("past_key_values")
        if cache is None or not self._caches(call):
            cache = empty_cache(spec, size, rows)
        elif not past:
            reserve(cache.self_attention_cache, spec, size, rows)
        setattr(cache, _SEEN, weakref.ref(attached.prompt))
        keys, values = lowered.by_layer(spec.word_embeddings.weight.device)
        return call | {
            "past_key_values": cache, KEYWORD: PrefixContext(keys=keys, values=values, empty_slots=size),
        }  # fmt: skip

    def _behind(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Tell whose target a new cache holds; take virtual tokens out of the encoder's part of the output."""
        if carries_its_prompt():
            return None
        attached, parts = self._current(), dict(out)
        if parts.get("past_key_values") is not None:
            setattr(parts["past_key_values"], _SEEN, weakref.ref(attached.prompt))
            if not self._caches(kwargs):
                del parts["past_key_values"]  # there to count by, and not asked for
        if not attached.is_prefix:
            _, mask, front = getattr(kwargs["encoder_outputs"], _ROWS)
            repeats, size = out["logits"].shape[0] // mask.shape[0], mask.shape[1] - front.shape[1]
            back = front.argsort(1).repeat_interleave(repeats, dim=0)  # [B, S]

            def text(hidden: Tensor) -> Tensor:
                return gather_slots(hidden[:, size:], back)

            for name in ("encoder_last_hidden_state", "encoder_hidden_states"):
                if isinstance(parts.get(name), Tensor):
                    parts[name] = text(parts[name])
                elif parts.get(name) is not None:
                    parts[name] = tuple(text(hidden) for hidden in parts[name])
        return type(out)(**parts)

    def _caches(self, call: dict[str, Any]) -> bool:
        asked = call.get("use_cache")
        return bool(getattr(self._model.config, "use_cache", True) if asked is None else asked)


def _read_sources(mask: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots hold a token, bool [B, S], once they are in the order int64 [B, S], in which padding is behind."""
    rows, length = text.shape[:2]
    if mask is None:
        kept = torch.ones(rows, length, dtype=torch.bool, device=text.device)
    elif not isinstance(mask, Tensor) or mask.shape != (rows, length):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"expected attention_mask of shape [{rows}, {length}] beside an attached prompt, got {got}")
    else:
        kept = mask.to(text.device) != 0
    front = texts_first(kept)  # [B, S]
    return kept.gather(1, front), front


def _with_offsets(lowered: VirtualTokens, words: Tensor, longest: int) -> Tensor:
    """Embeddings [B, S, d] of texts with the prompt's offsets added to them."""
    table = stack_offsets([lowered], words)  # [2, S, d]
    if table is None:
        return words
    check_reach(lowered, longest, "the longest row")
    within = torch.arange(words.shape[1], device=words.device).expand(words.shape[:2])  # [B, S]
    within = within.clamp(max=table.shape[1] - 1)  # padding is masked
    return add_offsets(words, table, torch.zeros_like(within), within)


def _past(cache: Any, attached: Attached) -> int:
    """The slots of the decoder that are filled already, by a call that saw the same prompt."""
    if cache is None:
        return 0
    if attached.is_prefix:  # whose slots stand empty in the cache; behind virtual tokens the decoder is the stock one
        _require_countable(cache)
    past = filled_slots(cache)
    require_seen(past, getattr(cache, _SEEN, None), attached.prompt)
    return past


def _require_countable(cache: Any) -> None:
    if not isinstance(cache, EncoderDecoderCache) or is_static(cache):
        kind = type(getattr(cache, "self_attention_cache", cache)).__name__
        raise InputError(f"expected a dynamic cache beside a prefix attached to an encoder-decoder, got {kind}")
    keep_all_tokens(cache.self_attention_cache)


def _target_shape(model: Any, call: dict[str, Any]) -> tuple[int, int]:
    """(B, T) of what the decoder reads."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids"):  # BART's default is the last
        if isinstance(call.get(name), Tensor):
            rows, length = call[name].shape[:2]
            return rows, length
    raise UnsupportedModelError(f"expected decoder_input_ids or labels for {type(model).__name__}, got neither")


def _require_right_padded(mask: Any) -> None:
    """Padding behind a target is seen by nothing before it; padding before it would be."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise InputError("expected decoder_attention_mask with padding behind the targets, got it before them")
