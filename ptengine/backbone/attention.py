"""The attention and mask functions that transformers calls in a patched model, and what travels to them.

A model call without a `PrefixContext` computes what the stock SDPA implementation computes. With one, the rows of the
call attend to a shared prefix through `ptengine.kernels`. The context travels as a keyword of the model call, so it
survives gradient checkpointing and belongs to one call of one thread.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptengine.backbone import last_layer
from ptengine.backbone.gated import GatedPart, add_gated
from ptengine.errors import InputError, UnsupportedModelError
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

__all__ = ["IMPLEMENTATION", "KEYWORD", "PLACES", "Observed", "PrefixContext", "packed_attention", "per_row"]

IMPLEMENTATION = "ptengine"  # the name under which both functions are registered with transformers
KEYWORD = "ptengine_prefix"  # the keyword of the model call
PLACES = "_ptengine_layers"  # attribute of an attention module: its layers, where the trial forward had to find them

# Keywords that families hand through to attention and that do not change a score. Any other is refused: it may.
_HARMLESS = frozenset({
    "assistant_tokenizer", "cache_position", "deterministic", "layer_idx", "logits_to_keep", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "tokenizer", "use_cache",
})  # fmt: skip


_UNTOLD: Any = object()


@dataclass(frozen=True)
class Observed:
    """What one layer handed to attention in the trial forward.

    Attributes:
        module: the attention module.
        layer: its index, -1 where the module does not say.
        key: (H_kv, D).
        value: (H_kv, D_v).
        num_heads: H.
        causal: whether a token sees only what stands before it.
        window, softcap, sinks: the rules its scores follow, None and False where it has none.
        lengths: (Tq, Tk), queries and keys of the call.
    """

    module: nn.Module
    layer: int
    key: tuple[int, int]
    value: tuple[int, int]
    num_heads: int
    causal: bool
    window: int | None
    softcap: float | None
    sinks: bool
    lengths: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Rules:
    """What a layer's scores follow besides scale and causality."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]

    def keywords(self) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}


