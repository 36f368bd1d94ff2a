"""The specification of rotary_embedding in the shortest PyTorch; gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotary_embedding`. float64 in, float64 throughout, else float32."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    precision, width = torch.float64 if x.dtype == torch.float64 else torch.float32, cos.shape[-1]
    wide = x[..., :width].to(precision)  # [N, H, R]
    first, second = wide.chunk(2, dim=-1)
    half_turned = torch.cat([-second, first], dim=-1)
    cos, sin = (angle.detach().to(precision).unsqueeze(1) for angle in (cos, sin))  # [N, 1, R]
    turned = (wide * cos + half_turned * sin).to(x.dtype)
    return torch.cat([turned, x[..., width:]], dim=-1)
