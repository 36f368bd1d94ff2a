"""The specification of rms_norm in the shortest PyTorch; gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """As `rms_norm`. float64 in, float64 throughout, else float32."""
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(precision)  # [..., D]
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)  # [..., 1]
    return (wide * rstd * (offset + weight.to(precision))).to(x.dtype)
