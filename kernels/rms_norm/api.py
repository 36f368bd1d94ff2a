"""The public function rms_norm: the specification in words, the checks and dispatch. It knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels import launch
from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.rms_norm import torch_path
from ptengine.kernels.rms_norm.reference import rms_norm_reference
from ptengine.kernels.rms_norm.tiles import MAX_CHANNELS

OP = "rms_norm"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _triton(x: Tensor, weight: Tensor, eps: float, *, offset: float) -> Tensor:
    from ptengine.kernels.rms_norm.triton_path import rms_norm  # only where a kernel runs

    return rms_norm(x, weight, eps, offset=offset)


register(OP, "reference", rms_norm_reference)
register(OP, "torch", torch_path.rms_norm)
launch.register_kernel(OP, _triton)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, backend: str | None = None) -> Tensor:
    """Each row of x divided by its root mean square, times a frozen weight.

        y = x * rsqrt(mean(x**2) + eps) * (offset + weight)    over the last dimension

    The method is Zhang & Sennrich 2019 (arXiv:1910.07467); offset = 1 is Gemma's form. All of it is computed in float32
    (float64 for float64) and rounded once, to x's dtype; Llama's stock module rounds before the weight too, so in 16
    bits it differs from this in the last place. torch.autocast changes nothing.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16. The only argument with a gradient. Any strides: it is copied
            only if D's is not 1 or the leading dimensions have more than two that are independent.
        weight: [D], frozen, of any of these dtypes.
        eps: added to the mean square.
        offset: added to the weight.
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`. "triton"
            takes D up to 16384 and no float64. Under torch.compile it gives way to "torch", whose operators the
            compiler fuses.

    Returns:
        [..., D], contiguous with "triton", in x's dtype.

    Kept for the backward pass is x itself and nothing else with "triton". There the same call gives the same bits,
    nothing waits for the device, and there is no second derivative. A row's NaN stays in that row.

    Raises:
        ValueError: a shape, dtype or device that is not as above; a weight that requires grad while grad is enabled; a
            backend that cannot take the call.
    """
    if x.dim() == 0 or x.dtype not in _DTYPES:
        raise ValueError(
            f"expected x [..., D] in float64, float32, bfloat16 or float16, got {list(x.shape)} in {x.dtype}"
        )
    if weight.shape != x.shape[-1:] or weight.dtype not in _DTYPES:
        raise ValueError(
            f"expected weight [D = {x.shape[-1]}] in float64, float32, bfloat16 or float16, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    if weight.device != x.device:
        raise ValueError(f"expected weight on x's device {x.device}, got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("expected a frozen weight (weight.requires_grad False), got a weight that requires grad")
    chosen = resolve_backend(backend, x.device, OP, dtype=x.dtype, no_kernel_because=_no_kernel_because(x, weight))
    return implementation(OP, launch.compiled_or(chosen))(x, weight, eps, offset=offset)


def _no_kernel_because(x: Tensor, weight: Tensor) -> str | None:
    """What the dispatcher does not look at; None where the kernel takes the call."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"the triton implementation of {OP} takes D up to {MAX_CHANNELS}, not {x.shape[-1]}"
    if weight.dtype not in launch.DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        return f"the triton implementation of {OP} takes no weight in {name} here"
    return None
