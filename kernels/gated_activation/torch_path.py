"""gated_activation in as few PyTorch operators as it takes; gradients are autograd's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    precision = torch.float64 if gate.dtype == torch.float64 else torch.float32
    x = gate.to(precision)
    if activation == "silu":
        activated = F.silu(x)
    else:
        activated = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (activated * up.to(precision)).to(gate.dtype)
