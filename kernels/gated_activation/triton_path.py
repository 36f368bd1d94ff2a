"""gated_activation with Triton kernels: strides, tiles, launches and the derivative.

A `torch.autograd.Function` and not a `torch.library` operator, whose call takes the host longer than the kernel takes
the device. Imports Triton: to be imported where a kernel runs, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptengine.kernels.gated_activation.tiles import tile
from ptengine.kernels.gated_activation.triton_kernels import backward_kernel, forward_kernel
from ptengine.kernels.launch import architecture, ceil_div


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedActivation.apply(gate, up, activation)
    return forward(gate, up, activation)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *backward(of_out, gate, up, ctx.activation), None


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As gate, contiguous."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    columns, ((gate, stride_gate), (up, stride_up)) = _rows_of(gate, up)
    chosen = tile(architecture(out.device), columns)
    tiles = ceil_div(columns, chosen.columns)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        forward_kernel[(out.numel() // columns * tiles,)](
            out, gate, up, stride_gate, stride_up, columns, tiles,
            ACTIVATION=activation, BLOCK=chosen.columns, num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def backward(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As gate, both contiguous."""
    of_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    of_up = torch.empty_like(of_gate)
    if of_gate.numel() == 0:
        return of_gate, of_up
    columns, ((of_out, stride_of_out), (gate, stride_gate), (up, stride_up)) = _rows_of(of_out, gate, up)
    chosen = tile(architecture(of_out.device), columns)
    tiles = ceil_div(columns, chosen.columns)
    with torch.cuda.device_of(of_out):
        backward_kernel[(of_gate.numel() // columns * tiles,)](
            of_gate, of_up, of_out, gate, up, stride_of_out, stride_gate, stride_up, columns, tiles,
            ACTIVATION=activation, BLOCK=chosen.columns, num_warps=chosen.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return of_gate, of_up


def _rows_of(*tensors: Tensor) -> tuple[int, list[tuple[Tensor, int]]]:
    """How long a row is, and each tensor with its rows' stride; a copy where there is no such stride.

    All elements are one row where all tensors are contiguous: its stride, of which there is no use, is 0.
    """
    if all(x.is_contiguous() for x in tensors):
        return tensors[0].numel(), [(x, 0) for x in tensors]
    columns, rows = tensors[0].shape[-1], []
    for x in tensors:
        stride = _row_stride(x)
        rows.append((x.contiguous(), columns) if stride is None else (x, stride))
    return columns, rows


def _row_stride(x: Tensor) -> int | None:
    """From each row [columns] of x to the next; None where there is no one stride."""
    if x.stride(-1) != 1:
        return None
    sizes, found = 1, 0  # of the leading dimensions that have been seen, from the last on
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if sizes == 1:
            found = stride
        elif stride != found * sizes:
            return None
        sizes *= size
    return found