@dataclass(frozen=True)
class PrefixContext:
    """One call's layout and prefix. Packed calls have `cu_seqlens`; all others are stock batches.

    Attributes:
        keys: per layer [N, P, H_kv, D], the keys of N prompts, or None (no prefix, or `prefix_rows`).
        values: per layer [N, P, H_kv, D_v], or None.
        prompt_ids: int32 [rows], the prompt each row reads, -1 for none; None where all read the only one.
        prefix_lengths: int32 [N], where prompts differ in length.
        prefix_rows: int32 [rows]: the row of the packed batch that each row reads, -1 for none.
        cu_seqlens: int32 [rows + 1] of a packed call.
        max_seqlen: longest row of a packed call.
        empty_slots: of a stock batch with a cache, how many slots before its own the cache holds that are nothing but
            room for the prefix, by which the stock model counts its positions and biases.
        key_slots: of a stock batch with a static cache, how many of its slots hold something, this call's included.
        key_starts: int32 [B], the first key that is a token in each row of a left-padded stock batch.
        hidden_rows: int64 [n] ascending: the packed positions whose last hidden state is wanted, None for all.
        captured: where to put each layer's keys and values [T, H_kv, D] of a packed call, by layer.
        gated: prompts that layers attend to apart from the text.
        observed: where to put what each layer handed to attention, in the order of the calls.
        visits: how often each module that serves several layers was called.
    """

    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None
    prompt_ids: Tensor | None = None
    prefix_lengths: Tensor | None = None
    prefix_rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    empty_slots: int = 0
    key_slots: int | None = None
    key_starts: Tensor | None = None
    hidden_rows: Tensor | None = None
    captured: dict[int, tuple[Tensor, Tensor]] | None = None
    gated: tuple[GatedPart, ...] = ()
    observed: list[Observed] | None = None
    visits: Counter[nn.Module] = field(default_factory=Counter)

    def prefix(self, layer: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """[N, P, H_kv, D] of one layer, in the dtype of the call."""
        if self.keys is None or self.values is None:
            return None, None
        return self.keys[layer].to(dtype), self.values[layer].to(dtype)


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Tq, D]
    key: Tensor,  # [B, H_kv, Tk, D]
    value: Tensor,  # [B, H_kv, Tk, D_v]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: Any = _UNTOLD,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ptengine_prefix: PrefixContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, [B, Tq, H, D_v]."""
    context = ptengine_prefix
    if context is not None and context.cu_seqlens is None and context.observed is not None:
        rules = _Rules(sliding_window if isinstance(sliding_window, int) else None, softcap, s_aux)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [Tq, H, D], [Tk, H_kv, D] ...
        context.observed.append(_observe(module, q, k, v, _is_causal(module, is_causal), rules))
        context = None
    if context is not None and getattr(module, PLACES, None) == ():
        context = None  # of an encoder-decoder, an encoder's attention or one to the encoder, which no prefix changes
    last_layer.announce(module, None if context is None else context.hidden_rows)
    # A decoder behind empty slots is causal, also where its modules leave that to the mask.
    causal = bool(context is not None and context.empty_slots) or _is_causal(module, is_causal)
    if context is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask,
                dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
            )  # fmt: skip
        return _eager(module, query, key, value, attention_mask, scaling, dropout, causal, softcap, s_aux), None
    if sliding_window is _UNTOLD:  # some families tell their mask alone; None is a layer without a window
        sliding_window = getattr(module, "sliding_window", None)
    relative_bias = _relative_bias(kwargs.pop("position_bias", None)) if context.empty_slots else None
    rules = _rules(sliding_window, softcap, s_aux, kwargs)
    _check_dropout(dropout)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As the stock SDPA under autocast: rotary embeddings leave float32 queries and keys beside bf16 values.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if context.cu_seqlens is None:
        prefix_k, prefix_v = _prefix(module, context, query.dtype)
        own = slice(context.empty_slots, context.key_slots)
        if context.empty_slots and key.shape[2] < context.empty_slots + query.shape[2]:
            raise InputError(
                "expected no gradient checkpointing with a prefix in an encoder-decoder: layers that run again are "
                "given no cache, by which they count their positions"
            )
        out = prefix_attention(
            query, key[:, :, own], value[:, :, own], prefix_k, prefix_v,
            key_starts=per_row(context.key_starts, query.shape[0]),
            prompt_ids=None if prefix_k is None else per_row(context.prompt_ids, query.shape[0]),
            prefix_lengths=context.prefix_lengths, causal=causal, scale=scaling, relative_bias=relative_bias,
            **rules.keywords(),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        out = out.transpose(1, 2)  # [B, Tq, H, D_v]
        if context.gated:
            out = add_gated(out, query.transpose(1, 2), context.gated, _layer(module, context), scaling)
        return out, None
    # Squeezed, not indexed: the gradient of an index is a copy into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H, D], [N, H_kv, D], [N, H_kv, D_v]
    if context.observed is not None:
        _refuse_changed_mask(attention_mask)
        context.observed.append(_observe(module, q, k, v, causal, rules))
    return _packed(module, q, k, v, context, scaling, causal, rules)[None], None  # [1, N, H, D_v]


def packed_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: PrefixContext,
    scale: float,
    dropout: float,
    sliding_window: int | None = None,
) -> Tensor:
    """What the attention function does in a packed call, for callers that hold tokens first: out [N, H, D_v].

    Args:
        module: the attention module of the layer, causal.
        q: [N, H, D], rotated.
        k: [N, H_kv, D], rotated.
        v: [N, H_kv, D_v].
        context: of a packed call.
        scale: of the scores.
        dropout: the module's own, which must be 0.
        sliding_window: the layer's, None for none.
    """
    last_layer.announce(module, context.hidden_rows)
    _check_dropout(dropout)
    return _packed(module, q, k, v, context, scale, True, _rules(sliding_window, None, None, {}))


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _relative_bias(bias: Tensor | None) -> Tensor | None:
    """A bias [1, H, T, P + T] of T5 by distance alone: [H, 2 R + 1] with R = P + T - 1.

    The last query sees every distance back to -R, the first one those ahead, which nothing causal reads.
    """
    if bias is None:
        return None
    heads, length, seen = bias.shape[1:]
    ahead = bias[0, :, 0, seen - length + 1 :]  # [H, T - 1]
    beyond = bias.new_zeros(heads, seen - length)  # [H, P]
    return torch.cat([bias[0, :, -1], ahead, beyond], dim=1)  # [H, 2 (P + T) - 1]


