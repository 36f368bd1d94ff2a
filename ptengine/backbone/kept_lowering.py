"""A prompt's lowering that was computed once: what it was computed from, and whether it still serves.

Knows tensors, and how PEFT's layers say which adapters they apply; no hooks and no calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import FixedPrompt

__all__ = ["KeptLowering"]


@dataclass(frozen=True)
class KeptLowering:
    """Attributes:
    state: the circumstances.
    sources: copies of the prompt's numbers.
    weights: the model's, where the lowering depends on them, and their `versions`.
    adapted: the model's layers that have adapters of PEFT, where it depends on them, and what is `switched` on there.
    lowered: what was computed.
    """

    state: tuple[Any, ...]
    sources: list[Tensor]
    weights: list[nn.Parameter]
    versions: list[int]
    adapted: list[Any]
    switched: list[Any]
    lowered: FixedPrompt

    @classmethod
    def of(
        cls,
        state: tuple[Any, ...],
        sources: list[Tensor],
        weights: list[nn.Parameter],
        model: nn.Module,
        lowered: FixedPrompt,
    ) -> KeptLowering:
        """What was just computed; `weights` are those of `model`, or none where it does not depend on them."""
        adapted = [module for module in model.modules() if weights and "merged_adapters" in vars(module)]
        copies = [source.clone() for source in sources]
        return cls(state, copies, weights, _versions(weights), adapted, _switched(adapted), lowered)

    def serves(self, state: tuple[Any, ...], sources: list[Tensor], weights: list[nn.Parameter]) -> bool:
        """Whether it would be the same, computed now.

        The prompt is compared by its numbers: fused optimisers and changes through `.data` do not count in a tensor's
        version. The model's weights are too many for that. Layers that get adapters meanwhile get weights, too.
        """
        return (
            self.state == state
            and _equal(self.sources, sources)
            and len(self.weights) == len(weights)
            and all(before is now for before, now in zip(self.weights, weights, strict=True))
            and self.versions == _versions(weights)
            and self.switched == _switched(self.adapted)
        )


def _versions(weights: list[nn.Parameter]) -> list[int]:
    return [0 if one.is_inference() else one._version for one in weights]


def _switched(adapted: list[Any]) -> list[Any]:
    """Which adapters each layer applies: with none of its weights changed, it computes something else."""
    return [(one.disable_adapters, [*one.active_adapters], [*one.merged_adapters]) for one in adapted]


def _equal(before: list[Tensor], now: list[Tensor]) -> bool:
    """The host waits for each device once: every token of a text that is written asks."""
    if [(x.device, x.dtype, x.shape) for x in before] != [(x.device, x.dtype, x.shape) for x in now]:
        return False
    same: dict[torch.device, list[Tensor]] = {}
    for x, y in zip(before, now, strict=True):
        same.setdefault(x.device, []).append((x == y).all())
    return all(bool(torch.stack(found).all()) for found in same.values())
