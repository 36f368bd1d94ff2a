"""The contract every prompt method keeps.

A prompt holds what is trained, in fp32 whatever the backbone's dtype, and lowers itself to one of the two forms the
backbone understands. It never sees data, a trainer or the attention, and keeps no reference to the model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from ptengine.backbone.lowering import LoweredPrompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.io import save_prompt

__all__ = ["Prompt"]


class Prompt(nn.Module):
    """Base class of all prompts; a new method is one file with a subclass and `@register(name)`.

    `state_dict()` holds everything that is trained, reparametrisation included: what a checkpoint that resumes needs.
    `save()` holds the folded prompt: what a use of the prompt needs.

    Attributes:
        method: the name the method is saved and registered under.
        num_virtual_tokens: P.
        facts: the backbone the prompt belongs to.
    """

    method: ClassVar[str]
    num_virtual_tokens: int
    facts: BackboneFacts

    def __init__(self, facts: BackboneFacts, num_virtual_tokens: int) -> None:
        super().__init__()
        self.facts = facts
        self.num_virtual_tokens = num_virtual_tokens

    def lower(self) -> LoweredPrompt:
        """The prompt as the backbone reads it; differentiable with respect to every trainable parameter."""
        raise NotImplementedError

    def fold(self) -> Prompt:
        """The same prompt without its reparametrisation: lowers to the same numbers, fewest parameters.

        Always a new prompt that shares no memory with this one.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-able description from which `empty` rebuilds the prompt before its weights are loaded."""
        raise NotImplementedError

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        """The folded prompt that `config()` of a folded prompt describes, all parameters zero, on the CPU.

        Raises:
            InputError: `config` is not one that this method wrote.
        """
        raise NotImplementedError

    def default_learning_rate(self) -> float:
        """A learning rate for Adam-like optimisers, which move an element by about this much per step."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the folded prompt to `directory`; see `ptengine.prompts.io.save_prompt`."""
        return save_prompt(self, directory)
