"""Attention to tokens that stand beside the text under a softmax of their own (LLaMA-Adapter).

Every adapted layer projects its tokens with its own frozen key and value projections, attends to them apart from the
text, scales the result by a gate per head and adds it to attention's output, before the output projection. The tokens
have no positions, windows do not reach them, and no mask hides them. Two attention calls: a prefix inside the one
softmax cannot give these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptengine.backbone.lowering import FixedPrompt, GatedTokens
from ptengine.backbone.spec import BackboneSpec
from ptengine.errors import InputError, UnsupportedModelError

__all__ = ["GATED_MODEL_TYPES", "GatedPart", "add_gated", "check_gated", "gated_parts"]

# Families whose keys and values are those of `k_proj` and `v_proj`, changed by nothing but a `k_norm` of each head and
# the rotary embedding.
GATED_MODEL_TYPES = ("gemma", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class GatedPart:
    """One prompt as the layers read it.

    Attributes:
        keys, values: [P, H_kv, D], by layer.
        gates: [H], by layer.
        readers: int64 [n], which positions of a packed call, or rows of a stock batch, read it; None for all.
        num_rows: of the stock batch, which searches may repeat; 0 for a packed call.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    gates: dict[int, Tensor]
    readers: Tensor | None = None
    num_rows: int = 0


def check_gated(spec: BackboneSpec, prompt: GatedTokens) -> None:
    """Refuse a model whose projections are not known, and tokens that do not fit its width, heads or layers."""
    if spec.model_type not in GATED_MODEL_TYPES or spec.kind != "causal" or spec.path != "shared":
        raise UnsupportedModelError(
            f"model type {spec.model_type!r} is not supported with tokens that layers attend to apart: they are "
            f"projected as in {', '.join(GATED_MODEL_TYPES)}"
        )
    got = (prompt.embeds.shape[2], prompt.gates.shape[1])
    if got != (spec.hidden_size, spec.num_heads) or not all(0 <= layer < spec.num_layers for layer in prompt.layers):
        raise InputError(
            f"expected gated tokens of width {spec.hidden_size} with {spec.num_heads} heads in layers 0 to "
            f"{spec.num_layers - 1}, got {got[0]} with {got[1]} in {list(prompt.layers)}"
        )


def gated_parts(
    spec: BackboneSpec, prompts: Sequence[FixedPrompt], prompt_of: Tensor | None, num_rows: int = 0
) -> tuple[GatedPart, ...]:
    """Those of the prompts that stand beside the text and are read, projected.

    Args:
        spec: of a model that `ptengine.backbone.step.check_fit` found fit for them.
        prompts: N.
        prompt_of: int64, the prompt of every packed position or stock row, -1 for none; None where all have the only
            one, which is not asked then: a GPU would be waited for.
        num_rows: of a stock batch.
    """
    parts = []
    weight = spec.word_embeddings.weight
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, GatedTokens):
            continue
        readers = None if prompt_of is None else (prompt_of == index).nonzero()[:, 0]  # [n]
        if readers is not None and not len(readers):
            continue
        layers: Any = spec.base_model.layers
        keys, values = {}, {}
        for layer, tokens in zip(prompt.layers, prompt.embeds.to(weight.device, weight.dtype).unbind(0), strict=True):
            attention = layers[layer].self_attn
            heads = attention.k_proj(tokens).unflatten(-1, (spec.num_kv_heads, spec.head_dim))  # [P, H_kv, D]
            keys[layer] = attention.k_norm(heads) if hasattr(attention, "k_norm") else heads
            values[layer] = attention.v_proj(tokens).unflatten(-1, (spec.num_kv_heads, spec.value_dim))
        gates = dict(zip(prompt.layers, prompt.gates.to(weight.device).unbind(0), strict=True))
        everywhere = readers is None or prompt_of is None or len(readers) == len(prompt_of)
        parts.append(GatedPart(keys, values, gates, None if everywhere else readers, num_rows))
    return tuple(parts)


def add_gated(out: Tensor, q: Tensor, parts: Sequence[GatedPart], layer: int, scale: float | None) -> Tensor:
    """Attention's output plus what its queries read of the prompts.

    Args:
        out: [N, H, D_v] of a packed call, or [B, T, H, D_v] of a stock batch.
        q: [N, H, D] or [B, T, H, D], rotated.
        parts: from `gated_parts`.
        layer: its index.
        scale: of the scores; None for one over the root of D.
    """
    for part in parts:
        if layer not in part.gates:
            continue
        readers = part.readers
        if readers is None:
            out = out + _read(q, part, layer, scale)
            continue
        if part.num_rows and q.shape[0] != part.num_rows:  # a beam search repeats every row next to itself
            times = q.shape[0] // part.num_rows
            readers = (readers[:, None] * times + torch.arange(times, device=readers.device)).flatten()
        out = out.index_add(0, readers, _read(q[readers], part, layer, scale))
    return out


def _read(q: Tensor, part: GatedPart, layer: int, scale: float | None) -> Tensor:
    """Gated attention of queries [..., H, D] to one prompt: [..., H, D_v], in the dtype of the queries."""
    keys, values = (x[layer].to(q.dtype).transpose(0, 1) for x in (part.keys, part.values))  # [H_kv, P, D]
    heads = keys.shape[0]
    # The query heads that share a key head are queries of that head: no key is repeated.
    grouped = q.reshape(-1, heads, q.shape[-2] // heads, q.shape[-1]).transpose(0, 1)  # [H_kv, n, G, D]
    read = F.scaled_dot_product_attention(grouped.flatten(1, 2)[None], keys[None], values[None], scale=scale)[0]
    read = read.unflatten(1, grouped.shape[1:3]).transpose(0, 1).reshape(*q.shape[:-1], -1)  # [..., H, D_v]
    return read * part.gates[layer].to(q.dtype)[:, None]
