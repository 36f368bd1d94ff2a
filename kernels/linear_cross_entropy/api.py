"""The public function linear_cross_entropy: checks and dispatch. It knows tensors only, no model."""

from __future__ import annotations

import torch

from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.linear_cross_entropy.checks import check_arguments
from ptengine.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from ptengine.kernels.linear_cross_entropy.torch_path import linear_cross_entropy_torch

OP = "linear_cross_entropy"
register(OP, "reference", linear_cross_entropy_reference)
register(OP, "torch", linear_cross_entropy_torch)


def linear_cross_entropy(
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
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels` for a frozen head, with no [n, V] tensor kept.

    For row i with logits l = hidden[i] @ weight.T + bias, capped to softcap * tanh(l / softcap) if asked, and
    lse = log(sum_v exp(l[v])):

        loss[i] = (1 - label_smoothing) * (lse - l[labels[i]]) + label_smoothing * mean_v(lse - l[v]) + z_loss * lse**2

    Label smoothing is Szegedy et al. 2016 (arXiv:1512.00567), section 7, as in torch.nn.functional.cross_entropy; the
    z-loss is PaLM's (arXiv:2204.02311), section 5. With reduction="none" and neither of them, -loss is log p(label).

    Args:
        hidden: [n, d], float64, float32, bfloat16 or float16. The only argument with a gradient.
        weight: [V, d], frozen. Any strides.
        labels: int64 [n], each in [0, V) or ignore_index.
        bias: [V], frozen, or None. -inf removes a word.
        softcap: the cap of the logits, above 0, or None.
        label_smoothing: in [0, 1).
        z_loss: at least 0.
        ignore_index: the label of rows whose loss and gradient are 0. Such rows cost as much as others: leave them out
            of `hidden` where that is easy.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`.

    Returns:
        A scalar, or [n] with reduction="none": float64 for float64 input, else float32. The mean over no row at all
        (n = 0, or every label ignored) is 0 with zero gradient, where torch gives NaN, so that a micro-batch without a
        label leaves an accumulated gradient as it is; a caller who needs a label counts them. A row whose logits are
        all -inf, or hold a NaN or +inf, gives NaN.

    Dtypes: hidden, weight and bias may differ among the 32- and 16-bit dtypes; float64 goes with float64 only. Softmax
    and sums are in the result's dtype. Matrix products are too on a CPU; elsewhere they are in the narrower of hidden's
    and weight's dtype. torch.autocast changes nothing.

    Memory: the "torch" backend computes hidden's gradient in the forward pass, when it needs one, and keeps it: [n, d]
    in the result's dtype. Its workspace is about 32 MiB of logits, whatever n and V are. Differentiating twice is an
    error. It is deterministic: the same call gives the same bits.

    Raises:
        ValueError: a shape, dtype, device or scalar that is not as above; a weight or bias that requires grad while
            grad is enabled; a label out of range. Labels are looked at on a CPU only, since looking would make the host
            wait for the device: elsewhere a label out of range gives NaN with "torch".
    """
    check_arguments(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, reduction)
    run = implementation(OP, resolve_backend(backend, hidden.device, OP))
    return run(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        reduction=reduction,
    )
