"""ULPT (Wu, Hao, Mou 2025, arXiv 2502.04501): a prompt of a few numbers per token behind a frozen random projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import DEFAULT_NUM_VIRTUAL_TOKENS, check_count, check_seed, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized

__all__ = ["ULPTPrompt"]


@register("ulpt_prompt")
class ULPTPrompt(Reparametrized):
    """E = (Z R) * s + b: trained codes Z [P, r], a frozen random R [r, d], a trained scale s [d] and shift b [d].

    P*r + 2d numbers are trained, P*d virtual-token elements come out. R is not stored: it is drawn from
    `projection_seed`, which is. The start is that of the authors' code: Z standard normal, R uniform within
    sqrt(6 / (r + d)) (Glorot's bound), s one, b zero. `fold` (and so `save`) keeps E alone.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model; None means 20.
        rank: r; 2 as in the authors' code (larger ones, such as 64, are the paper's best).
        projection_seed: of R; None means `seed`. Prompts that share it differ in P*r + 2d numbers only.
        seed: of Z.

    Attributes:
        codes: Z, fp32 [P, r].
        scale, shift: s and b, fp32 [d].

    Raises:
        InputError: an argument has the wrong type or range.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("rank", "projection_seed")

    codes: nn.Parameter
    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        *,
        rank: int = 2,
        projection_seed: int | None = None,
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
        generator, facts = generator_from(seed), backbone_facts(model)
        settings = {"rank": rank, "projection_seed": seed if projection_seed is None else projection_seed}
        self.check_settings(facts, settings)
        super().__init__(facts, count, settings)
        with torch.no_grad():
            self.codes.copy_(torch.randn(self.codes.shape, generator=generator))
            self.scale.fill_(1)
        self._finish(spec)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        check_whole("rank", settings["rank"])
        check_seed("projection_seed", settings["projection_seed"])

    def _build(self) -> None:
        self.codes = nn.Parameter(torch.empty(self.num_virtual_tokens, self.settings["rank"]))  # [P, r]
        self.scale = nn.Parameter(torch.empty(self.facts.hidden_size))  # [d]
        self.shift = nn.Parameter(torch.empty(self.facts.hidden_size))  # [d]
        self._drawn: Tensor | None = None

    def compute(self) -> Tensor:
        return self.codes @ self._projection() * self.scale + self.shift  # [P, d]

    def _projection(self) -> Tensor:
        """R [r, d], drawn on the CPU once and kept where the codes are."""
        drawn = self._drawn
        if drawn is None or drawn.device != self.codes.device or drawn.dtype != self.codes.dtype:
            rank, width = self.settings["rank"], self.facts.hidden_size
            bound = math.sqrt(6 / (rank + width))
            # Another stream than that of Z, which may come from the same seed.
            generator = torch.Generator().manual_seed(self.settings["projection_seed"] ^ 0x5EED)
            # Kept, so no tensor of inference mode, which training could not save for its backward pass.
            with torch.device("cpu"), torch.inference_mode(False):
                drawn = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
                self._drawn = drawn = drawn.to(self.codes)
        return drawn
