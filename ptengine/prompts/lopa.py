"""LoPA, low-rank prompt adaptation (Jain et al. 2024, arXiv 2405.15282): a shared prompt behind a gate of the text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import Initial, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import fill_like_torch
from ptengine.prompts.soft_prompt import SoftPrompt
from ptengine.prompts.text_dependent import TextDependentPrompt, mean_token

__all__ = ["LoPAPrompt"]


@register("lopa_prompt")
class LoPAPrompt(TextDependentPrompt):
    """P(X) = S * sigmoid(U(X) V(X)): a shared prompt S [P, d] times, element by element, a low-rank gate of the text X.

    c = GELU(W_down mean(X) + b_down) in R^h; U = W_left c + b_left as [P, r] and V = W_right c + b_right as [r, d]. The
    paper reads X with a second pretrained encoder; here it is the mean of the frozen model's own word embeddings. V
    starts at zero, so every gate starts at 1/2, and S at twice the rows of `init`: at first every row has the prompt
    that a `SoftPrompt` of the same `init` is.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds.
        init: where the prompt starts, as in `SoftPrompt`.
        rank: r.
        bottleneck_size: h.
        network_rate_factor: above 0; W and b learn at this many times the learning rate, S at the rate itself.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of the prompt's start and of W and b.

    Attributes:
        shared: S, fp32 [P, d].
        down, left, right: linear layers of d to h, h to P*r and h to r*d, fp32.

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("rank", "bottleneck_size", "network_rate_factor")
    NETWORK: ClassVar[tuple[str, ...]] = ("down.", "left.", "right.")

    shared: nn.Parameter
    down: nn.Linear
    left: nn.Linear
    right: nn.Linear

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "sampled_vocab",
        *,
        rank: int = 4,
        bottleneck_size: int = 64,
        network_rate_factor: float = 0.1,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        start = SoftPrompt(
            model, num_virtual_tokens, init, init_text=init_text, class_labels=class_labels, array=array,
            prompt=prompt, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        settings = {"rank": rank, "bottleneck_size": bottleneck_size, "network_rate_factor": network_rate_factor}
        self.check_settings(start.facts, settings)
        super().__init__(start.facts, start.num_virtual_tokens, settings)
        fill_like_torch(self, generator_from(seed))
        with torch.no_grad():
            self.shared.copy_(2 * start.embeds)
            self.right.weight.zero_()
            self.right.bias.zero_()
        self._finish(backbone_spec(model), init)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        super().check_settings(facts, settings)
        for name in ("rank", "bottleneck_size"):
            check_whole(name, settings[name])

    def _build(self) -> None:
        count, width = self.num_virtual_tokens, self.facts.hidden_size
        rank, size = self.settings["rank"], self.settings["bottleneck_size"]
        self.shared = nn.Parameter(torch.empty(count, width))  # [P, d]
        self.down = nn.Linear(width, size)
        self.left = nn.Linear(size, count * rank)
        self.right = nn.Linear(size, rank * width)

    def virtual_tokens(self, texts: Tensor, lengths: Tensor) -> Tensor:
        rank = self.settings["rank"]
        code = F.gelu(self.down(mean_token(texts, lengths)))  # [B, h]
        left = self.left(code).unflatten(-1, (-1, rank))  # [B, P, r]
        right = self.right(code).unflatten(-1, (rank, -1))  # [B, r, d]
        return self.shared * torch.sigmoid(left @ right)  # [B, P, d]
