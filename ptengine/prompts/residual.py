"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): a shallow network with a skip connection."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_number, check_whole
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import RATE, Initial, generator_from, is_trained
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized, fill_like_torch
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = ["ResidualPrompt"]

# Of the authors' published training script.
BOTTLENECK_SIZE = 800


@register("residual_prompt")
class ResidualPrompt(Reparametrized):
    """P' = P + LayerNorm(W_up ReLU(W_down P + b_down) + b_up), one network for all virtual tokens.

    P, both layers and the normalisation are trained; `fold` (and so `save`) keeps P' alone. The start is the authors':
    P from sampled vocabulary, layers as PyTorch starts them, the normalisation's weight one and bias zero.

    Mind the last: at that start the network adds numbers of standard deviation 1 to embeddings. T5's have a standard
    deviation of about 10, those of most other models of 0.02 to 0.2, whose prompts then start far from every word.
    `layer_norm_init` of a tenth of `facts.embedding_std` starts them as near as in the paper.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds.
        init: where P comes from, as in `SoftPrompt`.
        bottleneck_size: rows of W_down; 800 as in the authors' code.
        layer_norm_init: what the normalisation's weight starts from; 1 as in the paper.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of P and of the network.

    Attributes:
        embeds: P, fp32 [P, d].
        down, up, norm: the network.

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("bottleneck_size",)

    embeds: nn.Parameter
    down: nn.Linear
    up: nn.Linear
    norm: nn.LayerNorm

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "sampled_vocab",
        *,
        bottleneck_size: int = BOTTLENECK_SIZE,
        layer_norm_init: float = 1.0,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        check_number("layer_norm_init", layer_norm_init)
        settings = {"bottleneck_size": check_whole("bottleneck_size", bottleneck_size)}
        start = SoftPrompt(
            model, num_virtual_tokens, init, init_text=init_text, class_labels=class_labels, array=array,
            prompt=prompt, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        super().__init__(start.facts, start.num_virtual_tokens, settings)
        fill_like_torch(self, generator_from(seed))
        with torch.no_grad():
            self.embeds.copy_(start.embeds)
            self.norm.weight.fill_(layer_norm_init)
        rate = RATE * self.facts.embedding_std
        self._finish(backbone_spec(model), transferred=is_trained(init), rate=rate)

    def default_learning_rate(self) -> float:
        """That of a `SoftPrompt` for all parameters, as in the paper: 0.3 of the embeddings' standard deviation.

        The normalisation bounds what the network's weights can do, however far a step moves them.
        """
        return super().default_learning_rate()

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        check_whole("bottleneck_size", settings["bottleneck_size"])

    def _build(self) -> None:
        width, size = self.facts.hidden_size, self.settings["bottleneck_size"]
        self.embeds = nn.Parameter(torch.empty(self.num_virtual_tokens, width))  # [P, d]
        self.down, self.up, self.norm = nn.Linear(width, size), nn.Linear(size, width), nn.LayerNorm(width)

    def compute(self) -> Tensor:
        hidden = torch.relu(self.down(self.embeds))  # [P, m]
        return self.embeds + self.norm(self.up(hidden))  # [P, d]
