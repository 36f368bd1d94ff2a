"""One rectangle of attention in plain PyTorch: queries against keys, forward and backward, for the CPU path.

A row's attention is the merge of two rectangles, its prefix and its own keys. Because the backward of a rectangle needs
only the *merged* output and log-sum-exp, each rectangle is differentiated alone and exactly (the argument of
FlashAttention-2, section 3.1, applied across rectangles). Knows nothing of prompts, rows or packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_backward", "block_forward"]

_aten = torch.ops.aten


def block_forward(
    q: Tensor,  # [G, H, Tq, D]
    k: Tensor,  # [G, H_kv, Tk, D]
    v: Tensor,  # [G, H_kv, Tk, D]
    causal: bool,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One rectangle: out [G, H, Tq, D] and log-sum-exp [G, H, Tq], -inf where a query sees nothing.

    `bias` is added to the scaled (and capped) scores, broadcast to [G, H, Tq, Tk]; -inf hides a key. `causal` aligns
    the rectangle at its upper left corner.
    """
    k, v = _expand_heads(k, q), _expand_heads(v, q)  # [G, H, Tk, D]
    if _fused(q, v, scale, softcap):
        q, k, v, bias = _unit_stride(q), _unit_stride(k), _unit_stride(v), _full_bias(bias, q, k)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        if bias is not None:  # the fused kernel reports 0 where nothing is seen
            lse = lse.masked_fill((bias == float("-inf")).all(-1), float("-inf"))
        return out, lse
    scores, _ = _scores(q, k, causal, bias, scale, softcap)
    lse = torch.logsumexp(scores, dim=-1)  # [G, H, Tq]
    return torch.exp(scores - _finite(lse)[..., None]) @ v, lse


def block_backward(
    grad: Tensor,  # [G, H, Tq, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # [G, H, Tq, D], merged over all rectangles of these queries
    lse: Tensor,  # [G, H, Tq], merged likewise
    causal: bool,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [G, H, Tq, D], k and v [G, H_kv, Tk, D] through this rectangle alone."""
    kv_heads = k.shape[1]
    k, v, lse = _expand_heads(k, q), _expand_heads(v, q), _finite(lse)
    if _fused(q, v, scale, softcap):
        q, k, v, out = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(out)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_full_bias(bias, q, k), scale=scale
        )
    else:
        scores, slope = _scores(q, k, causal, bias, scale, softcap)
        p = torch.exp(scores - lse[..., None])  # [G, H, Tq, Tk]
        dv = p.transpose(-1, -2) @ grad  # [G, H, Tk, D]
        delta = (grad * out).sum(-1, keepdim=True)  # [G, H, Tq, 1]
        ds = p * (grad @ v.transpose(-1, -2) - delta)  # [G, H, Tq, Tk]
        ds = ds * scale if slope is None else ds * slope * scale
        dq, dk = ds @ k, ds.transpose(-1, -2) @ q
    return dq, _sum_heads(dk, kv_heads), _sum_heads(dv, kv_heads)


def _fused(q: Tensor, v: Tensor, scale: float, softcap: float | None) -> bool:
    """Whether PyTorch's fused CPU kernel computes this rectangle: it knows no capping, one width of heads, and scales
    above zero, since it scales what it has hidden with -inf, too."""
    known = softcap is None and scale > 0 and q.shape[-1] == v.shape[-1]
    return known and q.device.type == "cpu" and q.numel() > 0 and v.numel() > 0


def _unit_stride(x: Tensor) -> Tensor:
    """The fused kernel assumes the numbers of a head lie side by side and is silently wrong where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scores(
    q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [G, H, Tq, Tk] with hidden keys at -inf, and the derivative of the capping."""
    scores = (q @ k.transpose(-1, -2)) * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    if bias is not None:
        scores = scores + bias
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)  # [Tq, Tk]
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, slope


def _full_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    """[G, H_kv, T, D] -> [G, H, T, D], each key head repeated for its group of query heads."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[G, H, T, D] -> [G, H_kv, T, D], the adjoint of `_expand_heads`."""
    if x.shape[1] == kv_heads:
        return x
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)


def _finite(lse: Tensor) -> Tensor:
    """A query that sees nothing has weights exp(-inf - 0) = 0 rather than exp(-inf + inf)."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
