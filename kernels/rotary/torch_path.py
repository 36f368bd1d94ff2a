"""rotary_embedding in as few PyTorch operators as it takes; gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    angles = [
        half for angle in (cos, sin) for half in angle.detach().to(precision).unsqueeze(1).chunk(2, dim=-1)
    ]  # [N, 1, R / 2] each
    return _turn(q, *angles), _turn(k, *angles)


def _turn(x: Tensor, cos_first: Tensor, cos_second: Tensor, sin_first: Tensor, sin_second: Tensor) -> Tensor:
    half = cos_first.shape[-1]
    first = x[..., :half].to(cos_first.dtype)  # [N, H, R / 2]
    second = x[..., half : 2 * half].to(cos_first.dtype)
    new_first = torch.addcmul(first * cos_first, second, sin_first, value=-1)
    new_second = torch.addcmul(second * cos_second, first, sin_second)
    # Concatenated in the wide dtype, the result would be rounded by one more pass over it.
    return torch.cat([new_first.to(x.dtype), new_second.to(x.dtype), x[..., 2 * half :]], dim=-1)
