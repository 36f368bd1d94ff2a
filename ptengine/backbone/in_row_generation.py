"""Text generation by a causal model that runs its virtual tokens in the row, through the stock `generate`.

Rows are padded before their prompts where the model's numbers bear that; otherwise rows of one shape run together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.caches import with_settings
from ptengine.backbone.causal_rows import CausalRows, RowPrompts
from ptengine.backbone.in_row import with_own_prompt
from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec

__all__ = ["generate_in_row", "prompts_in_rows", "row_hooks"]

_PREPARE = "prepare_inputs_for_generation"


@dataclass(frozen=True)
class _Call:
    """What the calls of one `generate` have in their rows, and of which model they are."""

    spec: BackboneSpec
    rows: RowPrompts


_here: ContextVar[_Call | None] = ContextVar("ptengine_prompts_in_rows", default=None)


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
        given = {"input_ids": tokens, "attention_mask": mask} | with_settings(kwargs, pad_token_id=pad)
        if width < longest and given.get("max_length") is not None:
            given["max_length"] -= longest - width  # which counts the padding of all rows
        own = [prompts[one] for one in used]
        sizes = [own[one].num_virtual_tokens if one >= 0 else 0 for one in places]
        slots = max(size + len(ids[row]) for size, row in zip(sizes, group, strict=True)) - width
        with prompts_in_rows(model, spec, own, places, slots) as behind:
            out = behind.generate(**given)
        sequences = out if isinstance(out, Tensor) else out.sequences  # [b * returned, T + new]
        for row, part in zip(group, sequences.chunk(len(group)), strict=True):
            found[row] = [torch.nn.functional.pad(one, (longest - width, 0), value=pad) for one in part]
    return torch.nn.utils.rnn.pad_sequence(
        [one for row in range(len(ids)) for one in found[row]], batch_first=True, padding_value=pad
    )


@contextmanager
def prompts_in_rows(
    model: Any, spec: BackboneSpec, prompts: Sequence[VirtualTokens], prompt_ids: Sequence[int] | None, slots: int
) -> Iterator[Any]:
    """Stock calls of `model` inside the block, in this thread, have the prompts in their rows, and no other.

    Yields the model as `generate` is to be called on: it shares everything.

    Args:
        model: a causal model that runs prompts in the row, with the hooks of `row_hooks`.
        spec: its facts.
        prompts: N, at least one where any row has one.
        prompt_ids: [B], the prompt of each row, -1 for none; None where all have the first.
        slots: as of `RowPrompts`.
    """
    facade = copy.copy(model)  # of its own: another thread may generate with the model itself
    if hasattr(model, _PREPARE):
        calls, rows = _calls(model, spec.base_model), _OfBase(spec.base_model).rows
        setattr(facade, _PREPARE, calls.wrap_prepare(getattr(model, _PREPARE), rows))
    token = _here.set(_Call(spec, _row_prompts(spec, prompts, prompt_ids, facade, slots)))
    try:
        with with_own_prompt():
            yield facade
    finally:
        _here.reset(token)


def _row_prompts(
    spec: BackboneSpec, prompts: Sequence[VirtualTokens], prompt_ids: Sequence[int] | None, owner: Any, slots: int
) -> RowPrompts:
    if prompt_ids is None:
        return RowPrompts(owner, slots, prompts)
    device = spec.word_embeddings.weight.device
    sizes = [prompts[one].num_virtual_tokens if one >= 0 else 0 for one in prompt_ids]
    return RowPrompts(
        owner, slots, prompts,
        chosen=torch.tensor([one % (len(prompts) + 1) for one in prompt_ids], device=device),
        sizes=None if set(sizes) == {slots} else torch.tensor(sizes, device=device),
    )  # fmt: skip


def row_hooks(model: Any, base: nn.Module) -> list[Any]:
    """Hooks through which calls of `model` inside `prompts_in_rows` see their prompts; handles that `remove` them.

    As long as they are there, any thread may generate: PyTorch does not bear that hooks come and go during a call.
    """
    return _calls(model, base).install(base)


def _calls(model: Any, base: nn.Module) -> CausalRows:
    here = _OfBase(base)
    return CausalRows(model, here.spec, here.rows)


@dataclass(frozen=True, eq=False)
class _OfBase:
    """What the call under way in this thread has for the model of `base`: methods, so that a deep copy has its own."""

    base: nn.Module

    def _call(self) -> _Call | None:
        call = _here.get()
        return call if call is not None and call.spec.base_model is self.base else None

    def spec(self) -> BackboneSpec:
        call = self._call()
        assert call is not None  # asked for behind prompts alone
        return call.spec

    def rows(self) -> RowPrompts | None:
        call = self._call()
        return None if call is None else call.rows


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