def _check_dropout(dropout: float) -> None:
    if dropout:
        raise InputError(
            f"expected a backbone in eval mode, got attention dropout of {dropout}: dropout is not drawn over a shared "
            "prefix (for gradient checkpointing put the layers alone in training mode)"
        )


def _rules(window: Any, softcap: float | None, sinks: Tensor | None, others: dict[str, Any]) -> _Rules:
    """The rules of one layer's scores.

    Raises:
        UnsupportedModelError: a keyword that may change scores and is not known.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise UnsupportedModelError(
            f"its attention is handed {', '.join(unknown)}, which may change scores and is not known to ptengine"
        )
    if window is not None and not isinstance(window, int):
        raise UnsupportedModelError(f"expected a sliding window in tokens, got {window!r}")
    # Both count the query itself: HF shows key k to query q where q - window < k <= q. Some layers without a window
    # hand over 0 or -1.
    return _Rules(window if window is not None and window > 0 else None, softcap, sinks)


def _refuse_changed_mask(mask: Tensor | None) -> None:
    """Packed calls hand over a mask of one element, which every layer must get as it was."""
    if mask is not None and (mask.numel() != 1 or mask.dtype != torch.bool):
        raise UnsupportedModelError(
            f"it changes the attention mask before attention (to {list(mask.shape)}, {mask.dtype}), so that scores "
            "depend on more than ptengine is told"
        )


def _observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, causal: bool, rules: _Rules) -> Observed:
    layer = getattr(module, "layer_idx", None)
    return Observed(
        module=module,
        layer=layer if isinstance(layer, int) else -1,
        key=(k.shape[1], k.shape[2]),
        value=(v.shape[1], v.shape[2]),
        num_heads=q.shape[1],
        causal=causal,
        window=rules.window,
        softcap=rules.softcap,
        sinks=rules.sinks is not None,
        lengths=(q.shape[0], k.shape[0]),
    )


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,  # [B, 1, Tq, Tk], bool (True is seen) or added to scores; None is causal from the upper left
    scaling: float | None,
    dropout: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The stock computation of a call without a prefix where scores are capped or have sinks, which SDPA refuses."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))  # [B, H, Tk, D]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, Tq, Tk]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)  # [B, H, Tq, Tk + 1]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]  # [B, H, Tq, Tk]
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()  # [B, Tq, H, D_v]


def _packed(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: PrefixContext,
    scale: float | None,
    causal: bool,
    rules: _Rules,
) -> Tensor:
    assert context.cu_seqlens is not None
    if context.captured is not None:
        context.captured[_layer(module, context)] = (k, v)
    prefix_k, prefix_v = _prefix(module, context, q.dtype)
    out = prefix_attention_varlen(
        q, k, v, prefix_k, prefix_v, context.cu_seqlens, context.max_seqlen,
        prompt_ids=context.prompt_ids, prefix_rows=context.prefix_rows, prefix_lengths=context.prefix_lengths,
        causal=causal, scale=scale, **rules.keywords(),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return add_gated(out, q, context.gated, _layer(module, context), scale) if context.gated else out


def _prefix(module: nn.Module, context: PrefixContext, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if context.keys is None:
        return None, None
    return context.prefix(_layer(module, context), dtype)


def _layer(module: nn.Module, context: PrefixContext) -> int:
    """Which layer `module` is, or is this time: ALBERT's layers share one."""
    places: tuple[int, ...] | None = getattr(module, PLACES, None)
    if places is None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        return layer
    if len(places) == 1:
        return places[0]
    visit = context.visits[module]
    if visit == len(places):
        raise InputError(
            "expected no gradient checkpointing with a prefix in a model whose layers share their weights: layers that "
            "run again do not say which of them they are"
        )
    context.visits[module] += 1
    return places[visit]


def per_row(x: Tensor | None, batch: int) -> Tensor | None:
    """Beam search and several sequences per input repeat every row of a batch next to itself."""
    if x is None or x.numel() == batch:
        return x
    return x.repeat_interleave(batch // x.numel())


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
