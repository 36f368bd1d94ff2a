"""The two matrix products of linear_cross_entropy: half operands, float32 results. Knows matrices, no vocabulary."""

from __future__ import annotations

import torch


def precision(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of logits, sums and results."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def narrower_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the tensor cores take both operands."""
    return weight.dtype if weight.dtype.itemsize < hidden.dtype.itemsize else hidden.dtype


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out = left @ right, rounded to out's dtype only: never to a narrower one of the operands."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif out.device.type == "cuda":
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(left: torch.Tensor, right: torch.Tensor, accumulator: torch.Tensor) -> None:
    """accumulator += left @ right, the operands in right's dtype, the sum in the accumulator's."""
    left = left.to(right.dtype)
    if right.dtype == accumulator.dtype:
        accumulator.addmm_(left, right)
    elif accumulator.device.type == "cuda":
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(left.to(accumulator.dtype), right.to(accumulator.dtype))
