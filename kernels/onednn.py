"""Products of a few float32 rows with a large frozen weight on a CPU, by oneDNN in place of the BLAS PyTorch calls.

PyTorch hands float32 products to MKL. With a few rows, as in generation and at labelled positions, reading the weight
is what costs, and on CPUs of AMD with AVX-512 oneDNN, a library that PyTorch brings as well, is then faster, often
twice (`benchmarks/bench_frozen_products.py`). Both sum in float32; oneDNN in longer chains, so that its rounding
errors are up to twice MKL's. This room knows matrices, no gradients and no models.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["LEAST_WEIGHT", "MOST_ROWS", "linear", "missing", "takes"]

LEAST_WEIGHT = 2**19
"""Elements of a weight; with smaller ones calling oneDNN costs what it gains."""
MOST_ROWS = 32
"""oneDNN makes code for every number of rows and every shape of weight and keeps up to 1024 of them, more than half a
megabyte each. Hundreds of rows would gain less, and the number of tokens in a packed batch changes at every step."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is for x [..., d] with weight [out, d].

    It is for 1 to `MOST_ROWS` rows and weights of `LEAST_WEIGHT` elements, float32, on a CPU with AVX-512. Nothing else
    is asked, least of all what was computed before: the same call gives the same bits in every process. Where
    `torch.backends.mkldnn.flags(enabled=False)` holds, it is for none.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= LEAST_WEIGHT
        and x.shape[-1:] == weight.shape[1:]  # anything else is the BLAS's to refuse, in its clearer words
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and missing() is None
    )


def missing() -> str | None:
    """Why no product runs here, for people; None where some do."""
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
