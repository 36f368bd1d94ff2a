"""How much attention each token of a text receives in a frozen model, without keeping a matrix of attention.

`attention_colsum` is the computation on queries and keys; `attention_received` takes them from a model as it runs,
through transformers' attention interface, and puts everything back. Knows tensors and models; no words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptengine.backbone.modes import eval_mode
from ptengine.backbone.patching import is_patched
from ptengine.backbone.spec import backbone_spec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["attention_colsum", "attention_received"]

IMPLEMENTATION = "ptengine_colsum"
BLOCK = 256

_RECORDED: ContextVar[dict[int, Tensor] | None] = ContextVar("attention received by layer", default=None)


def attention_colsum(query: Tensor, key: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """What every key receives from all queries: colsum_j = sum over q of softmax_j(query_q . key_j * scale).

    Blocks of queries, so that [H, 256, T] scores are held at a time; a softmax in fp32 at least.

    Args:
        query: [H, T, D].
        key: [H_kv, T, D]; each head serves H / H_kv query heads in a row.
        scale: of the scores.
        seen: bool [T, T], True where the query (row) sees the key; None means causal.

    Returns:
        [H, T], fp32, or fp64 for fp64 input; every row sums to the number of queries that see anything.
    """
    heads, length, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[0], dim=0)  # [H, T, D]
    wide = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(heads, length, dtype=wide, device=query.device)
    columns = torch.arange(length, device=query.device)
    for start in range(0, length, BLOCK):
        part = query[:, start : start + BLOCK]  # [H, b, D]
        rows = columns[start : start + BLOCK]  # [b]
        visible = rows[:, None] >= columns if seen is None else seen[start : start + BLOCK]  # [b, T]
        scores = (part.to(wide) @ key.to(wide).transpose(1, 2)) * scale  # [H, b, T]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)  # [H, b, T]
        total += torch.nan_to_num(weights).sum(dim=1)  # a query that sees nothing gives nothing
    return total


@torch.no_grad()
def attention_received(model: Any, input_ids: Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
    """Mean attention each token receives: over `layers`, heads, and the queries that see it.

    The last token of a causal model is seen by itself alone, so the last values say little.

    Args:
        model: a supported transformers model, not patched; it is run once, in eval mode, and left as it was.
        input_ids: T tokens.
        layers: indices; None means all.

    Returns:
        fp32 [T], on the CPU.

    Raises:
        InputError: no tokens or too many, a layer there is none of, or a patched model.
        UnsupportedModelError: a model whose attention does not go through transformers' interface, or whose scores
            follow further rules (a soft cap, sinks).
    """
    spec = backbone_spec(model)
    chosen = range(spec.num_layers) if layers is None else layers
    if is_patched(model):
        raise InputError("expected a model that is not patched to read attention from: call ptengine.unpatch first")
    if not 1 <= len(input_ids) <= spec.max_positions:
        raise InputError(f"expected 1 to {spec.max_positions} tokens to read attention from, got {len(input_ids)}")
    if not chosen or any(not 0 <= layer < spec.num_layers for layer in chosen):
        raise InputError(f"expected layers from 0 to {spec.num_layers - 1}, got {list(chosen)}")
    device = spec.word_embeddings.weight.device
    recorded: dict[int, Tensor] = {}
    with _recording(model, recorded), eval_mode(model):
        spec.base_model(input_ids=torch.tensor([list(input_ids)], device=device))
    missing = [layer for layer in chosen if layer not in recorded]
    if missing:
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported here: its layer {missing[0]} does not call transformers' "
            "attention interface"
        )
    return torch.stack([recorded[layer] for layer in chosen]).mean(dim=0)  # [T]


@contextmanager
def _recording(model: nn.Module, recorded: dict[int, Tensor]) -> Iterator[None]:
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    token = _RECORDED.set(recorded)
    try:
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        _RECORDED.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H_kv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock attention that also records what every key receives."""
    recorded = _RECORDED.get()
    assert recorded is not None  # nobody else calls by this name
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"its attention scores follow {name}, which is not read here")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None:
        mask = attention_mask[0, 0]  # [T, T], bool or added to the scores
        seen = mask if mask.dtype == torch.bool else mask >= 0
    else:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
        seen = seen.tril() if causal else seen
    sums = attention_colsum(query[0], key[0], scale, seen)  # [H, T]
    layer: int = module.layer_idx  # type: ignore[assignment]
    recorded[layer] = (sums.mean(dim=0) / seen.sum(dim=0).clamp(min=1)).float().cpu()  # [T]
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
