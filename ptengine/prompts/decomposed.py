"""DePT, decomposed prompt tuning (Shi, Lipani 2024, arXiv 2309.05173): a short prompt and offsets of the text."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_number, check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import RATE, Initial, generator_from, is_trained
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = ["DecomposedPrompt"]

# Of the authors' code.
MAX_LENGTH, RANK, ALPHA = 256, 45, 8.0


@register("decomposed_prompt")
class DecomposedPrompt(Reparametrized):
    """[P; X + (alpha / sqrt(r)) A B]: virtual tokens P [P, d], and a low-rank offset of the text's own embeddings X.

    Row i of A [S, r] B [r, d] is added to the embedding of the text's token i, whatever token that is, in training,
    evaluation, generation and attached calls alike. A starts uniform within 1/sqrt(r) (the authors' Kaiming start), B
    at zero, so at first nothing is added. P and the pair learn at different rates: `offset_rate_factor` times the
    learning rate is that of A and B.

    `fold` is a copy: the offsets stand beside the text and cannot become virtual tokens. A text, new tokens included,
    has at most S tokens.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds; 40 in the paper.
        init: where P comes from, as in `SoftPrompt`.
        max_length: S; None means 256, or what the positions of the model leave beside P where that is less.
        rank: r; 45 as in the paper.
        alpha: alpha; 8 as in the authors' code.
        offset_rate_factor: above 0. The paper's rates are 0.3 to 0.4 for P and 5e-4 to 0.3 for A and B: search it.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of P and A.

    Attributes:
        embeds: P, fp32 [P, d].
        left, right: A, fp32 [S, r], and B, fp32 [r, d].

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("max_length", "rank", "alpha", "offset_rate_factor")

    embeds: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "sampled_vocab",
        *,
        max_length: int | None = None,
        rank: int = RANK,
        alpha: float = ALPHA,
        offset_rate_factor: float = 0.1,
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
        spec = backbone_spec(model)
        room = spec.max_positions - start.num_virtual_tokens
        length = min(MAX_LENGTH, room) if max_length is None else check_whole("max_length", max_length)
        if length > room:
            raise InputError(
                f"expected max_length of at most {room}, the {spec.max_positions} positions of the model minus "
                f"{start.num_virtual_tokens} virtual tokens, got {length}"
            )
        settings = {"max_length": length, "rank": rank, "alpha": alpha, "offset_rate_factor": offset_rate_factor}
        self.check_settings(start.facts, settings)
        super().__init__(start.facts, start.num_virtual_tokens, settings)
        with torch.no_grad():
            self.embeds.copy_(start.embeds)
            nn.init.uniform_(self.left, -1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator_from(seed))
        self._finish(spec, transferred=is_trained(init), rate=RATE * self.facts.embedding_std)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        for name in ("max_length", "rank"):
            check_whole(name, settings[name])
        for name in ("alpha", "offset_rate_factor"):
            check_number(name, settings[name])

    def _build(self) -> None:
        length, rank, width = self.settings["max_length"], self.settings["rank"], self.facts.hidden_size
        self.embeds = nn.Parameter(torch.empty(self.num_virtual_tokens, width))  # [P, d]
        self.left = nn.Parameter(torch.empty(length, rank))  # [S, r]
        self.right = nn.Parameter(torch.empty(rank, width))  # [r, d]
        self.max_text_length = length

    def compute(self) -> Tensor:
        return self.embeds

    def offsets(self) -> Tensor:
        """What is added to the text's embeddings, by position: [S, d]."""
        return (self.settings["alpha"] / math.sqrt(self.settings["rank"])) * (self.left @ self.right)

    def lower(self) -> VirtualTokens:
        with torch.autocast(self.embeds.device.type, enabled=False):
            return VirtualTokens(self.embeds, self.offsets())

    def fold(self) -> Self:
        """A copy that shares no memory with this prompt."""
        return copy.deepcopy(self)

    def learning_rate_factors(self) -> dict[str, float]:
        factor = float(self.settings["offset_rate_factor"])
        return {"left": factor, "right": factor}

    def default_learning_rate(self) -> float:
        """That of a `SoftPrompt`, for P: 0.3 of the standard deviation of the embeddings; see `offset_rate_factor`."""
        return super().default_learning_rate()
