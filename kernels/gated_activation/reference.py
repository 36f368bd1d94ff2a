"""The specification of gated_activation in the shortest PyTorch; gradients are autograd's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """As `gated_activation`. float64 in, float64 throughout, else float32."""
    precision = torch.float64 if gate.dtype == torch.float64 else torch.float32
    x = gate.to(precision)
    if activation == "silu":
        activated = x * torch.sigmoid(x)
    elif activation == "gelu":
        activated = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    else:
        activated = x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return (activated * up.to(precision)).to(gate.dtype)
