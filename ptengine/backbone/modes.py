"""Models and prompts as they are used and not trained: no dropout, no noise. Knows modules and lowered prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError

__all__ = ["Lowerable", "eval_mode", "lowered_as_used", "lowered_for"]


class Lowerable(Protocol):
    """A prompt, whatever its method."""

    def lower(self) -> LoweredPrompt: ...


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode it was in, which need not be one for all."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def lowered_as_used(prompt: Lowerable | LoweredPrompt) -> LoweredPrompt:
    """The prompt lowered without the noise of its training, whatever mode it is in."""
    if isinstance(prompt, LoweredPrompt):
        return prompt
    if not isinstance(prompt, nn.Module):
        return prompt.lower()
    with eval_mode(prompt):
        return prompt.lower()


def lowered_for(spec: BackboneSpec, prompt: Any) -> LoweredPrompt:
    """As `lowered_as_used`, of what a user hands over.

    Raises:
        InputError: it is no prompt, or one that was made for another backbone.
    """
    if not isinstance(prompt, LoweredPrompt):
        facts = getattr(prompt, "facts", None)
        if facts is None:
            raise InputError(f"expected a ptengine prompt, got {type(prompt).__name__}")
        facts.require_fits(spec, "the prompt")
    return lowered_as_used(prompt)
