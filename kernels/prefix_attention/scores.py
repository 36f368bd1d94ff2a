"""What may be added to a score, and which keys a query sees: the rules every implementation of the operation follows.

Positions are those of the stock computation with the prefix in front of every row: key i of a prefix of P_n tokens has
position i, token t of a row has position P_n + t. Rows without a prompt have P_n = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ScoreRules"]


class ScoreRules(NamedTuple):
    """The keywords of the public functions that change scores; see their docstrings for the meaning of each."""

    causal: bool
    scale: float
    window: int | None = None
    window_includes_prefix: bool = True
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]
    alibi_slopes: Tensor | None = None  # [H]
    relative_bias: Tensor | None = None  # [H, 2 * R + 1]

    @property
    def positional(self) -> bool:
        """Whether scores depend on positions beyond plain causality."""
        return self.window is not None or self.alibi_slopes is not None or self.relative_bias is not None

    def visible(self, q_pos: Tensor, k_pos: Tensor, k_is_prefix: bool) -> Tensor:
        """Which keys a query may see, bool [..., Tq, Tk], of positions [..., Tq] and [..., Tk]."""
        distance = q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)  # [..., Tq, Tk]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None and (self.window_includes_prefix or not k_is_prefix):
            seen = seen & (distance.abs() < self.window)
        return seen

    def bias(self, q_pos: Tensor, k_pos: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to a score after scaling and capping, [..., H, Tq, Tk], or None for nothing."""
        distance = (q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)).unsqueeze(-3)  # [..., 1, Tq, Tk]
        total: Tensor | None = None
        if self.alibi_slopes is not None:
            total = -self.alibi_slopes.to(dtype)[:, None, None] * distance.abs()  # [..., H, Tq, Tk]
        if self.relative_bias is not None:
            heads = torch.arange(self.relative_bias.shape[0], device=distance.device)[:, None, None]  # [H, 1, 1]
            reach = self.relative_bias.shape[1] // 2
            table = self.relative_bias.to(dtype)[heads, (-distance).clamp(-reach, reach) + reach]  # [..., H, Tq, Tk]
            total = table if total is None else total + table
        return total
