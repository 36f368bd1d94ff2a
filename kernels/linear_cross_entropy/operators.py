"""linear_cross_entropy as `torch.library` operators, so that torch.compile, fake tensors and autograd see through it.

One operator for all implementations but the reference, and its backward: what is kept for backward is one [n, d]
tensor, made in the forward pass. Eager calls skip the operators, see `eager.shortcut`. Triton is imported inside them,
where torch.compile does not look.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ptengine.kernels.eager import shortcut
from ptengine.kernels.linear_cross_entropy import torch_path
from ptengine.kernels.linear_cross_entropy.checks import check_label_range
from ptengine.kernels.linear_cross_entropy.products import precision


def reduced(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
    triton: bool,
) -> torch.Tensor:
    """As `linear_cross_entropy`, arguments checked: in Triton, or in PyTorch."""
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    loss, _ = _call_rows(
        hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, with_gradient, triton
    )
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (labels != ignore_index).sum().clamp(min=1)


def _rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    with_gradient: bool,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row [n] and its gradient with respect to that row of hidden [n, d] ([0, d] if not asked for)."""
    check_label_range(labels, weight.shape[0], ignore_index)
    compute = torch_path.rows
    if triton:
        from ptengine.kernels.linear_cross_entropy import triton_path

        compute = triton_path.rows
    kind = hidden.device.type
    # Operands as they are: autocast would round them a second time, and only some of the calls inside.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return compute(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, with_gradient)


rows = torch.library.custom_op("ptengine::linear_cross_entropy_rows", mutates_args=())(_rows)


@rows.register_fake
def _(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, with_gradient, triton):  # type: ignore[no-untyped-def]
    n, d = hidden.shape
    dtype = precision(hidden)
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n if with_gradient else 0, d, dtype=dtype)


def _backward(gradient: torch.Tensor, of_loss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the kept gradient [n, d] times the gradient of their loss [n].

    An operator without a derivative, so that a second differentiation is an error instead of a wrong number.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, of_loss.unsqueeze(1), out=out)  # rounded on the way, not in a pass of its own


backward = torch.library.custom_op("ptengine::linear_cross_entropy_backward", mutates_args=())(_backward)


@backward.register_fake
def _(gradient, of_loss, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient, dtype=dtype)


_call_backward = shortcut(backward, _backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _differentiate(ctx, of_loss, _of_gradient):  # type: ignore[no-untyped-def]
    (gradient,) = ctx.saved_tensors
    return _call_backward(gradient, of_loss, ctx.dtype), *[None] * 9


rows.register_autograd(_differentiate, setup_context=_setup_context)
_call_rows = shortcut(rows, _rows, _setup_context, _differentiate)
