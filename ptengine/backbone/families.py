"""What a configuration says about a family: facts with many names, and what the shared path cannot serve.

Nothing here names a family. A configuration is judged by what it declares; what it does not declare is left to the
trial forward and the comparison with the stock computation (`ptengine.backbone.proof`).
"""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "LAYER_KINDS",
    "UNLIMITED",
    "decoder_config",
    "is_multimodal",
    "layer_kinds",
    "logit_scale",
    "logit_softcap",
    "max_positions",
    "not_shared",
    "refusal",
    "text_config",
    "window_of",
]

# What a layer may be called in `config.layer_types` for its attention to be the plain or the sliding kind.
LAYER_KINDS = ("full_attention", "sliding_attention")
UNLIMITED = 2**31 - 1  # positions of models that declare no limit

_POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
# Other names for windows than `sliding_window`, which cannot be narrowed for the comparison: see `proof`.
_OTHER_WINDOWS = re.compile(r"^(attention_window|attention_window_size|local_attention|local_window|window_size)$")
# Rotary embeddings whose frequencies depend on the longest position of the call.
_DYNAMIC_ROPE = ("dynamic", "longrope")


def layer_kinds(config: Any) -> list[str] | None:
    """What each layer is, where the configuration says so."""
    for name in ("layer_types", "layers_block_type", "attn_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds and all(isinstance(kind, str) for kind in kinds):
            return list(kinds)
    return None


def refusal(config: Any) -> str | None:
    """Why a model of this configuration is not served, or None."""
    if getattr(config, "add_cross_attention", False) and not getattr(config, "is_encoder_decoder", False):
        return "it has cross-attention, whose keys are not the prompt's"
    return None


def is_multimodal(config: Any) -> bool:
    """Whether a configuration has a part for text beside others, for images or sounds."""
    part = getattr(config, "text_config", None)
    return part is not None and not isinstance(part, dict) and not getattr(config, "is_encoder_decoder", False)


def text_config(config: Any) -> Any:
    """The configuration of what reads text: the part of a multimodal model, else `config` itself."""
    return config.text_config if is_multimodal(config) else config


def not_shared(config: Any) -> str | None:
    """Why the shared path does not serve a model of this configuration, or None."""
    other = sorted({kind for kind in layer_kinds(config) or [] if kind not in (*LAYER_KINDS, "attention")})
    if other:
        kinds = ", ".join(other)
        return f"it has layers of the kinds {kinds}: only full and sliding attention read a shared prefix exactly"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "its ALiBi biases are added outside transformers' attention interface"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention scales queries by their place in the packed row, not by their position"
    other = sorted(name for name, value in vars(config).items() if _OTHER_WINDOWS.match(name) and _is_window(value))
    if other and window_of(config) is None:
        return f"its attention window is declared as {other[0]}, which is not known to reach the attention function"
    return None


def _is_window(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def decoder_config(config: Any) -> Any:
    """The configuration of an encoder-decoder's decoder: a part, or that of all text beside images, or `config`."""
    part = _declared(config, "decoder", "text_config")
    return config if part is None or isinstance(part, dict) else part


def window_of(config: Any) -> int | None:
    """The sliding window that some layers may have, or None where none can."""
    window = getattr(config, "sliding_window", None)
    if not _is_window(window) or getattr(config, "use_sliding_window", True) is False:
        return None
    return window


def max_positions(config: Any) -> int:
    """Positions up to which a row's numbers do not depend on how long other rows are, virtual tokens included.

    Rotary embeddings of the dynamic kinds change every position's frequencies once one position of the call is beyond
    the length of pretraining: a prompt that ran alone and its text would then have different ones.
    """
    declared = (getattr(config, name, None) for name in _POSITION_NAMES)
    limit = next((value for value in declared if isinstance(value, int) and value > 0), UNLIMITED)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in _DYNAMIC_ROPE:
            name = "original_max_position_embeddings"
            original: int = one.get(name) or getattr(config, name, None) or limit
            limit = min(limit, original)
    return limit


def logit_scale(config: Any) -> float:
    """The factor of the vocabulary logits: Cohere's and Muse's, Granite's and Inkling's divisors."""
    scale = _declared(config, "logit_scale", "output_multiplier")
    divisor = _declared(config, "logits_scaling", "logits_mup_width_multiplier")
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


def logit_softcap(config: Any) -> float | None:
    """c in ``c * tanh(logits / c)``, as in Gemma 2, RecurrentGemma and xLSTM."""
    cap = _declared(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return None if cap is None else float(cap)


def _declared(config: Any, *names: str) -> Any:
    """The first of some fields that is declared and not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
