"""The public function linear_cross_entropy: checks and dispatch. It knows tensors only, no model."""

from __future__ import annotations

from functools import partial

import torch

from ptengine.kernels import launch
from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.linear_cross_entropy.checks import check_arguments
from ptengine.kernels.linear_cross_entropy.operators import reduced
from ptengine.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

OP = "linear_cross_entropy"
register(OP, "reference", linear_cross_entropy_reference)
register(OP, "torch", partial(reduced, triton=False))
launch.register_kernel(OP, partial(reduced, triton=True))


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

    Dtypes: hidden, weight and bias may differ among the 32- and 16-bit dtypes; float64 goes with float64 only, and not
    with "triton". Softmax and sums are in the result's dtype. On CUDA, and with "triton" anywhere, the operands of the
    matrix products, the softmax's weights among them, are in the narrower of hidden's and weight's dtype, but what the
    products give is not rounded to it. Elsewhere the operands are in the result's dtype too. torch.autocast changes
    nothing.

    Memory: hidden's gradient is computed in the forward pass, where one is needed, and kept: [n, d] in the result's
    dtype. The workspace does not grow with n or V. With "torch" it is about 32 MiB of logits. With "triton" it is at
    most 64 MiB of logits, of weights and, where the head has another dtype than the operands or strides that a matrix
    product does not take, of its copy (but one block of at most 8192 words at least); all words are one chunk if they
    fit. Label smoothing adds [2048, d] in float32, with a softcap twice that.

    The "torch" and "triton" backends are deterministic: the same call gives the same bits. Differentiating twice is an
    error. "triton" can be captured in a CUDA graph; nothing in it waits for the device.

    Raises:
        TypeError: what should be a tensor or a number is none.
        ValueError: a shape, dtype, device or scalar that is not as above; a weight or bias that requires grad while
            grad is enabled; a backend that cannot take the call; a label out of range. Labels are looked at on a CPU
            only, since looking would make the host wait for the device: elsewhere a label out of range gives NaN with
            "torch" and "triton", with "triton" as that row's gradient too.
    """
    check_arguments(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, ignore_index, reduction)
    resolved = resolve_backend(
        backend, hidden.device, OP, dtype=hidden.dtype, no_kernel_because=_no_kernel_because(weight, bias)
    )
    run = implementation(OP, resolved)
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


def _no_kernel_because(weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """The dispatcher looks at hidden's dtype; the frozen tensors may have others."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in launch.DTYPES:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in launch.DTYPES)
            got = str(tensor.dtype).removeprefix("torch.")
            return f"the triton implementation of {OP} takes a {name} in {taken} here, not in {got}"
    return None
