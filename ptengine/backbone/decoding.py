"""Steps of one new token a row, as one CUDA graph: a GPU would wait for the host longer than it computes.

`DecodingCache` gives the texts' keys and values a place that never moves, which a graph needs; `decoder` gives the
stock `generate` a model whose one-token calls replay the graph. What is generated is the stock loop's choice alone.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptengine.backbone.attention import KEYWORD, PrefixContext, per_row
from ptengine.backbone.patching import no_mask
from ptengine.backbone.spec import BackboneSpec
from ptengine.backbone.step_recording import CAPTURING
from ptengine.backbone.trial import first_line
from ptengine.kernels.dispatch import resolve_backend

__all__ = ["DecodingCache", "decoder", "decodes"]

_WORTH = 8  # new tokens; a capture costs the time of about three steps

# What the stock loop may ask of a model's call besides logits, and searches that move rows among the cache's.
_ONE_BY_ONE = {
    "num_beams": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "custom_generate": (None,),
    "past_key_values": (None,),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
}


class DecodingCache(DynamicCache):
    """Keys and values of a left-padded batch. `settle` lays them at the right end of buffers with room to their left.

    From then on a new token goes to the left of its row's first one: attention without windows or biases sums over
    keys in any order, and the last slot, where `prefix_attention` takes the query to be, holds a token in every row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots: Tensor | None = None  # int64 [B], where each row's new token goes
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._rows = torch.empty(0)
        self._length = 0

    def settle(self, room: int) -> int:
        """Make place for `room` more tokens a row; returns the slots of a row."""
        self._length = super().get_seq_length()
        layer: Any
        for layer in self.layers:
            pair = []
            for x in (layer.keys, layer.values):  # [B, H_kv, T, D]
                buffer = x.new_zeros(*x.shape[:2], room + x.shape[2], x.shape[3])
                buffer[:, :, room:] = x
                pair.append(buffer)
            self._buffers.append((pair[0], pair[1]))
            layer.keys = layer.values = None
        first = self._buffers[0][0]
        self._rows = torch.arange(first.shape[0], device=first.device)
        self.slots = self._rows.new_zeros(first.shape[0])
        return first.shape[2]

    def grown(self) -> None:
        """Count a token that each row has got."""
        self._length += 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H_kv, T, D] of every slot, after those of one token a row are written to `slots`."""
        if self.slots is None:
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return grown
        keys, values = self._buffers[layer_idx]
        keys[self._rows, :, self.slots] = key_states[:, :, 0]  # [B, H_kv, D]
        values[self._rows, :, self.slots] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.slots is None else self._length


def decoder(model: Any, spec: BackboneSpec, context: PrefixContext, cache: DecodingCache, new_tokens: int) -> Any:
    """The model as `generate` is to be called on: it shares everything, and its one-token calls are a graph's.

    Args:
        model: patched, on one CUDA device.
        spec: its facts.
        context: of the `generate` call.
        cache: the call's, empty.
        new_tokens: at most, of each row.
    """
    steps = _Steps(model, spec, context, cache, new_tokens)
    facade = copy.copy(model)  # of its own: another thread may generate with the model itself
    facade.forward = functools.wraps(model.forward)(steps)
    return facade


def decodes(model: Any, spec: BackboneSpec, settings: Callable[[str], Any]) -> bool:
    """Whether a `generate` call is to run by `decoder`: `settings` gives its settings by name."""
    new_tokens, weight = settings("max_new_tokens"), spec.word_embeddings.weight
    return (
        weight.device.type == "cuda"
        and new_tokens is not None
        and new_tokens >= _WORTH
        and not spec.windowed
        and "forward" not in vars(model)  # hooks that move weights
        and len({x.device for x in model.parameters()}) == 1
        and all(settings(name) in usual for name, usual in _ONE_BY_ONE.items())
        and resolve_backend(None, weight.device, "prefix_attention", dtype=weight.dtype) == "triton"
    )


class _Steps:
    """`forward` of one `generate` call."""

    def __init__(
        self, model: Any, spec: BackboneSpec, context: PrefixContext, cache: DecodingCache, new_tokens: int
    ) -> None:
        self._model, self._spec, self._context, self._cache = model, spec, context, cache
        self._new_tokens, self._left = new_tokens, new_tokens - 1  # the prefill gives the first
        self._run: Callable[[], Tensor] | None = None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        if self._cache.get_seq_length() == 0:
            return self._model.forward(*args, **inputs)
        if self._left == 0:
            raise RuntimeError(f"expected at most {self._new_tokens} new tokens a row, as generate was told, got more")
        self._left -= 1
        ids, positions = inputs["input_ids"], inputs["position_ids"]  # [B, 1]
        if self._run is None:
            self._prepare(ids, positions)
        else:
            self._ids.copy_(ids)
            self._positions.copy_(positions)
            self._starts.sub_(1)
        assert self._run is not None
        logits = self._run()  # [B, 1, V]; the next step writes over it, but what the stock loop keeps it copies
        self._cache.grown()
        return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)

    def _prepare(self, ids: Tensor, positions: Tensor) -> None:
        first = self._new_tokens - 1  # the slot of the batch's first token
        self._cache.settle(first)
        padding = per_row(self._context.key_starts, len(ids))
        assert padding is not None
        self._ids, self._positions = ids.clone(), positions.clone()
        self._starts = padding + (first - 1)  # int32 [B]: of the slots in use, of which the new token's is the first
        self._inputs = {
            KEYWORD: replace(self._context, key_starts=self._starts),
            "attention_mask": no_mask(ids.device),
        }
        self._run = self._captured()

    def _step(self) -> Tensor:
        assert self._cache.slots is not None
        self._cache.slots.copy_(self._starts)
        logits: Tensor = self._model.forward(
            input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True,
            **self._inputs,
        ).logits  # fmt: skip
        return logits  # [B, 1, V]

    def _captured(self) -> Callable[[], Tensor]:
        """What runs a step: a graph's replay, or the step itself for a model that cannot be captured."""
        device = self._ids.device
        # Named everywhere: what CUDA takes for current may be another device than the model's.
        with torch.cuda.device(device):
            return self._captured_on(torch.cuda.current_stream(device), torch.cuda.Stream(device))

    def _captured_on(self, here: torch.cuda.Stream, side: torch.cuda.Stream) -> Callable[[], Tensor]:
        side.wait_stream(here)
        with torch.cuda.stream(side):
            self._step()  # compiles kernels and makes workspaces; writes where the graph's first replay writes again
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture begins by waiting for the device, which would break another thread's. What others launch and
            # allocate meanwhile does not.
            with CAPTURING, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                logits = self._step()
        except RuntimeError as error:
            warnings.warn(
                f"model type {self._spec.model_type!r} generates without a CUDA graph, more slowly: its step cannot be "
                f"captured ({first_line(error)})",
                stacklevel=2,
            )
            return self._step

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
