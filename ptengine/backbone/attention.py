"""The attention and mask functions that transformers calls in a patched model, and what travels to them.

A model call without a `PrefixContext` computes what the stock SDPA implementation computes. With one, the rows of the
call attend to a shared prefix through `ptengine.kernels`. The context travels as a keyword of the model call, so it
survives gradient checkpointing and belongs to one call of one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptengine.backbone import last_layer
from ptengine.errors import InputError
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

__all__ = ["IMPLEMENTATION", "KEYWORD", "PrefixContext", "packed_attention"]

IMPLEMENTATION = "ptengine"  # the name under which both functions are registered with transformers
KEYWORD = "ptengine_prefix"  # the keyword of the model call


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
        key_starts: int32 [B], the first key that is a token in each row of a left-padded stock batch.
        hidden_rows: int64 [n] ascending: the packed positions whose last hidden state is wanted, None for all.
        captured: where to put each layer's keys and values [T, H_kv, D] of a packed call, by layer.
    """

    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None
    prompt_ids: Tensor | None = None
    prefix_lengths: Tensor | None = None
    prefix_rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    key_starts: Tensor | None = None
    hidden_rows: Tensor | None = None
    captured: dict[int, tuple[Tensor, Tensor]] | None = None

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
    ptengine_prefix: PrefixContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, [B, Tq, H, D_v]."""
    context = ptengine_prefix
    last_layer.announce(module, None if context is None else context.hidden_rows)
    if context is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_dropout(dropout)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As the stock SDPA under autocast: rotary embeddings leave float32 queries and keys beside bf16 values.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True))
    if context.cu_seqlens is None:
        prefix_k, prefix_v = context.prefix(module.layer_idx, query.dtype)  # type: ignore[arg-type]
        out = prefix_attention(
            query, key, value, prefix_k, prefix_v,
            key_starts=_per_row(context.key_starts, query.shape[0]),
            prompt_ids=None if prefix_k is None else _per_row(context.prompt_ids, query.shape[0]),
            prefix_lengths=context.prefix_lengths, causal=causal, scale=scaling,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.transpose(1, 2), None  # [B, Tq, H, D_v]
    # Squeezed, not indexed: the gradient of an index is a copy into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H, D], [N, H_kv, D], [N, H_kv, D_v]
    return _packed(module, q, k, v, context, scaling, causal)[None], None  # [1, N, H, D_v]


def packed_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: PrefixContext, scale: float, dropout: float
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
    """
    last_layer.announce(module, context.hidden_rows)
    _check_dropout(dropout)
    return _packed(module, q, k, v, context, scale, causal=True)


def _check_dropout(dropout: float) -> None:
    if dropout:
        raise InputError(
            f"expected a backbone in eval mode, got attention dropout of {dropout}: dropout is not drawn over a shared "
            "prefix (for gradient checkpointing put the layers alone in training mode)"
        )


def _packed(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: PrefixContext, scale: float | None, causal: bool
) -> Tensor:
    layer: int = module.layer_idx  # type: ignore[assignment]
    assert context.cu_seqlens is not None
    if context.captured is not None:
        context.captured[layer] = (k, v)
    prefix_k, prefix_v = context.prefix(layer, q.dtype)
    out = prefix_attention_varlen(
        q, k, v, prefix_k, prefix_v, context.cu_seqlens, context.max_seqlen,
        prompt_ids=context.prompt_ids, prefix_rows=context.prefix_rows, prefix_lengths=context.prefix_lengths,
        causal=causal, scale=scale,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _per_row(x: Tensor | None, batch: int) -> Tensor | None:
    """Beam search and several sequences per input repeat every row of a batch next to itself."""
    if x is None or x.numel() == batch:
        return x
    return x.repeat_interleave(batch // x.numel())


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
