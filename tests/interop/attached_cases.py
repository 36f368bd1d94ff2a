"""Prompts for attaching to tiny models, and what the stock model computes behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptengine.prompts import Prefix, Prompt, SoftPrompt

from ..backbone.stock import (
    HIDE,
    stock_logits,
)

KINDS = ["soft", "prefix"]
SIDES = ["left", "right"]
LENGTHS = (5, 11, 1, 8)


def prompt_for(model: Any, kind: str, size: int = 6, seed: int = 0) -> Prompt:
    """A prompt with numbers large enough to move the logits."""
    generator = torch.Generator().manual_seed(300 + seed)
    if kind == "soft":
        embeds = 0.2 * torch.randn(size, model.config.hidden_size, generator=generator)
        return SoftPrompt(model, init="array", array=embeds)
    if kind == "projected":
        return Prefix(model, size, projection=True, projection_size=8, seed=seed)
    return Prefix(model, init="array", array=torch.randn(2, *Prefix(model, size).keys.shape, generator=generator))


def alone(model: Any, prompt: Prompt, row: list[int]) -> Tensor:
    """Logits [T, V] of the stock model for one row behind its prompt."""
    return stock_logits(model, prompt.lower(), row)[-len(row) :]


def labels_for(rows: list[list[int]]) -> list[list[int]]:
    """Every other token, the first one (which the stock loss cannot see) and padding left out."""
    return [[HIDE if i % 2 == 0 else token for i, token in enumerate(row)] for row in rows]


def gradients(prompt: Prompt) -> Tensor:
    parts = [parameter.grad.flatten() for parameter in prompt.parameters() if parameter.grad is not None]
    prompt.zero_grad(set_to_none=True)
    return torch.cat(parts)


def state(model: Any) -> Any:
    """Everything that a block must leave as it was."""
    return (
        {name: id(value) for name, value in vars(model).items() if name != "training"},
        [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()],
        [
            (name, list(module._forward_hooks), list(module._forward_pre_hooks),
             list(module._forward_pre_hooks_with_kwargs), list(module._forward_hooks_with_kwargs))
            for name, module in model.named_modules()
        ],
        [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
        model.config.to_dict(), model.config._attn_implementation, model.forward.__func__,
    )  # fmt: skip
