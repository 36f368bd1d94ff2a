"""What a prompt is to other programs: the plain soft prompt or prefix that it folds to."""

from __future__ import annotations

from typing import Any

from ptengine.prompts import Prefix, Prompt, SoftPrompt

__all__ = ["method_of", "plain"]


def plain(prompt: Any) -> Any:
    """`prompt` itself if it is a `SoftPrompt` or a `Prefix`, else the one it folds to; what does not fold, as it is."""
    if isinstance(prompt, SoftPrompt | Prefix) or not isinstance(prompt, Prompt):
        return prompt
    folded = prompt.fold()
    return folded if isinstance(folded, SoftPrompt | Prefix) else prompt


def method_of(prompt: Any) -> str:
    """A name for messages."""
    return str(getattr(prompt, "method", type(prompt).__name__))
