"""PEFT's ADAPTION_PROMPT, the LLaMA-Adapter: its tensors and configuration, and back.

A layer's tokens [1, P, d] and its gate [1] stand under the layer's own name, for the topmost layers of a Llama or
Mistral model. Knows tensors, the fields of `adapter_config.json` and `LlamaAdapter`; no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptengine.checks import check_whole
from ptengine.errors import InputError
from ptengine.prompts import BackboneFacts, LlamaAdapter

__all__ = ["ADAPTER_TYPE", "adapter_of", "adapter_parts", "require_plain_output"]

ADAPTER_TYPE = "ADAPTION_PROMPT"
_MODULE = "self_attn"
_FAMILIES = ("llama", "mistral")  # PEFT's, without GPT-2, where it adds what is read behind the output projection


def adapter_parts(prompt: LlamaAdapter, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration's own fields of a checkpoint with the numbers of `prompt`.

    Raises:
        InputError: a gate per head, which the format has no room for; a model of a type that PEFT adapts otherwise or
            not at all; or no model, whose layers are named.
    """
    if prompt.settings["gating"] != "layer":
        raise InputError(
            f"expected gating 'layer', the one gate per layer that {ADAPTER_TYPE} has, got "
            f"{prompt.settings['gating']!r}"
        )
    _require_family(prompt.facts)
    if model is None:
        raise InputError(f"{ADAPTER_TYPE} needs model, whose layers its tensors are named by, got None")
    require_plain_output(model)
    tensors = {}
    for place, layer in enumerate(prompt.layers):
        tensors[_name(model, layer, "adaption_prompt")] = prompt.tokens[place][None].float()  # [1, P, d]
        tensors[_name(model, layer, "adaption_gate")] = prompt.gates[place].float()  # [1]
    fields = {
        "adapter_layers": len(prompt.layers),
        "adapter_len": prompt.num_virtual_tokens,
        "target_modules": _MODULE,
    }
    return tensors, fields


def _require_family(facts: BackboneFacts) -> None:
    if facts.model_type not in _FAMILIES:
        raise InputError(
            f"expected a model of type {' or '.join(_FAMILIES)} for {ADAPTER_TYPE}, got {facts.model_type!r}"
        )


def adapter_of(config: Mapping[str, Any], tensors: dict[str, Tensor], facts: BackboneFacts, model: Any) -> LlamaAdapter:
    """The adapter of a checkpoint, on the CPU; its tensors are taken out of `tensors`.

    Args:
        config: `adapter_config.json`.
        tensors: of `adapter_model.safetensors`.
        facts: of `model`.
        model: the backbone.

    Raises:
        InputError: another kind of model, a field or tensor that is missing, of another shape or too many.
    """
    _require_family(facts)
    if config.get("target_modules") != _MODULE:
        raise InputError(f"expected target_modules {_MODULE!r}, got {config.get('target_modules')!r}")
    require_plain_output(model)
    settings = {"num_adapter_layers": check_whole("adapter_layers", config.get("adapter_layers")), "gating": "layer"}
    LlamaAdapter.check_settings(facts, settings)
    count = check_whole("adapter_len", config.get("adapter_len"))
    described = {"num_virtual_tokens": count, "default_learning_rate": LlamaAdapter.RATE, **settings}
    with torch.device("meta"):  # a damaged length allocates nothing
        prompt = LlamaAdapter.empty(facts, described)
    wanted = {
        _name(model, layer, name): shape
        for layer in prompt.layers
        for name, shape in (("adaption_prompt", [1, count, facts.hidden_size]), ("adaption_gate", [1]))
    }
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if got != wanted or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError(f"expected floating-point tensors {wanted}, got {got}")
    tokens = torch.cat([tensors.pop(_name(model, layer, "adaption_prompt")) for layer in prompt.layers])  # [A, P, d]
    gates = torch.stack([tensors.pop(_name(model, layer, "adaption_gate")) for layer in prompt.layers])  # [A, 1]
    prompt.load_state_dict({"tokens": tokens.float(), "gates": gates.float()}, assign=True)
    return prompt


def require_plain_output(model: Any) -> None:
    """Refuse models for which PEFT computes another formula: it sends both parts through `o_proj`, bias included."""
    if getattr(model.config, "attention_bias", False):
        raise InputError(
            f"expected a model whose attention has no bias for {ADAPTER_TYPE}, got one with attention_bias=True: PEFT "
            "adds the output projection's bias twice there"
        )
    if model.config.hidden_size != model.config.num_attention_heads * model.base_model.layers[0].self_attn.head_dim:
        raise InputError(
            f"expected a model whose heads are together as wide as its hidden states for {ADAPTER_TYPE}, got one that "
            "PEFT does not divide into heads rightly"
        )


def _name(model: Any, layer: int, name: str) -> str:
    inner = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return f"base_model.model.{inner}layers.{layer}.{_MODULE}.{name}"
