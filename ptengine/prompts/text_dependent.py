"""What prompts share whose virtual tokens depend on the text: lowering, folding, the networks' rate, pooled texts.

A method of this kind says how virtual tokens come out of its parameters and the embeddings of a text
(`virtual_tokens`). It sees a row's input alone, never its target: `ptengine.backbone.text_dependent` sees to that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ptengine.backbone.lowering import TextDependentTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.checks import check_number
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import RATE, is_trained
from ptengine.prompts.reparametrized import Parametrized

__all__ = ["TextDependentPrompt", "largest_elements", "mean_token"]


class TextDependentPrompt(Parametrized):
    """Base class of prompts that give every row of a batch virtual tokens of its own, by the row's input.

    Trainer, PromptSet, `evaluate` and `generate` take them as any other prompt: a batch of B rows runs B prompts of P
    tokens. The input is what stands before the first label of a causal model's row, an encoder-decoder's source, and
    the whole row of an encoder. A stock call does not tell input from target, so `attached` is refused, as is what
    needs one prompt for all texts: export to other libraries, similarity, anchors, importance.
    """

    NETWORK: ClassVar[tuple[str, ...]] = ()
    """Parameters that read the text, and learn at `network_rate_factor` times the rate of the virtual tokens."""

    def virtual_tokens(self, texts: Tensor, lengths: Tensor) -> Tensor:
        """The rows' virtual tokens [B, P, d], differentiable with respect to every trainable parameter.

        Args:
            texts: the frozen model's input embeddings of B texts, fp32 [B, T, d], zero behind a text's end.
            lengths: of the texts, int64 [B], at least 1.
        """
        raise NotImplementedError

    def lower(self) -> TextDependentTokens:
        def of_texts(texts: Tensor, lengths: Tensor) -> Tensor:
            return self.virtual_tokens(texts.to(next(self.parameters())), lengths)

        return TextDependentTokens(self.num_virtual_tokens, of_texts)

    def fold(self) -> Any:
        """A copy that shares no memory with this prompt: its virtual tokens are known only with a text."""
        return self._copy()

    def learning_rate_factors(self) -> dict[str, float]:
        factor = float(self.settings["network_rate_factor"])
        return {name: factor for name, _ in self.named_parameters() if name.startswith(self.NETWORK)}

    def default_learning_rate(self) -> float:
        """That of a `SoftPrompt`, for the virtual tokens: 0.3 of the embeddings' deviation; networks have a factor."""
        return super().default_learning_rate()

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        check_number("network_rate_factor", settings["network_rate_factor"])

    def _copy(self) -> Self:
        return copy.deepcopy(self)

    def _finish(self, spec: BackboneSpec, init: str) -> None:
        self._settle(spec, RATE * self.facts.embedding_std, transferred=is_trained(init))


def mean_token(texts: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each text's embeddings: [B, T, d], zero behind the texts, int64 [B] -> [B, d]."""
    return texts.sum(1) / lengths[:, None].to(texts)


def largest_elements(texts: Tensor, lengths: Tensor) -> Tensor:
    """The largest of each of the d elements over a text: [B, T, d], int64 [B] -> [B, d]."""
    inside = torch.arange(texts.shape[1], device=texts.device) < lengths[:, None]  # [B, T]
    return texts.masked_fill(~inside[..., None], -torch.inf).amax(1)
