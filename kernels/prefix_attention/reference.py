"""The specification: one row at a time, its prefix put in front, plain softmax.

Runs on any device in any floating dtype (half types are computed in fp32, fp64 in fp64) and is differentiated by
autograd. Slow on purpose; everything else is measured against it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ptengine.kernels.prefix_attention.scores import ScoreRules
from ptengine.kernels.prefix_attention.values import check_dense_values, check_packed_values

__all__ = ["prefix_attention", "prefix_attention_varlen"]


def prefix_attention_varlen(
    q: Tensor,  # [total, H, D]
    k: Tensor,  # [total, H_kv, D]
    v: Tensor,  # [total, H_kv, D_v]
    prefix_k: Tensor | None,  # [N, P, H_kv, D]
    prefix_v: Tensor | None,  # [N, P, H_kv, D_v]
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prompt_ids: Tensor | None,
    prefix_rows: Tensor | None,
    prefix_lengths: Tensor | None,
    rules: ScoreRules,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `ptengine.kernels.prefix_attention.prefix_attention_varlen`; returns out and lse."""
    check_packed_values(q.shape[0], cu_seqlens, max_seqlen, prefix_k, prompt_ids, prefix_rows, prefix_lengths)
    bounds = cu_seqlens.tolist()
    outs, lses = [], []
    for row, (start, end) in enumerate(pairwise(bounds)):
        pk, pv = k[:0], v[:0]
        if prefix_rows is not None and (source := int(prefix_rows[row])) >= 0:
            pk, pv = k[bounds[source] : bounds[source + 1]], v[bounds[source] : bounds[source + 1]]  # [P_n, H_kv, D]
        elif prefix_k is not None and prefix_v is not None:
            pk, pv = _prompt(prefix_k, prefix_v, prompt_ids, prefix_lengths, row)
        out, lse = _attend(q[start:end], k[start:end], v[start:end], pk, pv, 0, rules)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return _attend(q, k, v, k, v, 0, rules)  # of no tokens, and part of the graph all the same
    return torch.cat(outs), torch.cat(lses, dim=1)  # [total, H, D_v], [H, total]


def prefix_attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, H_kv, Tk, D]
    v: Tensor,  # [B, H_kv, Tk, D_v]
    prefix_k: Tensor | None,  # [N, P, H_kv, D]
    prefix_v: Tensor | None,  # [N, P, H_kv, D_v]
    *,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    rules: ScoreRules,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `ptengine.kernels.prefix_attention.prefix_attention`; returns out and lse."""
    check_dense_values(k, key_lengths, key_starts, prefix_k, prompt_ids, prefix_lengths)
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    rows_out, rows_lse = [], []
    for row in range(batch):
        start = 0 if key_starts is None else int(key_starts[row])
        end = k_len if key_lengths is None else int(key_lengths[row])
        first = max(start - (k_len - q_len), 0)  # first query that is a token, not left padding
        last = max(end - (k_len - q_len), first)  # one past the last that is not right padding
        pk, pv = k[row, :, :0].transpose(0, 1), v[row, :, :0].transpose(0, 1)
        if prefix_k is not None and prefix_v is not None:
            pk, pv = _prompt(prefix_k, prefix_v, prompt_ids, prefix_lengths, row)
        out, lse = _attend(
            q[row, :, first:last].transpose(0, 1),  # [T, H, D]
            k[row, :, start:end].transpose(0, 1),  # [S, H_kv, D]
            v[row, :, start:end].transpose(0, 1),
            pk,
            pv,
            first + k_len - q_len - start,
            rules,
        )
        padding = (first, q_len - last)
        rows_out.append(torch.nn.functional.pad(out, (0, 0, 0, 0, *padding)).transpose(0, 1))  # [H, Tq, D_v]
        rows_lse.append(torch.nn.functional.pad(lse, padding, value=float("-inf")))  # [H, Tq]
    if not rows_out:
        lse = q.new_zeros(0, heads, q_len, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        return q[..., :1] * v.new_zeros(v.shape[3]), lse
    return torch.stack(rows_out), torch.stack(rows_lse)


def _prompt(
    prefix_k: Tensor, prefix_v: Tensor, prompt_ids: Tensor | None, prefix_lengths: Tensor | None, row: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [P_n, H_kv, D] of the prompt that `row` reads; none of length 0."""
    prompt = 0 if prompt_ids is None else int(prompt_ids[row])
    if prompt < 0:
        return prefix_k.flatten(0, 1)[:0], prefix_v.flatten(0, 1)[:0]
    length = prefix_k.shape[1] if prefix_lengths is None else int(prefix_lengths[prompt])
    return prefix_k[prompt, :length], prefix_v[prompt, :length]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, offset: int, rules: ScoreRules
) -> tuple[Tensor, Tensor]:
    """One row: query t of q [T, H, D] is token offset + t of its keys [S, H_kv, D]. Returns [T, H, D_v], [H, T]."""
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    num_prefix, groups = prefix_k.shape[0], q.shape[1] // k.shape[1]
    keys = torch.cat([prefix_k, k]).to(dtype).repeat_interleave(groups, dim=1)  # [P + S, H, D]
    values = torch.cat([prefix_v, v]).to(dtype).repeat_interleave(groups, dim=1)  # [P + S, H, D_v]
    q_pos = num_prefix + offset + torch.arange(q.shape[0], device=q.device)  # [T]
    k_pos = torch.arange(keys.shape[0], device=q.device)  # [P + S]

    scores = torch.einsum("thd,shd->hts", q.to(dtype), keys) * rules.scale  # [H, T, P + S]
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    bias = rules.bias(q_pos, k_pos, dtype)
    if bias is not None:
        scores = scores + bias
    seen = torch.cat(
        [rules.visible(q_pos, k_pos[:num_prefix], True), rules.visible(q_pos, k_pos[num_prefix:], False)], dim=-1
    )  # [T, P + S]
    scores = scores.masked_fill(~seen, float("-inf"))
    if rules.sinks is not None:
        sinks = rules.sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)  # [H, T, 1]
        scores = torch.cat([scores, sinks], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)  # [H, T]
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])  # nothing seen: zeros
    out = torch.einsum("hts,shd->thd", weights[..., : keys.shape[0]], values)  # [T, H, D_v]
    return out.to(q.dtype), lse if dtype == torch.float64 else lse.float()
