"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): P input embeddings before the text."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import VirtualTokens
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.checks import is_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts, embedding_scale
from ptengine.prompts.initialization import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    RATE,
    Initial,
    check_count,
    check_init,
    generator_from,
    is_trained,
    label_ids,
    rate_factor,
    read_array,
    refuse_unused,
    sampled_vocabulary_ids,
    text_ids,
)
from ptengine.prompts.io import load_prompt
from ptengine.prompts.registry import register

__all__ = ["SoftPrompt", "checked_config"]

INITS = ("random", "sampled_vocab", "text", "class_labels", "array", "prompt")

_NEEDS = {"text": ("init_text", "tokenizer"), "class_labels": ("class_labels", "tokenizer")}


@register("soft_prompt")
class SoftPrompt(Prompt):
    """P trained input embeddings [P, d], placed before the text: the input is [P; X] (Lester et al. 2021, section 2).

    Args:
        model: the frozen transformers model; read once, not kept.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds.
        init: where the first numbers come from (Lester et al. 2021, section 3.2):
            ``"random"``: normal, each of the d coordinates with its own mean and standard deviation over the word
            embeddings, since models have a few coordinates far larger than the rest; over all elements together this
            has the mean and the standard deviation of the word embeddings, too.
            ``"sampled_vocab"``: word embeddings of tokens drawn from the 5,000 lowest (most frequent) ids, special
            tokens left out, without replacement while there are enough.
            ``"text"``: word embeddings of the tokens of `init_text`, special tokens of the tokenizer included, cut or
            repeated to P as PEFT does.
            ``"class_labels"``: for each of `class_labels` the mean word embedding of its tokens (write `" good"` with
            the blank where the tokenizer wants one), the rest as ``"sampled_vocab"``.
            ``"array"``: `array` as it is. ``"prompt"``: the numbers of `prompt` as they are.
        init_text: a text; with ``"text"`` only.
        class_labels: at most P strings; with ``"class_labels"`` only.
        array: tensor, ndarray or the path of a .npy file, floating point [P, d]; with ``"array"`` only.
        prompt: a prompt of the same backbone that is or folds to a `SoftPrompt`, or the directory of a saved one; with
            ``"prompt"`` only.
        tokenizer: the model's tokenizer; needed with ``"text"`` and ``"class_labels"``, ignored by the others but for
            ``"sampled_vocab"``, to which it names the special tokens (else the model's configuration does).
        seed: of ``"random"`` and the sampling; the same seed gives the same prompt.

    Attributes:
        embeds: the parameter, fp32 [P, d], on the device of the model's word embeddings.

    Raises:
        InputError: an argument is missing, has the wrong shape or type, or would be ignored; the message says which.
        UnsupportedModelError: the model is of no supported type.
    """

    embeds: nn.Parameter

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "random",
        *,
        init_text: str | None = None,
        class_labels: list[str] | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        check_init(init, INITS)
        sources = {"init_text": init_text, "class_labels": class_labels, "array": array, "prompt": prompt}
        if init in _NEEDS:
            sources["tokenizer"] = tokenizer
        refuse_unused(init, _NEEDS.get(init, (init,)), **sources)
        generator = generator_from(seed)
        words = spec.word_embeddings.weight.detach()  # [V, d]

        if is_trained(init):
            rows = _given_rows(model, spec, array if init == "array" else prompt, init)  # [P, d]
            if num_virtual_tokens not in (None, len(rows)):
                raise InputError(f"expected {init} of num_virtual_tokens={num_virtual_tokens} rows, got {len(rows)}")
            check_count(len(rows), spec)
        else:
            count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
            if init == "random":
                std, mean = torch.std_mean(words.float(), dim=0, correction=0)  # [d], [d]
                noise = torch.randn(count, spec.hidden_size, generator=generator)  # [P, d]
                rows = mean.cpu() + std.cpu() * noise  # [P, d]
            elif init == "text":
                rows = _word_rows(words, text_ids(tokenizer, init_text, count, spec))  # [P, d]
            elif init == "sampled_vocab":
                rows = _word_rows(words, sampled_vocabulary_ids(model, tokenizer, count, spec, generator))  # [P, d]
            else:
                labels = label_ids(tokenizer, class_labels, count, spec)
                means = [_word_rows(words, torch.tensor(ids)).mean(dim=0, keepdim=True) for ids in labels]  # of [1, d]
                rest = sampled_vocabulary_ids(model, tokenizer, count - len(labels), spec, generator)
                rows = torch.cat([*means, _word_rows(words, rest)])  # [P, d]
            rows = rows * embedding_scale(spec)  # a prompt enters the model behind the table

        super().__init__(backbone_facts(model), len(rows))
        self.init = init
        self.embeds = nn.Parameter(rows.to(words.device))

    def lower(self) -> VirtualTokens:
        return VirtualTokens(self.embeds)

    def fold(self) -> SoftPrompt:
        folded = self.empty(self.facts, self.config())
        folded.embeds = nn.Parameter(self.embeds.detach().clone())
        return folded

    def config(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "init": self.init}

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        count, init = checked_config(config, INITS)
        prompt = cls.__new__(cls)
        Prompt.__init__(prompt, facts, count)
        prompt.init = init
        prompt.embeds = nn.Parameter(torch.zeros(count, facts.hidden_size))  # [P, d]
        return prompt

    def default_learning_rate(self) -> float:
        """0.3 of the standard deviation of the word embeddings' elements; from an array or another prompt a quarter.

        An Adam step moves every element by about the learning rate, so what suits a model is a fraction of the scale
        its embeddings live on. Constant or slowly falling, with AdamW.
        """
        return RATE * rate_factor(is_trained(self.init)) * self.facts.embedding_std

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, hidden_size={self.facts.hidden_size}, init={self.init!r}"


def checked_config(config: Any, inits: tuple[str, ...]) -> tuple[int, str]:
    """`num_virtual_tokens` and `init` of a saved prompt's config, checked."""
    count = config.get("num_virtual_tokens") if isinstance(config, dict) else None
    if not is_whole(count) or count < 1:
        raise InputError(f"expected a saved prompt's config with num_virtual_tokens of at least 1, got {config!r}")
    if set(config) != {"num_virtual_tokens", "init"} or config["init"] not in inits:
        raise InputError(f"expected a saved prompt's config with init, one of {', '.join(inits)}, got {config!r}")
    return count, config["init"]


def _word_rows(words: Tensor, ids: Tensor) -> Tensor:
    return words[ids.to(words.device)].float().cpu()  # [n, d]


def _given_rows(model: Any, spec: BackboneSpec, source: Any, init: str) -> Tensor:
    if init == "array":
        rows = read_array(source, "array")
        if rows.dim() != 2 or rows.shape[1] != spec.hidden_size:
            raise InputError(f"expected array of shape [P, {spec.hidden_size}], got {list(rows.shape)}")
        return rows  # [P, d]
    if isinstance(source, str | os.PathLike):
        source = load_prompt(source, model)
    if isinstance(source, Prompt):
        source = source.fold()
    if not isinstance(source, SoftPrompt):
        raise InputError(f"expected prompt, a SoftPrompt or the directory of one, got {type(source).__name__}")
    source.facts.require_same(backbone_facts(model), "the prompt to start from")
    return source.embeds.detach().to("cpu", torch.float32, copy=True)  # [P, d]
