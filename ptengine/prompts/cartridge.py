"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a trained cache of keys and values in place of a long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.backbone.spec import backbone_spec
from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import DEFAULT_NUM_VIRTUAL_TOKENS, check_count
from ptengine.prompts.prefix import Prefix, flat_rate, require_prefix, text_blocks
from ptengine.prompts.registry import register

__all__ = ["Cartridge", "concatenate_prefixes"]


@register("cartridge")
class Cartridge(Prompt):
    """Keys and values [L, P, H_kv, D] that start as those of a text's first P tokens; the first f are never trained.

    The first token draws attention in every layer whatever it says, and training becomes unstable where it moves, so
    f = 1 as in the paper. Trained by `ptengine.training.context_distillation_loss` a cartridge answers as
    the model does that sees the whole text, at P tokens; a `ptengine.Trainer` trains it on rows as any other prompt.
    `fold` (and so `save`) keeps keys and values, as a `Prefix`.

    Args:
        model: the frozen causal transformers model; run once on the P tokens, not kept, not changed.
        num_virtual_tokens: P, from f + 1 to one less than the positions of the model; None means 20.
        text: what the cartridge is to stand for; of at least P tokens, special tokens of the tokenizer included.
        tokenizer: the model's tokenizer.
        num_frozen_tokens: f, from 0 to P - 1.

    Attributes:
        keys, values: the trained ones, fp32 [L, P - f, H_kv, D].
        frozen_keys, frozen_values: fp32 [L, f, H_kv, D].

    Raises:
        InputError: an argument has the wrong type or range, the text has too few tokens, or the model is an encoder.
        UnsupportedModelError: the model is of no supported type, takes no prefix, or its values are not as wide as its
            keys.
    """

    keys: nn.Parameter
    values: nn.Parameter
    frozen_keys: Tensor
    frozen_values: Tensor

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        *,
        text: str,
        tokenizer: Any,
        num_frozen_tokens: int = 1,
    ) -> None:
        spec = backbone_spec(model)
        require_prefix(spec, "Cartridge")
        count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
        _check_frozen(num_frozen_tokens, count)
        ids = _first_tokens(tokenizer, text, count, spec.vocab_size)
        keys, values = text_blocks(model, spec, ids)  # [L, P, H_kv, D] each
        super().__init__(backbone_facts(model), count)
        self._place(keys, values, num_frozen_tokens)
        self.to(spec.word_embeddings.weight.device)

    def lower(self) -> KeyValuePrefix:
        return KeyValuePrefix(
            torch.cat([self.frozen_keys, self.keys], dim=1), torch.cat([self.frozen_values, self.values], dim=1)
        )  # [L, P, H_kv, D] each

    def fold(self) -> Prefix:
        with torch.no_grad():
            lowered = self.lower()
        return _prefix(self.facts, lowered.keys, lowered.values)

    def config(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "num_frozen_tokens": self.frozen_keys.shape[1]}

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        if not isinstance(config, dict) or set(config) != {"num_virtual_tokens", "num_frozen_tokens"}:
            raise InputError(
                f"expected a saved cartridge's config with num_virtual_tokens and num_frozen_tokens, got {config!r}"
            )
        count = check_whole("num_virtual_tokens", config["num_virtual_tokens"])
        _check_frozen(config["num_frozen_tokens"], count)
        prompt = cls.__new__(cls)
        Prompt.__init__(prompt, facts, count)
        shape = (facts.num_layers, count, facts.num_kv_heads, facts.head_dim)
        prompt._place(torch.zeros(shape), torch.zeros(shape), config["num_frozen_tokens"])
        return prompt

    def default_learning_rate(self) -> float:
        """That of a flat `Prefix`: 0.03 for a width of 96, falling with its square root, but from 0.005 to 0.03."""
        return flat_rate(self.facts)

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, num_frozen_tokens={self.frozen_keys.shape[1]}"

    def _place(self, keys: Tensor, values: Tensor, frozen: int) -> None:
        self.keys = nn.Parameter(keys[:, frozen:].clone(memory_format=torch.contiguous_format))
        self.values = nn.Parameter(values[:, frozen:].clone(memory_format=torch.contiguous_format))
        self.register_buffer("frozen_keys", keys[:, :frozen].clone(memory_format=torch.contiguous_format))
        self.register_buffer("frozen_values", values[:, :frozen].clone(memory_format=torch.contiguous_format))


@torch.no_grad()
def concatenate_prefixes(prompts: Sequence[Prefix | Cartridge]) -> Prefix:
    """One prefix of all keys and values of `prompts`, in their order: a model that has all their texts before it.

    The keys keep the positions they were trained at, as in the paper's composition, so those of several cartridges
    share positions; text behind the result starts at the sum of their lengths.

    Raises:
        InputError: fewer than two prompts, one that is no `Prefix` or `Cartridge`, or prompts of different backbones.
    """
    prompts = list(prompts)
    if len(prompts) < 2:
        raise InputError(f"expected at least two prompts to concatenate, got {len(prompts)}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prefix | Cartridge):
            raise InputError(f"expected prefixes and cartridges, got {type(prompt).__name__} at index {index}")
        prompts[0].facts.require_same(prompt.facts, "the first prompt")
    lowered = [prompt.lower() for prompt in prompts]
    device = lowered[0].keys.device
    keys, values = (
        torch.cat([part.to(device) for part in parts], dim=1)  # [L, sum P, H_kv, D]
        for parts in ([one.keys for one in lowered], [one.values for one in lowered])
    )
    return _prefix(prompts[0].facts, keys, values)


def _prefix(facts: BackboneFacts, keys: Tensor, values: Tensor) -> Prefix:
    """A flat `Prefix` of its own memory; it counts as trained."""
    folded = Prefix.empty(facts, {"num_virtual_tokens": keys.shape[1], "init": "prompt"})
    folded.keys = nn.Parameter(keys.detach().clone(memory_format=torch.contiguous_format))
    folded.values = nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))
    return folded


def _check_frozen(frozen: Any, count: int) -> None:
    if check_whole("num_frozen_tokens", frozen, 0) >= count:
        raise InputError(f"expected num_frozen_tokens below num_virtual_tokens={count}, got {frozen}")


def _first_tokens(tokenizer: Any, text: Any, count: int, vocab_size: int) -> Tensor:
    """The first `count` token ids of `text`: int64 [count]."""
    if not isinstance(text, str):
        raise InputError(f"expected text, a string, got {type(text).__name__}")
    if not callable(tokenizer):
        raise InputError(f"expected tokenizer, a transformers tokenizer, got {type(tokenizer).__name__}")
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) < count:
        raise InputError(f"expected a text of at least num_virtual_tokens={count} tokens, got {len(ids)}")
    if max(ids) >= vocab_size:
        raise InputError(f"expected the model's own tokenizer, with ids below {vocab_size}, got one with {max(ids)}")
    return torch.tensor(ids[:count])
