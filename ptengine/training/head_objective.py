"""What objectives with a trained head share: the encoder runs first, then a head, the model's own or the prompt's.

Knows the patched encoder and prompts; no task.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ptengine.backbone import encoder_hidden
from ptengine.backbone.lowering import LoweredPrompt
from ptengine.backbone.packing import PackedBatch
from ptengine.prompts.base import Prompt
from ptengine.prompts.headed import HeadedPrompt
from ptengine.training.objective_base import BaseObjective, lower

__all__ = ["Head", "HeadObjective", "own_head"]

Head = Mapping[str, nn.Parameter] | None


def own_head(prompt: Prompt | None) -> Head:
    """The weights that stand in for those of the model's head; None where the model's own count."""
    return prompt.head_weights() if isinstance(prompt, HeadedPrompt) else None


class HeadObjective(BaseObjective):
    """A loss of the last hidden states behind a head. One forward may give those of several prompts' rows."""

    def loss(self, prompt: Prompt | None, batch: PackedBatch, label_smoothing: float) -> Tensor:
        return self.loss_of(self._hidden(lower(prompt), batch), batch, own_head(prompt), label_smoothing)

    def loss_of(self, hidden: Tensor, batch: PackedBatch, head: Head, label_smoothing: float) -> Tensor:
        """Mean loss of the batch, whose last hidden states are `hidden` [N, d]; as `Objective.loss`."""
        raise NotImplementedError

    def _hidden(self, lowered: LoweredPrompt | None, batch: PackedBatch) -> Tensor:
        """Last hidden states [N, d] of the texts."""
        with self._autocast():
            return encoder_hidden(self._model, lowered, batch)
