"""Prompts as vectors: averages and task-vector sums of what was trained.

Works on folded prompts of one form and backbone, number by number in fp64. Knows no bank and no training.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptengine.backbone.spec import backbone_spec
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt, without_head
from ptengine.prompts.registry import create, prompt_class
from ptengine.prompts.reparametrized import Parametrized

__all__ = ["add_task_vectors", "form_of", "normalized_weights", "start_from", "weighted_mean"]


def weighted_mean(prompts: Sequence[Prompt], weights: Sequence[float] | None = None) -> Prompt:
    """The mean of prompts, weighted by `weights` over their sum, plain without them; a new folded prompt.

    Raises:
        InputError: no prompts, prompts of different forms, or weights that are negative or add up to zero.
    """
    folded = _same_form(prompts)
    shares = normalized_weights(len(folded), weights)
    states = [prompt.state_dict() for prompt in folded]
    return _filled(folded[0], {name: _sum(shares, [state[name] for state in states]) for name in states[0]})


def add_task_vectors(
    prompts: Sequence[Prompt], initial: Prompt, weights: Sequence[float] | None = None, scale: float = 1.0
) -> Prompt:
    """P0 + scale * (weighted mean of P_s - P0); with one prompt and scale 1 that prompt, up to rounding.

    Args:
        prompts: trained from `initial`.
        initial: P0.
        weights: as in `weighted_mean`.
        scale: of what is added.

    Raises:
        InputError: as `weighted_mean`; `initial` has another form.
    """
    folded = _same_form([*prompts, initial])
    start, moved = folded[-1].state_dict(), [prompt.state_dict() for prompt in folded[:-1]]
    shares = normalized_weights(len(moved), weights)
    numbers = {}
    for name, origin in start.items():
        vector = _sum(shares, [state[name].double() - origin.double() for state in moved])
        numbers[name] = origin.double() + scale * vector
    return _filled(folded[-1], numbers)


def start_from(model: Any, prompt: Prompt) -> Prompt:
    """A new trainable prompt on `model` with the numbers of `prompt`, and of its head if it has one, and the learning
    rate of a transferred one.

    Raises:
        InputError: prompts of this method cannot start from another.
    """
    folded = prompt.fold()
    if isinstance(folded, HeadedPrompt):
        return folded.around(start_from(model, folded.prompt)).to(backbone_spec(model).word_embeddings.weight.device)
    if "prompt" not in inspect.signature(prompt_class(folded.method)).parameters:
        raise InputError(f"expected a prompt method that can start from another prompt, got {folded.method!r}")
    return create(folded.method, model, init="prompt", prompt=folded)


def form_of(prompt: Prompt) -> dict[str, Any]:
    """What two folded prompts need in common to be added: the method, the settings that say what its numbers mean, the
    labels of a head, and the shapes."""
    form: dict[str, Any] = {"method": prompt.method}
    if isinstance(prompt, HeadedPrompt):
        form |= {"prompt": prompt.prompt.method, "labels": list(prompt.labels)}
    inner = without_head(prompt)
    if isinstance(inner, Parametrized):
        form |= {name: value for name, value in inner.settings.items() if not name.endswith("_rate_factor")}
    return form | {name: list(tensor.shape) for name, tensor in prompt.state_dict().items()}


def _same_form(prompts: Sequence[Prompt]) -> list[Prompt]:
    if not prompts:
        raise InputError("expected at least one prompt to combine, got none")
    folded = [prompt.fold() for prompt in prompts]
    forms = [form_of(prompt) for prompt in folded]
    for prompt, form in zip(folded, forms, strict=True):
        folded[0].facts.require_same(prompt.facts, "the first prompt to combine")
        if form != forms[0]:
            raise InputError(
                f"expected prompts of one method and shape, settings and labels to combine, got {forms[0]} and {form}"
            )
    return folded


def normalized_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    """`weights` scaled to the sum 1; None means equal ones.

    Raises:
        InputError: another number of weights than `count`, one that is negative or not finite, or all of them 0.
    """
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or not all(math.isfinite(w) and w >= 0 for w in given) or (count and max(given) == 0):
        raise InputError(f"expected {count} weights of at least 0 that do not add up to 0, got {given}")
    largest = max(given, default=1.0)
    given = [weight / largest for weight in given]  # whose sum is finite
    return [weight / math.fsum(given) for weight in given]


def _sum(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for share, tensor in zip(shares, tensors, strict=True):
        total += share * tensor.double()
    return total


def _filled(like: Prompt, numbers: dict[str, Tensor]) -> Prompt:
    prompt = like.fold()
    prompt.load_state_dict({name: tensor.float() for name, tensor in numbers.items()})
    return prompt
