"""rms_norm with Triton kernels: strides, tiles, launches and the derivative.

A `torch.autograd.Function` and not a `torch.library` operator, whose call takes the host longer than the kernel takes
the device. Imports Triton: to be imported where a kernel runs, not before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptengine.kernels.launch import architecture, ceil_div
from ptengine.kernels.rms_norm.tiles import tile
from ptengine.kernels.rms_norm.triton_kernels import backward_kernel, forward_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps, offset)
    return forward(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, offset
        return forward(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        return backward(of_out, x, weight, *ctx.constants), None, None, None


def forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """[..., D], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    dim = x.shape[-1]
    rows, chosen, source = out.numel() // dim, tile(architecture(x.device), dim), _rows_of(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        forward_kernel[(ceil_div(rows, chosen.rows),)](
            out, source.tensor, _dense(weight), source.stride_outer, source.stride_inner, rows, eps, offset,
            D=dim, INNER=source.inner, BLOCK_N=chosen.rows, BLOCK_D=chosen.columns,
            num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def backward(of_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """[..., D], contiguous."""
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if of_x.numel() == 0:
        return of_x
    dim = x.shape[-1]
    rows, chosen = of_x.numel() // dim, tile(architecture(x.device), dim)
    source, gradient = _alike(_rows_of(x), _rows_of(of_out))
    with torch.cuda.device_of(x):
        backward_kernel[(ceil_div(rows, chosen.rows),)](
            of_x, gradient.tensor, source.tensor, _dense(weight),
            gradient.stride_outer, gradient.stride_inner, source.stride_outer, source.stride_inner, rows, eps, offset,
            D=dim, INNER=source.inner, BLOCK_N=chosen.rows, BLOCK_D=chosen.columns,
            num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return of_x


class _Rows(NamedTuple):
    """Where row i of a tensor [..., D] lies: at i // inner * stride_outer + i % inner * stride_inner."""

    tensor: Tensor
    inner: int
    stride_outer: int
    stride_inner: int


def _rows_of(x: Tensor) -> _Rows:
    """Of x, or of a copy where its leading dimensions have more than two strides between them."""
    if x.is_contiguous():
        return _Rows(x, 1, x.shape[-1], 0)
    groups: list[tuple[int, int]] = []  # sizes and strides of leading dimensions that are one
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if groups and groups[-1][1] == size * stride:
            groups[-1] = groups[-1][0] * size, stride
        elif size > 1:
            groups.append((size, stride))
    if x.stride(-1) != 1 or len(groups) > 2:
        return _Rows(x.contiguous(), 1, x.shape[-1], 0)
    if len(groups) == 2:
        return _Rows(x, groups[1][0], groups[0][1], groups[1][1])
    return _Rows(x, 1, groups[0][1] if groups else 0, 0)


def _alike(x: _Rows, other: _Rows) -> tuple[_Rows, _Rows]:
    """Both with the same `inner`."""
    if x.inner != 1 and other.inner not in (1, x.inner):
        other = _rows_of(other.tensor.contiguous())
    inner = max(x.inner, other.inner)
    return _split(x, inner), _split(other, inner)


def _split(x: _Rows, inner: int) -> _Rows:
    return x if x.inner == inner else _Rows(x.tensor, inner, inner * x.stride_outer, x.stride_outer)


def _dense(weight: Tensor) -> Tensor:
    return weight if weight.stride(0) == 1 else weight.contiguous()
