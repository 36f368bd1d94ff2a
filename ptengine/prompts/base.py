"""The contract every prompt method keeps.

A prompt holds what is trained, in fp32 whatever the backbone's dtype, and lowers itself to one of the two forms the
backbone understands. It never sees data, a trainer or the attention.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ptengine.backbone.lowering import LoweredPrompt

__all__ = ["Prompt"]


class Prompt(nn.Module):
    """Base class of all prompts; a new method is one file with a subclass and `@register`.

    Attributes:
        method: the name the method is saved and registered under.
        num_virtual_tokens: P.
    """

    method: ClassVar[str]
    num_virtual_tokens: int

    def lower(self) -> LoweredPrompt:
        """The prompt as the backbone reads it; differentiable with respect to every trainable parameter."""
        raise NotImplementedError

    def fold(self) -> Prompt:
        """The same prompt without its reparametrisation: lowers to the same numbers, fewest parameters."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-able arguments from which the method rebuilds an empty prompt before its weights are loaded."""
        raise NotImplementedError
