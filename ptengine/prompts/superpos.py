"""SuperPos-Prompt (Sadraei Javaheri et al. 2024, arXiv 2406.05279): virtual tokens as sums of word embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_flags, check_whole
from ptengine.errors import InputError
from ptengine.prompts.facts import BackboneFacts, backbone_facts, embedding_scale
from ptengine.prompts.initialization import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    check_count,
    generator_from,
    sampled_vocabulary_ids,
)
from ptengine.prompts.registry import register
from ptengine.prompts.reparametrized import Reparametrized

__all__ = ["SuperPosPrompt"]

NUM_SAMPLED_TOKENS = 128  # beyond about 128 the paper sees no further gain


@register("superpos_prompt")
class SuperPosPrompt(Reparametrized):
    """p_i = sum_j w_ij e_j: every virtual token is a weighted sum of the embeddings E = e_1 .. e_m of m sampled tokens.

    The weights have no softmax over them and may be negative. All virtual tokens share the m tokens. The weights start
    normal with mean 0 and standard deviation 1/sqrt(m), which gives virtual tokens the mean square of word embeddings;
    the tokens are drawn as ``init="sampled_vocab"`` of `SoftPrompt` draws them. `fold` (and so `save`) keeps the
    virtual tokens alone.

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model; None means 20.
        num_sampled_tokens: m; 128 as in the paper, or the whole vocabulary where that is smaller.
        train_embeddings: train the m embeddings, too. Leave weight decay at zero then: it shrinks them.
        tokenizer: names the special tokens, which are not sampled (else the model's configuration does).
        seed: of the tokens and the weights.

    Attributes:
        weights: W, fp32 [P, m].
        words: E, fp32 [m, d]; a parameter, which requires a gradient with `train_embeddings` only.

    Raises:
        InputError: an argument has the wrong type or range.
        UnsupportedModelError: the model is of no supported type.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_sampled_tokens", "train_embeddings")

    weights: nn.Parameter
    words: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        *,
        num_sampled_tokens: int | None = None,
        train_embeddings: bool = False,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
        generator, facts = generator_from(seed), backbone_facts(model)
        sampled = min(NUM_SAMPLED_TOKENS, spec.vocab_size) if num_sampled_tokens is None else num_sampled_tokens
        settings = {"num_sampled_tokens": sampled, "train_embeddings": train_embeddings}
        self.check_settings(facts, settings)
        ids = sampled_vocabulary_ids(model, tokenizer, sampled, spec, generator)  # [m]
        table = spec.word_embeddings.weight.detach()  # [V, d]
        super().__init__(facts, count, settings)
        with torch.no_grad():
            self.words.copy_(table[ids.to(table.device)] * embedding_scale(spec))
            self.weights.copy_(torch.randn(self.weights.shape, generator=generator) / math.sqrt(sampled))
        self._finish(spec)

    @classmethod
    def check_settings(cls, facts: BackboneFacts, settings: Mapping[str, Any]) -> None:
        sampled, trained = settings["num_sampled_tokens"], settings["train_embeddings"]
        if check_whole("num_sampled_tokens", sampled) > facts.vocab_size:
            raise InputError(
                f"expected num_sampled_tokens of at most {facts.vocab_size}, the vocabulary, got {sampled}"
            )
        check_flags(train_embeddings=trained)

    def _build(self) -> None:
        sampled, width = self.settings["num_sampled_tokens"], self.facts.hidden_size
        self.weights = nn.Parameter(torch.empty(self.num_virtual_tokens, sampled))  # [P, m]
        self.words = nn.Parameter(
            torch.empty(sampled, width), requires_grad=self.settings["train_embeddings"]
        )  # [m, d]

    def compute(self) -> Tensor:
        return self.weights @ self.words  # [P, d]
