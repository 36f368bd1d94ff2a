"""The specification of linear_cross_entropy: what it computes, in as few lines as it takes. Keeps all the logits."""

from __future__ import annotations

import torch

from ptengine.kernels.linear_cross_entropy.checks import check_label_range


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """As `linear_cross_entropy`; the gradient is autograd's. float64 in, float64 throughout, else float32."""
    check_label_range(labels, weight.shape[0], ignore_index)
    precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(precision) @ weight.to(precision).T  # [n, V]
    if bias is not None:
        logits = logits + bias.to(precision)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != ignore_index  # [n]
    lse = torch.logsumexp(logits, dim=1)  # [n]
    picked = logits.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1)  # [n]
    loss = (1.0 - label_smoothing) * (lse - picked) + z_loss * lse.square()
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * (lse - logits.mean(dim=1))
    loss = loss.where(kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)
