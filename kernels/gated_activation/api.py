"""The public function gated_activation: the specification in words, the checks and dispatch. It knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels import launch
from ptengine.kernels.arguments import check_tensors
from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.gated_activation import torch_path
from ptengine.kernels.gated_activation.reference import gated_activation_reference

OP = "gated_activation"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from ptengine.kernels.gated_activation.triton_path import gated_activation  # only where a kernel runs

    return gated_activation(gate, up, activation)


register(OP, "reference", gated_activation_reference)
register(OP, "torch", torch_path.gated_activation)
launch.register_kernel(OP, _triton)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str | None = None) -> Tensor:
    """act(gate) * up, elementwise: what a gated feed-forward layer does between its two products.

        silu:      act(x) = x * sigmoid(x)
        gelu:      act(x) = x * (1 + erf(x / sqrt(2))) / 2
        gelu_tanh: act(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2

    The method is Shazeer 2020 (arXiv:2002.05202): SwiGLU with silu, GEGLU with the others. All of it is computed in
    float32 (float64 for float64) and rounded once; stock modules round act(gate) too, so in 16 bits they differ from
    this in the last place. torch.autocast changes nothing.

    Args:
        gate: any shape, float64, float32, bfloat16 or float16, with a gradient. Any strides: it is copied only if the
            last dimension's is not 1 or the leading ones do not have one stride between them.
        up: as gate: the same shape and dtype, strides of its own. The two may be slices of one tensor.
        activation: "silu", "gelu" or "gelu_tanh".
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`. "triton"
            takes no float64. Under torch.compile it gives way to "torch", whose operators the compiler fuses.

    Returns:
        As gate; contiguous with "triton".

    Kept for the backward pass are gate and up themselves and nothing else with "triton". There the same call gives the
    same bits, nothing waits for the device, and there is no second derivative.

    Raises:
        TypeError: gate or up is no tensor.
        ValueError: a shape, dtype, device or activation that is not as above; a backend that cannot take the call.
    """
    check_tensors(gate=gate, up=up)
    if gate.dtype not in _DTYPES:
        raise ValueError(f"expected gate in float64, float32, bfloat16 or float16, got {gate.dtype}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"expected up as gate, {list(gate.shape)} in {gate.dtype} on {gate.device}, "
            f"got {list(up.shape)} in {up.dtype} on {up.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of 'silu', 'gelu', 'gelu_tanh', got {activation!r}")
    chosen = resolve_backend(backend, gate.device, OP, dtype=gate.dtype)
    return implementation(OP, launch.compiled_or(chosen))(gate, up, activation)
