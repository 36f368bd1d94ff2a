"""Proves on a few tokens that the stock calls of a causal model see virtual tokens in their rows, and `generate` too.

A left-padded batch and three steps of greedy search with a cache run against the stock rows of `trial`. What fails is
noted, not refused: such a model runs without padding on the left, or without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.in_row_generation import generate_in_row, prompts_in_rows
from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.trial import StockRows, distance_of, first_line, tolerance

__all__ = ["bears_left_padding", "why_no_steps"]

_STEPS = 3


def bears_left_padding(model: Any, spec: BackboneSpec, stock: StockRows) -> bool:
    """Whether padding before the prompts of shorter rows leaves the numbers as they are.

    Args:
        model: as it came.
        spec: its facts, in which `pads_left` is not read.
        stock: rows alone.
    """
    device = spec.word_embeddings.weight.device
    longest = max(map(len, stock.ids))
    tokens = torch.tensor([[row[0]] * (longest - len(row)) + row for row in stock.ids], device=device)  # [B, T]
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in stock.ids], device=device)
    prompts = [VirtualTokens(stock.embeds)]
    try:
        with prompts_in_rows(model, replace(spec, pads_left=True), prompts, None, len(stock.embeds)):
            out = spec.base_model(input_ids=tokens, attention_mask=mask)
    except Exception:
        return False
    texts = [hidden[len(stock.embeds) :] for hidden in stock.hidden]
    return distance_of(out.last_hidden_state[mask.bool()], torch.cat(texts)) <= tolerance(spec, stock.embeds.dtype)


def why_no_steps(model: Any, spec: BackboneSpec, stock: StockRows) -> str | None:
    """Why `generate` with a cache would not write what the stock model does with the prompt in the row, or None.

    Args:
        model: as it came, with its LM head.
        spec: its facts, with `pads_left`, which its steps are to bear then.
        stock: rows alone.
    """
    logits: list[tuple[Tensor, ...]] = []
    prompts, settings = [VirtualTokens(stock.embeds)], {"max_new_tokens": _STEPS, "min_new_tokens": _STEPS}
    hook = model.register_forward_hook(lambda _module, _args, out: logits.append(out.logits[:, -1]))
    try:
        given: dict[str, Any] = {**settings, "do_sample": False, "num_beams": 1, "use_cache": True}
        with _as_found(model):  # or the stock steps would count positions as in this batch
            written = generate_in_row(model, spec, prompts, [0] * len(stock.ids), stock.ids, stock.ids[0][0], given)
    except Exception as error:
        return f"a trial of its steps with a cache failed ({first_line(error)})"
    finally:
        hook.remove()
    return _differ(model, spec, stock, written, _by_row(spec, stock, logits))


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards no module has an attribute that calls inside the block have set.

    Some keep what they counted of a batch, as Qwen-VL's `rope_deltas`, and fail on the next one of another size.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            now = vars(module)
            for name in [*now]:
                if name not in attributes:
                    del now[name]
                elif now[name] is not attributes[name]:
                    now[name] = attributes[name]


def _by_row(spec: BackboneSpec, stock: StockRows, logits: list[Any]) -> list[Tensor]:
    """What predicted the new tokens of each row, [steps, V]: all rows ran together, or one after another."""
    if spec.pads_left:
        return list(torch.stack(logits, dim=1))  # [B, steps, V]
    return [torch.cat(logits[row * _STEPS : (row + 1) * _STEPS]) for row in range(len(stock.ids))]


def _differ(model: Any, spec: BackboneSpec, stock: StockRows, written: Tensor, got: list[Tensor]) -> str | None:
    for new, row, steps in zip(written[:, -_STEPS:], stock.ids, got, strict=True):
        tokens = torch.tensor(row + new[:-1].tolist(), device=written.device)
        embeds = torch.cat([stock.embeds, spec.word_embeddings(tokens)])[None]  # [1, P + T + steps - 1, d]
        expected = model(inputs_embeds=embeds, use_cache=False).logits[0, -_STEPS:]  # [steps, V]
        distance, bound = distance_of(steps, expected), tolerance(spec, expected.dtype)
        if not distance <= bound:
            return f"trial steps with a cache differed from the stock computation by {distance:.1e} (bound {bound:.1e})"
    return None
