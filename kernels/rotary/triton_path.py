"""rotary_embedding with a Triton kernel: strides, tiles, launches and the derivative.

A `torch.autograd.Function` and not a `torch.library` operator, whose call takes the host longer than the kernel takes
the device. Imports Triton: to be imported where a kernel runs, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptengine.kernels.launch import architecture, ceil_div
from ptengine.kernels.rotary.tiles import tile
from ptengine.kernels.rotary.triton_kernels import turn_kernel


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotary.apply(q, k, cos, sin)
    return turn(q, k, cos, sin, back=False)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *turn(of_q, of_k, *ctx.saved_tensors, back=True), None, None


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """q [N, H, D] and k [N, H_kv, D] through the rotation or, with `back`, through its transpose; new tensors."""
    out_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    out_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    (tokens, heads, dim), heads_kv, turned = q.shape, k.shape[1], cos.shape[1]
    chosen = tile(architecture(q.device), max(heads, heads_kv), dim, turned, q.element_size())
    programs = tokens * (ceil_div(heads, chosen.heads) + ceil_div(heads_kv, chosen.heads))
    if programs == 0:
        return out_q, out_k
    q, k = _dense_channels(q), _dense_channels(k)
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    with torch.cuda.device_of(q):  # Triton launches on the current device
        turn_kernel[(programs,)](
            out_q, out_k, q, k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0),
            H=heads, H_KV=heads_kv, D=dim, R=turned,
            BLOCK_H=chosen.heads, BLOCK_HALF=chosen.half, BLOCK_REST=chosen.rest, BACK=back,
            num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out_q, out_k


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
