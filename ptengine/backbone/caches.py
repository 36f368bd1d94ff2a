"""Caches of transformers behind a prompt that is kept apart: which serve, and how many of their slots hold text.

A cache holds text alone, and behind a prompt the count of its tokens says how far the prompt is: it has to keep them
all, as they were. Knows no prompts and no hooks.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ptengine.errors import InputError

__all__ = [
    "cache_name",
    "check_cache_name",
    "filled_slots",
    "is_static",
    "keep_all_tokens",
    "require_seen",
    "seen_slots",
    "whole_cache",
    "with_settings",
]

_STATIC = ("static", "offloaded_static")
_CACHES = ("dynamic", "offloaded", *_STATIC)


def cache_name(model: Any, kwargs: dict[str, Any]) -> str | None:
    """The cache that a `generate` call asks for; of old names that models came with transformers makes nothing."""
    config = kwargs.get("generation_config")
    asked = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    own = getattr(model.generation_config, "cache_implementation", None)
    name: str | None = asked or (own if own in _CACHES else None)
    return name


def with_settings(kwargs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The arguments of `generate` with other settings, in their configuration where they have one."""
    if kwargs.get("generation_config") is None:
        return kwargs | settings
    config = copy.deepcopy(kwargs["generation_config"])
    config.update(**settings)
    kwargs = {name: value for name, value in kwargs.items() if name not in settings}
    return kwargs | {"generation_config": config}


def check_cache_name(name: str | None, device_type: str) -> None:
    """Refuse a `cache_implementation` that cannot stand behind a prompt on this kind of device.

    Raises:
        InputError: the cache rounds what it holds, has layers of a deprecated kind, or needs a GPU that is not there.
    """
    if name == "quantized":
        raise InputError(f"expected a cache that keeps keys and values as they are, got {name!r}, which rounds them")
    if name is not None and name not in _CACHES:
        raise InputError(f"expected cache_implementation {', '.join(_CACHES)} or None, got {name!r}")
    if name is not None and name.startswith("offloaded") and device_type == "cpu":
        raise InputError(
            f"expected a model on a GPU, from which {name!r} moves its cache to the CPU, got one on the CPU"
        )


def whole_cache(name: str | None, num_layers: int, slots: int) -> Cache:
    """An empty cache of that name whose layers keep all tokens, of up to `slots` tokens a row where it is static.

    The one that `generate` makes for a model with sliding windows drops what has left them.
    """
    offloading = name is not None and name.startswith("offloaded")
    if name in _STATIC:
        return Cache(layers=[StaticLayer(max_cache_len=slots) for _ in range(num_layers)], offloading=offloading)
    return DynamicCache(offloading=offloading)


def is_static(cache: Any) -> bool:
    """Whether attention is handed the slots of a cache that hold nothing yet, too."""
    return bool(getattr(cache, "is_compileable", False))


def filled_slots(cache: Any) -> int:
    """The slots of each row that hold something, padding included; of no cache none."""
    return 0 if cache is None else int(cache.get_seq_length())


def seen_slots(cache: Any, length: int) -> int | None:
    """The slots that hold something once `length` more tokens a row are in a static cache; None for others."""
    return filled_slots(cache) + length if is_static(cache) else None


def require_seen(past: int, filler: weakref.ref[Any] | None, prompt: Any) -> None:
    """Refuse `past` tokens of a cache that somebody else than `prompt` stood before; `filler` is whom it notes.

    Raises:
        InputError: another prompt, or none.
    """
    if past and (filler is None or filler() is not prompt):
        raise InputError(
            f"expected past_key_values filled while this prompt was attached, got {past} tokens of another call: they "
            "stand at other positions and have not seen the prompt"
        )


def keep_all_tokens(cache: Any) -> None:
    """Make an empty dynamic cache keep what leaves a sliding window, too.

    Raises:
        InputError: the cache is of no kind that can stand behind a prompt, or has dropped tokens already.
    """
    if not hasattr(cache, "get_seq_length"):
        raise InputError(f"expected a cache of transformers beside an attached prompt, got {type(cache).__name__}")
    if isinstance(cache, QuantizedCache):
        raise InputError(
            "expected a cache that keeps keys and values as they are beside an attached prompt, got a QuantizedCache, "
            "which rounds them"
        )
    layers: list[Any] = getattr(cache, "layers", [])
    sliding = [index for index, layer in enumerate(layers) if getattr(layer, "is_sliding", False)]
    if not sliding:
        return
    if filled_slots(cache) or not all(type(layers[index]) is DynamicSlidingWindowLayer for index in sliding):
        raise InputError(
            f"expected a cache that keeps all tokens beside an attached prompt, got a {type(cache).__name__} that "
            "drops what has left a sliding window: give past_key_values=DynamicCache() or use_cache=False"
        )
    for index in sliding:
        layers[index] = DynamicLayer()
