"""SMoP, sparse mixture of prompts (Choi et al. 2023, ACL Anthology 2023.emnlp-main.884): one of E prompts a row."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import TextDependentTokens
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import Initial, generator_from, is_trained
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import fold_rows
from ptengine.prompts.soft_prompt import SoftPrompt
from ptengine.prompts.text_dependent import TextDependentPrompt, mean_token

__all__ = ["MixturePrompt"]

# Of the paper: four prompts of five tokens.
NUM_EXPERTS, NUM_VIRTUAL_TOKENS = 4, 5


@register("mixture_prompt")
class MixturePrompt(TextDependentPrompt):
    """P(X) = p_i P_i with i = argmax p, p = softmax(z), z = R mean(X): the one of E prompts that a router picks.

    R [E, d] reads the mean of the text's word embeddings, and learns through the factor p_i. In training mode z is
    perturbed, z * (1 + e) with e standard normal, so that every prompt gets its rows; the factor z of e counts as a
    constant, as in the authors' code, whose other option, a load-balancing loss, is not part of this. e is drawn on the
    CPU from a generator that each `lower` seeds with a number from PyTorch's global one.

    With one expert nothing depends on the text, and `fold` gives that `SoftPrompt`; with several it is a copy.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P of each prompt, from 1 to one less than the positions of the model. None means 5, or as
            many as `array` or `prompt` holds.
        init: where each prompt starts, as in `SoftPrompt`: with ``"random"``, ``"sampled_vocab"`` and the free tokens
            of ``"class_labels"`` each with other numbers, else all with the same.
        num_experts: E.
        network_rate_factor: above 0; R learns at this many times the learning rate, the prompts at the rate itself.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of the prompts and of R, which starts orthogonal.

    Attributes:
        experts: P_1 .. P_E, fp32 [E, P, d].
        router: R, fp32 [E, d].

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_experts", "network_rate_factor")
    NETWORK: ClassVar[tuple[str, ...]] = ("router",)

    experts: nn.Parameter
    router: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "sampled_vocab",
        *,
        num_experts: int = NUM_EXPERTS,
        network_rate_factor: float = 0.1,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        generator = generator_from(seed)
        check_whole("num_experts", num_experts)
        if num_virtual_tokens is None and not is_trained(init):
            num_virtual_tokens = NUM_VIRTUAL_TOKENS
        starts = [
            SoftPrompt(
                model, num_virtual_tokens, init, init_text=init_text, class_labels=class_labels, array=array,
                prompt=prompt, tokenizer=tokenizer, seed=(seed * num_experts + expert) % 2**63,
            )
            for expert in range(num_experts)
        ]  # fmt: skip
        settings = {"num_experts": num_experts, "network_rate_factor": network_rate_factor}
        self.check_settings(starts[0].facts, settings)
        super().__init__(starts[0].facts, starts[0].num_virtual_tokens, settings)
        with torch.no_grad():
            self.experts.copy_(torch.stack([start.embeds for start in starts]))
            nn.init.orthogonal_(self.router, generator=generator)
        self._finish(backbone_spec(model), init)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        super().check_settings(facts, settings)
        check_whole("num_experts", settings["num_experts"])

    def _build(self) -> None:
        experts, width = self.settings["num_experts"], self.facts.hidden_size
        self.experts = nn.Parameter(torch.empty(experts, self.num_virtual_tokens, width))  # [E, P, d]
        self.router = nn.Parameter(torch.empty(experts, width))  # [E, d]

    def lower(self) -> TextDependentTokens:
        noise = None
        if self.training:
            # Drawn where the run's generators are in place; a shared backward pass computes the rows elsewhere.
            noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))

        def of_texts(texts: Tensor, lengths: Tensor) -> Tensor:
            return self._picked(self.probabilities(texts.to(self.router), lengths, noise))

        return TextDependentTokens(self.num_virtual_tokens, of_texts)

    def fold(self) -> Prompt:
        if self.settings["num_experts"] == 1:
            return fold_rows(self.facts, self.experts[0])
        return self._copy()

    def probabilities(self, texts: Tensor, lengths: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """p, fp32 [B, E]; `texts` and `lengths` as in `virtual_tokens`, `noise` what the perturbation comes from."""
        scores = mean_token(texts, lengths) @ self.router.T  # [B, E]
        if noise is not None:
            drawn = torch.randn(scores.shape, generator=noise).to(scores)  # [B, E]
            scores = scores + scores.detach() * drawn
        return scores.softmax(-1)

    def virtual_tokens(self, texts: Tensor, lengths: Tensor) -> Tensor:
        return self._picked(self.probabilities(texts, lengths))

    def _picked(self, probabilities: Tensor) -> Tensor:
        highest, expert = probabilities.max(-1)  # [B], [B]
        return self.experts[expert] * highest[:, None, None]  # [B, P, d]
