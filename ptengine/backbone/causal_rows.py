"""Puts virtual tokens into the rows of the stock calls of a causal model that reads no prompt kept apart.

Hooks on the model without its head place them before each text, behind the padding on its left, tell the call its mask
and positions, and take their hidden states out of the result: head, loss and `generate` see the text alone. A cache
holds the virtual tokens, once for every row. Which prompts a call sees is the caller's business.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ptengine.backbone.attached_rows import gather_slots
from ptengine.backbone.attention import per_row
from ptengine.backbone.caches import is_static, require_seen
from ptengine.backbone.families import UNLIMITED
from ptengine.backbone.input_offsets import add_offsets, check_reach, stack_offsets
from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.stock_batch import StockBatch, read_batch
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["CausalRows", "RowPrompts", "RowSlots"]

_MARK = "_ptengine_rows"  # attribute of a cache: whose text it holds, behind how many slots, and how many tokens of it
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class RowSlots:
    """Attributes:
    owner: whom a cache that a call fills belongs to, told by identity.
    slots: D, those that rows get before the text's; a row's virtual tokens take the place of its padding beyond them.
    """

    owner: Any
    slots: int


@dataclass(frozen=True)
class RowPrompts(RowSlots):
    """Attributes:
    prompts: N.
    chosen: int64 [B], the prompt of each row of a call, or of each group of rows that beams make of one, N for none,
        each checked against the model's positions; None where all rows have the first, which a call checks.
    sizes: int64 [B], their virtual tokens; None where all have D.
    """

    prompts: Sequence[VirtualTokens]
    chosen: Tensor | None = None
    sizes: Tensor | None = None

    def of_rows(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The prompt of every row, N for none, and its tokens: int64 [B] both. The host waits for nothing."""
        chosen, sizes = per_row(self.chosen, rows), per_row(self.sizes, rows)
        if chosen is None:
            chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        return chosen, torch.full_like(chosen, self.slots) if sizes is None else sizes


class _Inside(threading.local):
    def __deepcopy__(self, _: dict[int, Any]) -> _Inside:
        return _Inside()


