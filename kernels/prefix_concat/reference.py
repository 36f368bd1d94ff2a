"""The specification of the operations in the shortest PyTorch: expand the prefix, rotate, concatenate.

Everything is computed in the tensors' own dtype, so float64 arguments give the exact result; gradients are autograd's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ptengine.kernels.prefix_concat.checks import (
    check_block_values,
    check_out_tokens,
    check_packed_values,
    check_prompt_values,
)


def prefix_concat_reference(
    prefix: Tensor,
    rows: Tensor,
    *,
    prompt_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """As `prefix_concat`."""
    check_prompt_values(prompt_ids, prefix.shape[0])
    if prompt_ids is None:
        expanded = prefix.transpose(0, 1).expand(rows.shape[0], -1, -1, -1)  # [B, H_kv, P, D]
    else:
        expanded = prefix[prompt_ids.long()].transpose(1, 2)  # [B, H_kv, P, D]
    if cos is not None and sin is not None:
        rows = _rotate(rows, cos.unsqueeze(-3), sin.unsqueeze(-3))
    return torch.cat([expanded.to(rows.dtype), rows], dim=2)  # [B, H_kv, P + T, D]


def prefix_concat_varlen_reference(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prompt_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefix_concat_varlen`."""
    check_packed_values(prefix, rows, cu_seqlens, max_seqlen, prompt_ids, prefix_lengths)
    prompts = prefix[None] if prompt_ids is None else prefix  # [N, P, H_kv, D]
    count = cu_seqlens.shape[0] - 1
    ids = [0] * count if prompt_ids is None else prompt_ids.tolist()
    sizes = [prompts.shape[1]] * len(prompts) if prefix_lengths is None else prefix_lengths.tolist()
    if cos is not None and sin is not None:
        rows = _rotate(rows, cos.unsqueeze(-2), sin.unsqueeze(-2))
    pieces, bounds = [rows[:0]], [0]
    for prompt, (start, end) in zip(ids, pairwise(cu_seqlens.tolist()), strict=True):
        size = 0 if prompt < 0 else sizes[prompt]
        pieces += [prompts[prompt, :size].to(rows.dtype), rows[start:end]]
        bounds.append(bounds[-1] + size + end - start)
    check_out_tokens(out_tokens, bounds[-1])
    return torch.cat(pieces), torch.tensor(bounds, dtype=cu_seqlens.dtype, device=rows.device)


def prefix_concat_paged_reference(
    prefix: Tensor,
    rows: Tensor,
    cache: Tensor,
    block_table: Tensor,
    *,
    prompt_ids: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """As `prefix_concat_paged`."""
    tokens = prefix_concat_reference(prefix, rows, prompt_ids=prompt_ids, cos=cos, sin=sin)  # [B, H_kv, P + T, D]
    check_block_values(block_table, cache, tokens.shape[2])
    for b in range(tokens.shape[0]):
        for j in range(tokens.shape[2]):
            cache[block_table[b, j // cache.shape[1]], j % cache.shape[1]] = tokens[b, :, j]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first D_rot channels, in x's dtype, as transformers applies it."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.detach().to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.detach().to(x.dtype)
    return torch.cat([turned, rest], dim=-1)
