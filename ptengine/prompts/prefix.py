"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190) and its flat form (P-tuning v2, Liu et al. 2021, arXiv 2110.07602).

P keys and values per layer stand before those of the text.
"""

from __future__ import annotations

import math
import os
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptengine.backbone.caches import whole_cache
from ptengine.backbone.lowering import KeyValuePrefix
from ptengine.backbone.modes import eval_mode
from ptengine.backbone.spec import BackboneSpec, backbone_spec
from ptengine.checks import check_whole, is_whole
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.prompts.base import Prompt
from ptengine.prompts.facts import BackboneFacts, backbone_facts
from ptengine.prompts.initialization import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    Initial,
    check_count,
    check_init,
    generator_from,
    is_trained,
    rate_factor,
    read_array,
    refuse_unused,
    text_ids,
)
from ptengine.prompts.io import load_prompt
from ptengine.prompts.registry import register
from ptengine.prompts.soft_prompt import checked_config

__all__ = ["Prefix", "blocks_to_prefix", "flat_rate", "prefix_to_blocks", "require_prefix", "text_blocks"]

INITS = ("random", "zero", "text", "array", "prompt")

_NEEDS = {"text": ("init_text", "tokenizer"), "random": (), "zero": ()}

# The scale weights of transformers themselves start from: small beside the keys and values of text.
_RANDOM_STD = 0.02

_PROJECTION_SIZE = 512


@register("prefix")
class Prefix(Prompt):
    """Keys and values of P virtual tokens in each of L layers.

    Flat, the keys and values are the parameters. With `projection` they are the output of an MLP (Li & Liang 2021,
    section 4.3): [K; V] = W2 tanh(W1 E + b1) + b2 with E [P, H_kv*D], W1 to `projection_size`, W2 to L*2*H_kv*D; the
    output's block 2i holds the keys of layer i and block 2i + 1 its values, as in PEFT's PrefixEncoder. `fold` (and so
    `save`) drops the MLP and keeps its output; `state_dict` keeps the MLP.

    Args:
        model: the frozen transformers model; read (with ``"text"`` also run once), not kept, not changed.
        num_virtual_tokens: P, from 1 to one less than the positions of the model. None means 20, or as many as
            `array` or `prompt` holds.
        init: where the first numbers come from:
            ``"random"``: flat, normal with mean 0 and standard deviation 0.02 for keys and values. Small on purpose:
            PEFT's standard deviation of 1 is far from anything the model knows and learns badly, while near zero a
            prefix only draws some attention to values that add nothing, and the noise sets its tokens apart. With
            `projection`, E is standard normal and the two linear layers start as PyTorch's do, as in PEFT.
            ``"zero"``: all keys and values zero (with `projection`, W2 and b2 zero). Note that in a flat prefix the P
            tokens of a zero start have equal gradients and so stay equal to each other; with `projection` they do not.
            ``"text"``: the keys (after rotary embedding) and values that the frozen model itself computes for the first
            P tokens of `init_text`, special tokens of the tokenizer included, repeated where the text is shorter: a
            start at which the model sees the text. Causal models, flat, only.
            ``"array"``: `array` as it is. ``"prompt"``: the numbers of `prompt` as they are. Flat only.
        projection: train through the MLP.
        projection_size: width of its hidden layer, None means 512 as in the paper; with `projection` only.
        init_text: a text; with ``"text"`` only.
        array: tensor, ndarray or the path of a .npy file, floating point [2, L, P, H_kv, D], keys first; with
            ``"array"`` only.
        prompt: a prompt of the same backbone that is or folds to a `Prefix`, or the directory of a saved one; with
            ``"prompt"`` only.
        tokenizer: the model's tokenizer; needed with ``"text"``, ignored by the others.
        seed: of ``"random"`` and of the MLP; the same seed gives the same prefix.

    Attributes:
        keys, values: the parameters of a flat prefix, fp32 [L, P, H_kv, D], on the device of the model's word
            embeddings.
        embedding, transform: E and the MLP of a projected one.

    Raises:
        InputError: an argument is missing, has the wrong shape or type, or would be ignored; the message says which.
        UnsupportedModelError: the model is of no supported type.
    """

    keys: nn.Parameter
    values: nn.Parameter
    embedding: nn.Embedding
    transform: nn.Sequential

    def __init__(
        self,
        model: Any,
        num_virtual_tokens: int | None = None,
        init: str = "random",
        *,
        projection: bool = False,
        projection_size: int | None = None,
        init_text: str | None = None,
        array: Initial | None = None,
        prompt: Prompt | str | os.PathLike[str] | None = None,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        spec = backbone_spec(model)
        require_prefix(spec, "Prefix")
        check_init(init, INITS)
        sources = {"init_text": init_text, "array": array, "prompt": prompt}
        if init == "text":
            sources["tokenizer"] = tokenizer
        refuse_unused(init, _NEEDS.get(init, (init,)), **sources)
        if projection and init not in ("random", "zero"):
            raise InputError(
                f"init={init!r} gives keys and values, which cannot be turned back into the weights of the MLP: "
                "expected projection=False, or init random or zero"
            )
        if projection_size is not None and not projection:
            raise InputError(f"expected projection=True with projection_size, got projection_size={projection_size!r}")
        size = _PROJECTION_SIZE if projection_size is None else projection_size
        check_whole("projection_size", size)
        generator = generator_from(seed)

        if is_trained(init):
            given = _given_blocks(model, spec, array if init == "array" else prompt, init)  # [2, L, P, H_kv, D]
            count = given.shape[2]
            if num_virtual_tokens not in (None, count):
                raise InputError(f"expected {init} of num_virtual_tokens={num_virtual_tokens}, got {count}")
            check_count(count, spec)
        else:
            count = check_count(DEFAULT_NUM_VIRTUAL_TOKENS if num_virtual_tokens is None else num_virtual_tokens, spec)
            shape = (2, spec.num_layers, count, spec.num_kv_heads, spec.head_dim)
            if init == "text":
                given = text_blocks(model, spec, text_ids(tokenizer, init_text, count, spec))  # [2, L, P, H_kv, D]
            elif init == "random" and not projection:
                given = torch.randn(shape, generator=generator) * _RANDOM_STD  # [2, L, P, H_kv, D]
            else:
                given = torch.zeros(shape)  # [2, L, P, H_kv, D]

        super().__init__(backbone_facts(model), count)
        self.init = init
        self.projection = projection
        if projection:
            self._make_projection(size, init == "zero", generator)
        else:
            self.keys = nn.Parameter(given[0].clone())
            self.values = nn.Parameter(given[1].clone())
        self.to(spec.word_embeddings.weight.device)

    def lower(self) -> KeyValuePrefix:
        if not self.projection:
            return KeyValuePrefix(self.keys, self.values)
        weight = self.embedding.weight  # [P, H_kv*D]
        # The MLP is part of the fp32 master, also where the backbone runs under autocast.
        with torch.autocast(weight.device.type, enabled=False):
            blocks = self.transform(weight)  # [P, L*2*H_kv*D]
        return KeyValuePrefix(*blocks_to_prefix(blocks, self.facts))

    def fold(self) -> Prefix:
        folded = self.empty(self.facts, {"num_virtual_tokens": self.num_virtual_tokens, "init": self.init})
        lowered = self.lower()
        folded.keys = nn.Parameter(lowered.keys.detach().clone(memory_format=torch.contiguous_format))
        folded.values = nn.Parameter(lowered.values.detach().clone(memory_format=torch.contiguous_format))
        return folded

    def config(self) -> dict[str, Any]:
        described: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens, "init": self.init}
        return described | ({"projection_size": self.transform[0].out_features} if self.projection else {})

    @classmethod
    def empty(cls, facts: BackboneFacts, config: dict[str, Any]) -> Self:
        described = dict(config) if isinstance(config, dict) else {}
        size = described.pop("projection_size", None)
        count, init = checked_config(described if size is not None else config, INITS)
        if size is not None and (not is_whole(size) or size < 1):
            raise InputError(f"expected a saved prompt's config with projection_size of at least 1, got {size!r}")
        prompt = cls.__new__(cls)
        Prompt.__init__(prompt, facts, count)
        prompt.init = init
        prompt.projection = size is not None
        if size is not None:
            prompt._build_projection(size)
            if torch.get_default_device().type != "meta":
                prompt.to_empty(device="cpu")
                for parameter in prompt.parameters():
                    nn.init.zeros_(parameter)
            return prompt
        shape = (facts.num_layers, count, facts.num_kv_heads, facts.head_dim)
        prompt.keys = nn.Parameter(torch.zeros(shape))  # [L, P, H_kv, D]
        prompt.values = nn.Parameter(torch.zeros(shape))  # [L, P, H_kv, D]
        return prompt

    def default_learning_rate(self) -> float:
        """Flat: 0.03 for a width of 96, falling with its square root, but from 0.005 to 0.03; with the MLP 0.001.

        What worked lies near 0.03 on tiny models and between 0.005 and 0.02 on large ones. A quarter of it from an
        array or another prompt.
        """
        if self.projection:
            return 1e-3
        return flat_rate(self.facts) * rate_factor(is_trained(self.init))

    def extra_repr(self) -> str:
        return (
            f"num_virtual_tokens={self.num_virtual_tokens}, num_layers={self.facts.num_layers}, "
            f"num_kv_heads={self.facts.num_kv_heads}, head_dim={self.facts.head_dim}, init={self.init!r}"
        )

    def _build_projection(self, size: int) -> tuple[nn.Linear, nn.Linear]:
        """The modules without values, so that the global random state is neither read nor moved; W1 and W2."""
        width = self.facts.num_kv_heads * self.facts.head_dim
        with torch.device("meta"):
            self.embedding = nn.Embedding(self.num_virtual_tokens, width)
            first, last = nn.Linear(width, size), nn.Linear(size, self.facts.num_layers * 2 * width)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
        return first, last

    def _make_projection(self, size: int, zero: bool, generator: torch.Generator) -> None:
        first, last = self._build_projection(size)
        self.to_empty(device="cpu")
        nn.init.normal_(self.embedding.weight, generator=generator)
        for linear in (first, last):
            bound = 1 / math.sqrt(linear.in_features)  # nn.Linear's own bound
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def require_prefix(spec: BackboneSpec, method: str) -> None:
    """Refuse, for the method of this name, a model that takes no keys and values, or none that one tensor holds."""
    reason = spec.no_prefix
    if reason is None and spec.value_dim != spec.head_dim:
        reason = f"its values are {spec.value_dim} wide and its keys {spec.head_dim}, and one tensor holds both"
    if reason is not None:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported by {method}: {reason}; a SoftPrompt works"
        )


def flat_rate(facts: BackboneFacts) -> float:
    """What suits keys and values as parameters, by the width of the model."""
    return min(0.03, max(0.005, 0.03 * math.sqrt(96 / facts.hidden_size)))


def blocks_to_prefix(blocks: Tensor, facts: BackboneFacts) -> tuple[Tensor, Tensor]:
    """PEFT's layout [P, L*2*H_kv*D] as keys and values, each [L, P, H_kv, D].

    A row holds 2L blocks of H_kv*D numbers: block 2i is the key of layer i, block 2i + 1 its value.
    """
    split = blocks.view(len(blocks), facts.num_layers, 2, facts.num_kv_heads, facts.head_dim)  # [P, L, 2, H_kv, D]
    keys, values = split.permute(2, 1, 0, 3, 4).unbind(0)  # [L, P, H_kv, D] each
    return keys, values


def prefix_to_blocks(keys: Tensor, values: Tensor) -> Tensor:
    """The inverse of `blocks_to_prefix`: [P, L*2*H_kv*D]."""
    stacked = torch.stack([keys, values])  # [2, L, P, H_kv, D]
    return stacked.permute(2, 1, 0, 3, 4).reshape(keys.shape[1], -1)  # [P, L*2*H_kv*D]


def _given_blocks(model: Any, spec: BackboneSpec, source: Any, init: str) -> Tensor:
    if init == "array":
        blocks = read_array(source, "array")
        shape = list(blocks.shape)
        wanted = [2, spec.num_layers, shape[2] if len(shape) == 5 else "P", spec.num_kv_heads, spec.head_dim]
        if shape != wanted:
            layout = f"[2, {spec.num_layers}, P, {spec.num_kv_heads}, {spec.head_dim}]"
            raise InputError(f"expected array of shape {layout} (keys, values), got {shape}")
        return blocks  # [2, L, P, H_kv, D]
    if isinstance(source, str | os.PathLike):
        source = load_prompt(source, model)
    if isinstance(source, Prompt):
        source = source.fold()
    if not isinstance(source, Prefix):
        raise InputError(f"expected prompt, a Prefix or the directory of one, got {type(source).__name__}")
    source.facts.require_same(backbone_facts(model), "the prompt to start from")
    lowered = source.lower()
    return torch.stack([lowered.keys, lowered.values]).detach().to("cpu", torch.float32)  # [2, L, P, H_kv, D]


def text_blocks(model: Any, spec: BackboneSpec, ids: Tensor) -> Tensor:
    """Keys and values [2, L, P, H_kv, D], fp32 on the CPU, that a causal model has for the tokens `ids` [P]."""
    if spec.kind != "causal":
        raise InputError(
            f"a text's keys and values need a causal model, in which they depend on nothing behind them, got the "
            f"{spec.kind} {spec.model_type!r}: expected a Prefix with init random or zero"
        )
    device = spec.word_embeddings.weight.device
    # The cache that a model with sliding windows makes for itself drops the tokens that have left them.
    cache = whole_cache(None, spec.num_layers, len(ids))
    with torch.no_grad(), eval_mode(model):
        spec.base_model(input_ids=ids[None].to(device), past_key_values=cache, use_cache=True)
    # Per layer [1, H_kv, P, D], keys after rotary embedding; as [P, H_kv, D] on the CPU.
    given: list[Any] = cache.layers
    layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in given]
    keys = torch.stack([key.float().cpu() for key, _ in layers])  # [L, P, H_kv, D]
    values = torch.stack([value.float().cpu() for _, value in layers])  # [L, P, H_kv, D]
    return torch.stack([keys, values])  # [2, L, P, H_kv, D]
