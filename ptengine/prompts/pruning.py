"""XPrompt (Ma et al. 2022, arXiv 2210.04457): a trained soft prompt without the tokens and pieces that do not help.

What to keep is decided by scores; `ptengine.training.prompt_importance` measures them. Knows no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized
from ptengine.prompts.soft_prompt import SoftPrompt

__all__ = ["PrunedPrompt", "prune_pieces", "prune_tokens"]


@register("pruned_prompt")
class PrunedPrompt(Reparametrized):
    """E = P * mask: virtual tokens whose d elements fall into k pieces, some of which are zero and stay so.

    Made by `prune_pieces`; trained on as any other prompt ("rewinding" in the paper). `fold` (and so `save`) keeps E.

    Args:
        prompt: a `SoftPrompt`, whose numbers are taken.
        pieces: bool [P, k], which pieces are kept; k divides d.

    Attributes:
        embeds: P, fp32 [P, d].
        mask: fp32 [P, k], 1 for a piece that is kept and 0 for one that is not; not trained.

    Raises:
        InputError: `prompt` is no `SoftPrompt`, or `pieces` has another shape, or keeps nothing.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_pieces",)

    embeds: nn.Parameter
    mask: Tensor

    def __init__(self, prompt: SoftPrompt, pieces: Tensor) -> None:
        _require_soft(prompt)
        if not isinstance(pieces, Tensor) or pieces.dtype != torch.bool or pieces.dim() != 2:
            got = f"{pieces.dtype} {list(pieces.shape)}" if isinstance(pieces, Tensor) else type(pieces).__name__
            raise InputError(f"expected pieces, a bool tensor [P, k], got {got}")
        if len(pieces) != prompt.num_virtual_tokens or not bool(pieces.any()):
            raise InputError(
                f"expected pieces of {prompt.num_virtual_tokens} virtual tokens, at least one kept, got "
                f"{len(pieces)} with {int(pieces.sum())} kept"
            )
        settings = {"num_pieces": pieces.shape[1]}
        self.check_settings(prompt.facts, settings)
        super().__init__(prompt.facts, prompt.num_virtual_tokens, settings)
        with torch.no_grad():
            self.mask.copy_(pieces)
            self.embeds.copy_(prompt.embeds)
            self.embeds.copy_(self.compute())
        self._rate = prompt.default_learning_rate()
        self.to(prompt.embeds.device)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        pieces = check_whole("num_pieces", settings["num_pieces"])
        if facts.hidden_size % pieces:
            raise InputError(f"expected num_pieces that divides the model's width {facts.hidden_size}, got {pieces}")

    def _build(self) -> None:
        self.embeds = nn.Parameter(torch.empty(self.num_virtual_tokens, self.facts.hidden_size))  # [P, d]
        self.register_buffer("mask", torch.empty(self.num_virtual_tokens, self.settings["num_pieces"]))  # [P, k]

    def default_learning_rate(self) -> float:
        """That of the prompt that was pruned."""
        return super().default_learning_rate()

    def compute(self) -> Tensor:
        width = self.facts.hidden_size // self.settings["num_pieces"]
        return self.embeds * self.mask.repeat_interleave(width, dim=1)  # [P, d]


def prune_tokens(prompt: SoftPrompt, scores: Tensor, keep: int, *, rewind_to: SoftPrompt | None = None) -> SoftPrompt:
    """`prompt` with its `keep` most important virtual tokens, in their order (the paper's token level).

    Args:
        prompt: the trained prompt.
        scores: [P], higher is more important; ties are decided for the earlier token.
        keep: how many to keep, from 1 to P.
        rewind_to: take the kept tokens' numbers from this earlier state of the prompt, of the same P.

    Raises:
        InputError: the scores are not P finite numbers, `keep` is out of range, or `rewind_to` is of another length.
    """
    _require_soft(prompt)
    count = prompt.num_virtual_tokens
    _check_scores(scores, (count,))
    if check_whole("keep", keep) > count:
        raise InputError(f"expected keep of at most the prompt's {count} virtual tokens, got {keep}")
    source = _rewound(prompt, rewind_to)
    best = scores.argsort(descending=True, stable=True)[:keep].sort().values  # [keep]
    pruned = SoftPrompt.empty(prompt.facts, {"num_virtual_tokens": keep, "init": "prompt"})
    pruned.embeds = nn.Parameter(source.embeds.detach()[best.to(source.embeds.device)].clone())
    return pruned


def prune_pieces(prompt: SoftPrompt, scores: Tensor, keep: int, *, rewind_to: SoftPrompt | None = None) -> PrunedPrompt:
    """`prompt` with its `keep` most important pieces, over all virtual tokens; the others are zero (piece level).

    Args:
        prompt: the trained prompt, usually after `prune_tokens`.
        scores: [P, k], higher is more important; ties are decided for the earlier piece.
        keep: how many to keep, from 1 to P*k.
        rewind_to: take the kept pieces' numbers from this earlier state of the prompt, of the same P.

    Raises:
        InputError: as `prune_tokens`; k does not divide the model's width.
    """
    _require_soft(prompt)
    shape = (prompt.num_virtual_tokens, scores.shape[1] if isinstance(scores, Tensor) and scores.dim() == 2 else 1)
    _check_scores(scores, shape)
    if check_whole("keep", keep) > scores.numel():
        raise InputError(f"expected keep of at most the prompt's {scores.numel()} pieces, got {keep}")
    best = scores.flatten().argsort(descending=True, stable=True)[:keep]
    pieces = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    pieces[best] = True
    return PrunedPrompt(_rewound(prompt, rewind_to), pieces.view(shape))


def _rewound(prompt: SoftPrompt, rewind_to: SoftPrompt | None) -> SoftPrompt:
    if rewind_to is None:
        return prompt
    _require_soft(rewind_to)
    prompt.facts.require_same(rewind_to.facts, "the prompt to prune")
    if rewind_to.num_virtual_tokens != prompt.num_virtual_tokens:
        raise InputError(
            f"expected rewind_to of the prompt's {prompt.num_virtual_tokens} virtual tokens, got "
            f"{rewind_to.num_virtual_tokens}"
        )
    return rewind_to


def _require_soft(prompt: Any) -> None:
    if not isinstance(prompt, SoftPrompt):
        raise InputError(f"expected a SoftPrompt (fold other methods first), got {type(prompt).__name__}")


def _check_scores(scores: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape or not bool(scores.isfinite().all()):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"expected scores, a tensor of finite numbers {list(shape)}, got {got}")
