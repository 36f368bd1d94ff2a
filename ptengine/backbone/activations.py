"""Replaces GPT-2's composed GELU by PyTorch's fused one: the same function, one pass over memory instead of eight."""

from __future__ import annotations

from torch import nn
from transformers.activations import NewGELUActivation

__all__ = ["Replaced", "fuse_activations"]


class Replaced:
    """One replaced child module; `remove` puts the original back."""

    def __init__(self, parent: nn.Module, name: str, original: nn.Module) -> None:
        self.parent, self.name, self.original = parent, name, original

    def remove(self) -> None:
        setattr(self.parent, self.name, self.original)


def fuse_activations(model: nn.Module) -> list[Replaced]:
    """Replace every `NewGELUActivation` (Hendrycks & Gimpel 2016, the tanh form); returns what undoes it."""
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
                replaced.append(Replaced(parent, name, child))
    return replaced
