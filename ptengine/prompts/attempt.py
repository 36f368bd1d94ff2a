"""ATTEMPT, attentional mixtures of prompts (Asai et al. 2022, arXiv 2205.11961): every row mixes the source prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_number, check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts
from ptengine.prompts.initialization import Initial, generator_from
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import fill_like_torch
from ptengine.prompts.soft_prompt import SoftPrompt
from ptengine.prompts.text_dependent import TextDependentPrompt, largest_elements

__all__ = ["AttemptPrompt"]

RANK = 100  # of the authors' code
_T5_STD = 10.7  # of T5-base's word embeddings, whose temperature of e * 768 the paper tells


@register("attempt_prompt")
class AttemptPrompt(TextDependentPrompt):
    """P(X) = P_t + sum_j a_j P_j over frozen source prompts and the target's own, P_t itself; a depends on the text X.

    a = softmax_j(max(P_j) . H / T), H = LN(W_up SiLU(W_down max(X))), where max takes the largest of each of the d
    elements over the tokens. H has the scale of its layer norm and P_j that of the word embeddings, so the default T is
    e * d, as the paper's, times the standard deviation of the model's embeddings relative to T5-base's. Trained are
    P_t, W and LN; the sources are kept in the file.

    Args:
        model: the frozen transformers model; read once, not kept.
        sources: the source prompts, at least one, all of P tokens: prompts of the same backbone that are or fold to a
            `SoftPrompt`, or directories of saved ones.
        init: where P_t starts, as in `SoftPrompt`; ``"prompt"`` to start from one of the sources, as in the paper.
        rank: rows of W_down; 100 as in the authors' code.
        temperature: T, above 0.
        network_rate_factor: above 0; W and LN learn at this many times the learning rate, P_t at the rate itself.
        init_text, class_labels, array, prompt, tokenizer: as in `SoftPrompt`.
        seed: of P_t and W.

    Attributes:
        embeds: P_t, fp32 [P, d].
        sources: P_1 .. P_J, fp32 [J, P, d], not trained.
        down, up: W_down and W_up, linear layers of d to r and r to d without bias, fp32.
        norm: LN, fp32.

    Raises:
        InputError: an argument has the wrong type or range, is missing, or would be ignored; the sources differ in
            length or are of another backbone.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_sources", "rank", "temperature", "network_rate_factor")
    NETWORK: ClassVar[tuple[str, ...]] = ("down.", "up.", "norm.")

    embeds: nn.Parameter
    sources: Tensor
    down: nn.Linear
    up: nn.Linear
    norm: nn.LayerNorm

    def __init__(
        self,
        model: Any,
        sources: Sequence[Prompt | str | os.PathLike[str]],
        init: str = "sampled_vocab",
        *,
        rank: int = RANK,
        temperature: float | None = None,
        network_rate_factor: float = 0.1,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        rows = _source_rows(model, sources)  # [J, P, d]
        start = SoftPrompt(
            model, rows.shape[1], init, init_text=init_text, class_labels=class_labels, array=array,
            prompt=prompt, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        facts = start.facts
        if temperature is None:
            temperature = math.e * facts.hidden_size * facts.embedding_std / _T5_STD
        settings = {
            "num_sources": len(rows), "rank": rank, "temperature": temperature,
            "network_rate_factor": network_rate_factor,
        }  # fmt: skip
        self.check_settings(facts, settings)
        super().__init__(facts, start.num_virtual_tokens, settings)
        fill_like_torch(self, generator_from(seed))
        with torch.no_grad():
            self.embeds.copy_(start.embeds)
            self.sources.copy_(rows)
        self._finish(backbone_spec(model), init)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        super().check_settings(facts, settings)
        for name in ("num_sources", "rank"):
            check_whole(name, settings[name])
        check_number("temperature", settings["temperature"])

    def _build(self) -> None:
        count, width, rank = self.num_virtual_tokens, self.facts.hidden_size, self.settings["rank"]
        self.embeds = nn.Parameter(torch.empty(count, width))  # [P, d]
        self.register_buffer("sources", torch.empty(self.settings["num_sources"], count, width))  # [J, P, d]
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def attention(self, texts: Tensor, lengths: Tensor) -> Tensor:
        """a, fp32 [B, J + 1], the target's own prompt last; arguments as in `virtual_tokens`."""
        query = self.norm(self.up(F.silu(self.down(largest_elements(texts, lengths)))))  # [B, d]
        scores = query @ self._all().amax(1).T  # [B, J + 1]
        return (scores / self.settings["temperature"]).softmax(-1)

    def virtual_tokens(self, texts: Tensor, lengths: Tensor) -> Tensor:
        shares = self.attention(texts, lengths)  # [B, J + 1]
        return self.embeds + torch.einsum("bj,jpd->bpd", shares, self._all())

    def _all(self) -> Tensor:
        return torch.cat([self.sources, self.embeds[None]])  # [J + 1, P, d]


def _source_rows(model: Any, sources: Any) -> Tensor:
    if isinstance(sources, str | os.PathLike | Prompt) or not isinstance(sources, Sequence) or not sources:
        raise InputError(f"expected sources, a list of at least one prompt or directory, got {sources!r}")
    rows = [SoftPrompt(model, init="prompt", prompt=source).embeds.detach() for source in sources]  # J of [P, d]
    counts = [len(own) for own in rows]
    if len(set(counts)) > 1:
        raise InputError(f"expected sources of one num_virtual_tokens, got {counts}")
    return torch.stack(rows)
