"""A prompt's lowering that was computed once: what it was computed from, and whether it still serves.

Knows tensors, and how PEFT's layers say which adapters they apply; no hooks and no calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import FixedPrompt

__all__ = ["KeptLowering", "adapter_states"]


@dataclass(frozen=True)
class KeptLowering:
    """Attributes:
    state: the circumstances, the versions of `weights` among them.
    sources: copies of the prompt's numbers.
    weights: the model's, where the lowering depends on them.
    lowered: what was computed.
    """

    state: tuple[Any, ...]
    sources: list[Tensor]
    weights: list[nn.Parameter]
    lowered: FixedPrompt

    def serves(self, state: tuple[Any, ...], sources: list[Tensor], weights: list[nn.Parameter]) -> bool:
        """Whether it would be the same, computed now.

        The prompt is compared by its numbers: fused optimisers and changes through `.data` do not count in a tensor's
        version. The model's weights are too many for that.
        """
        return (
            self.state == state
            and _equal(self.sources, sources)
            and len(self.weights) == len(weights)
            and all(before is now for before, now in zip(self.weights, weights, strict=True))
        )


def adapter_states(model: nn.Module) -> list[Any]:
    """Which adapters of PEFT each layer applies: with none of its weights changed, it computes something else."""
    layers: list[Any] = [module for module in model.modules() if "merged_adapters" in vars(module)]
    return [(one.disable_adapters, [*one.active_adapters], [*one.merged_adapters]) for one in layers]


def _equal(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(
        x.device == y.device and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(before, now, strict=True)
    )
