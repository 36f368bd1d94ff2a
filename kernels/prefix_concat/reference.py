"""The specification of prefix_concat: expand the prefix and concatenate."""

from __future__ import annotations

import torch

from ptengine.kernels.prefix_concat.checks import check_prompt_range


def prefix_concat_reference(
    prefix: torch.Tensor, rows: torch.Tensor, *, prompt_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """As `prefix_concat`; the gradient is autograd's, summed over the batch in the prefix's dtype."""
    check_prompt_range(prompt_ids, prefix.shape[0])
    if prompt_ids is None:
        expanded = prefix.transpose(0, 1).expand(rows.shape[0], -1, -1, -1)  # [B, H_kv, P, D]
    else:
        expanded = prefix[prompt_ids.long()].transpose(1, 2)  # [B, H_kv, P, D]
    return torch.cat([expanded.to(rows.dtype), rows], dim=2)  # [B, H_kv, P + T, D]