class CausalRows:
    """Hooks on a causal model that runs prompts in the row.

    Args:
        model: with or without its head.
        spec: gives its facts.
        current: gives the prompts of the call under way in this thread, None for a call that is to stay as it is.
    """

    def __init__(self, model: Any, spec: Callable[[], BackboneSpec], current: Callable[[], RowPrompts | None]) -> None:
        self._model, self._spec, self._current = model, spec, current
        # `module`, whose call is under way, and `seen`: virtual slots before its text, all of the text's, its prompts
        self._inside = _Inside()
        self._names: dict[nn.Module, list[str]] = {}

    def install(self, base: nn.Module) -> list[Any]:
        """Handles whose `remove` takes the hooks out."""
        handles = []
        # Some heads call the decoder inside the model without its head.
        for module in (base, getattr(base, "decoder", None)):
            if isinstance(module, nn.Module):
                self._names[module] = list(inspect.signature(type(module).forward).parameters)[1:]
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._behind, with_kwargs=True, always_call=True))
        return handles

    def wrap_prepare(
        self, prepare: Callable[..., dict[str, Any]], current: Callable[[], RowSlots | None]
    ) -> Callable[..., dict[str, Any]]:
        """`prepare_inputs_for_generation` that counts the text in a cache, and hands masks on as they were given.

        `current` is as the class has it, and need give no prompts.
        """

        @functools.wraps(prepare)
        def wrapped(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            rows = current()
            if rows is None:
                return prepare(input_ids, *args, **kwargs)
            cache = _cache_of(kwargs)
            if kwargs.get("use_cache") is not False:
                _require_steps(self._spec())
            past = _past(cache, rows)
            given = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") else None
            length = (input_ids if given is None else given).shape[1]
            # A first step leaves out of the whole text as many tokens as the cache has slots.
            if past and kwargs.get("next_sequence_length") == length - past - rows.slots:
                kwargs["next_sequence_length"] = length - past
            inputs = prepare(input_ids, *args, **kwargs)
            if is_static(cache):  # for which the stock model has made masks of the slots it counts
                inputs["attention_mask"] = kwargs.get("attention_mask")
            return inputs

        return wrapped

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(self._inside, "module", module) is not module:
            return None  # of the model whose rows have their virtual tokens
        rows = self._current()
        call = dict(zip(self._names[module], args, strict=False)) | kwargs
        ids, text = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        if rows is None or (ids is None) == (text is None):
            return None  # the stock model says what it expects
        given = ids if text is None else text
        if given.dim() != (2 if text is None else 3):
            raise InputError(f"expected a batch [B, T] beside an attached prompt, got {list(given.shape)}")
        spec = self._spec()
        if call.get("token_type_ids") is not None:
            raise InputError(f"expected no token_type_ids with a prompt attached to model type {spec.model_type!r}")
        past = _past(_cache_of(call), rows)
        if past:
            _require_steps(spec)
        layout = call | ({"input_ids": ids} if text is None else {"inputs_embeds": text})
        # Of rows with prompts of their own each differs, and was checked.
        limit = spec.max_positions if rows.chosen is None else UNLIMITED
        batch = read_batch(layout, (given.shape[0], given.shape[1]), past, rows.slots, limit)
        _require_padding(spec, batch)
        call = self._with_rows(call, batch, rows, spec.word_embeddings(ids) if text is None else text, past)
        if "position_ids" not in self._names[module]:
            if layout.get("position_ids") is not None:
                raise InputError(
                    f"expected no position_ids for model type {spec.model_type!r}, which counts them itself"
                )
            call.pop("position_ids")
        self._inside.module, self._inside.seen = module, (0 if past else rows.slots, past + given.shape[1], rows)
        return (), call

    def _with_rows(
        self, call: dict[str, Any], batch: StockBatch, rows: RowPrompts, text: Tensor, past: int
    ) -> dict[str, Any]:
        """The call with D slots for virtual tokens before the S of the text, cached ones included: [B, D + S]."""
        count, length = text.shape[:2]
        chosen, sizes = rows.of_rows(count, text.device)
        first, slots = rows.slots, rows.slots + past + length
        starts = torch.zeros_like(sizes) if batch.starts is None else batch.starts.long()  # [B]
        place = torch.arange(slots, device=text.device)  # [D + S]
        within = place - (starts + first - sizes)[:, None]  # [B, D + S], of each slot in its row's prompt
        virtual = (within >= 0) & (within < sizes[:, None])
        kept = batch.kept  # [B, S]
        if kept is None:
            kept = torch.ones(count, past + length, dtype=torch.bool, device=text.device)
        mask = virtual | torch.cat([kept.new_zeros(count, first), kept], dim=1)
        table = stack_offsets(rows.prompts, text)
        own = batch.positions - first  # [B, T], of each token in its text
        if table is not None:
            for one in rows.prompts:
                check_reach(one, batch.reach - first, "the longest row")
            text = add_offsets(text, table, chosen[:, None], own)
        positions = (own + sizes[:, None]).masked_fill(~kept[:, past:], 0)  # [B, T]
        if not past:
            longest = int(max((one.num_virtual_tokens for one in rows.prompts), default=0))
            prompts = text.new_zeros(len(rows.prompts) + 1, longest, text.shape[2])  # [N + 1, P, d]
            for index, one in enumerate(rows.prompts):
                prompts = _placed(prompts, index, one.embeds.to(prompts))
            source = torch.where(virtual, within, longest + (place - first).clamp(min=0))  # [B, D + T]
            text = gather_slots(torch.cat([prompts[chosen], text], dim=1), source)
            positions = (mask.long().cumsum(1) - 1 + self._shift(own, kept)).masked_fill(~mask, 0)  # [B, D + T]
            positions = torch.where(virtual, within, positions)
        call |= {"inputs_embeds": text, "position_ids": positions}
        call.pop("attention_mask", None)
        full = batch.starts is None and not batch.right_padded if rows.sizes is None else bool(mask.all())
        if not full and not (past and _holds_states_alone(_cache_of(call))):
            call["attention_mask"] = mask.long()
        return call

    @staticmethod
    def _shift(own: Tensor, kept: Tensor) -> Tensor:
        """How far given positions of a first call are from those that count the row's tokens: int64 [B, 1]."""
        first = kept.int().argmax(1, keepdim=True)  # [B, 1]
        return own.gather(1, first)

    def _behind(self, module: nn.Module, _: tuple[Any, ...], __: dict[str, Any], out: Any) -> Any:
        """Take the virtual tokens out of the output, and note in a cache whose text it holds."""
        if getattr(self._inside, "module", None) is not module:
            return None
        skip, held, rows = self._inside.seen
        del self._inside.module
        if out is None:  # the call failed
            return None
        for cache in (part for part in (out if isinstance(out, tuple) else out.values()) if isinstance(part, Cache)):
            setattr(cache, _MARK, (weakref.ref(rows.owner), rows.slots, held))
        if isinstance(out, tuple):
            return (out[0][:, skip:], *out[1:])
        out["last_hidden_state"] = out["last_hidden_state"][:, skip:]
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(hidden[:, skip:] for hidden in out["hidden_states"])
        return out


def _placed(table: Tensor, index: int, embeds: Tensor) -> Tensor:
    """The table [N + 1, P, d] with the P tokens of prompt `index` from its first slot on; differentiable."""
    rows = torch.nn.functional.pad(embeds, (0, 0, 0, table.shape[1] - len(embeds)))  # [P, d]
    return table.index_copy(0, torch.tensor([index], device=table.device), rows[None])


def _cache_of(call: dict[str, Any]) -> Any:
    return next((call[name] for name in _CACHES if call.get(name) is not None), None)


def _holds_states_alone(cache: Any) -> bool:
    """Whether no layer keeps tokens, which a mask could hide and by which they are counted."""
    try:
        cache.get_seq_length()
    except ValueError:
        return True
    return False


def _past(cache: Any, rows: RowSlots) -> int:
    """The slots of text that a cache holds, which a call that saw the same prompts has filled."""
    if cache is None:
        return 0
    if any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ())):
        raise InputError(
            "expected a dynamic cache with virtual tokens in every row, which need slots of it, got a static one"
        )
    mark = getattr(cache, _MARK, None)
    noted = 0 if mark is None else mark[1] + mark[2]
    slots = noted if _holds_states_alone(cache) else int(cache.get_seq_length())
    require_seen(slots, None if mark is None else mark[0], rows.owner)
    return slots - int(mark[1]) if slots and mark is not None else 0


def _require_steps(spec: BackboneSpec) -> None:
    if spec.no_generation is not None:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported for steps with a cache behind a prompt in the row (give "
            f"use_cache=False): {spec.no_generation}"
        )


def _require_padding(spec: BackboneSpec, batch: StockBatch) -> None:
    """Refuse padding that changes the numbers of the model, and rows of nothing else."""
    if batch.any_empty:
        raise InputError(
            f"expected at least one token in every row with a prompt attached to model type {spec.model_type!r}, whose "
            "virtual tokens stand in the rows"
        )
    side = None
    if batch.starts is not None and not spec.pads_left:
        side = "before a text"
    elif batch.right_padded and not spec.pads:
        side = "behind a text"
    if side is not None:
        raise InputError(
            f"expected no padding {side} with a prompt attached to model type {spec.model_type!r}, whose numbers "
            "depend on it: give rows of one length"
        )
