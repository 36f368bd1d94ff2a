"""Models and prompts as they are used and not trained: no dropout, no noise. Knows modules and lowered prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from ptengine.backbone.lowering import LoweredPrompt

__all__ = ["Lowerable", "eval_mode", "lowered_as_used"]


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
