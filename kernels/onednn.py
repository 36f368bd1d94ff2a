"""Products of float32 matrices with a frozen weight on a CPU, by oneDNN in place of the BLAS that PyTorch calls.

PyTorch hands float32 products to MKL, which on CPUs of AMD with AVX-512 reaches less of the machine's rate than oneDNN,
a library that PyTorch brings as well: 1.1 to 1.2 times the time at several hundred rows, up to twice at a few tens,
where reading the weight is what costs (`benchmarks/bench_frozen_products.py`). Both sum in float32; oneDNN in longer
chains, so that its rounding errors are up to twice MKL's. This room knows matrices, no gradients and no models.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["LEAST_WEIGHT", "linear", "missing", "takes"]

LEAST_WEIGHT = 2**19
"""Elements of a weight. oneDNN prepares code for every new number of rows, a third of a millisecond each time, and the
number of tokens in a packed batch changes from step to step: with smaller weights that would cost what is gained."""
_MOST_ELEMENTS = 2**31  # of either operand and of the result: beyond, nothing here was tried


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is for x [..., d] with weight [out, d]: float32 on a CPU with AVX-512, and a large weight.

    Where `torch.backends.mkldnn.flags(enabled=False)` holds, it is not.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= LEAST_WEIGHT
        and 0 < x.numel() < _MOST_ELEMENTS
        and x.numel() // x.shape[-1] * weight.shape[0] < _MOST_ELEMENTS
        and weight.numel() < _MOST_ELEMENTS
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and missing() is None
    )


def missing() -> str | None:
    """Why no product runs here, for people; None where large ones do."""
    if not torch.backends.mkldnn.enabled:
        return "switched off by torch.backends.mkldnn"
    return _missing_for_good()


@cache
def _missing_for_good() -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if not (capability := torch.backends.cpu.get_cpu_capability()).startswith("AVX512"):
        return f"tried with AVX-512 alone, this CPU has {capability}"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [..., d], any strides.
        weight: [out, d], or the transpose of a contiguous [d, out]; see `takes`.
        bias: [out] or None.

    Returns:
        [..., out], contiguous, without a gradient.
    """
    # The operator that torch.compile puts in place of frozen linear layers; its last three arguments: no activation.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
