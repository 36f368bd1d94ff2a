"""The public function rotary_embedding: the specification in words, the checks and dispatch. It knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels import launch
from ptengine.kernels.arguments import check_tensors
from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.rotary import torch_path
from ptengine.kernels.rotary.reference import rotary_embedding_reference

OP = "rotary"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from ptengine.kernels.rotary.triton_path import rotary_embedding  # only where a kernel runs

    return rotary_embedding(q, k, cos, sin)


register(OP, "reference", rotary_embedding_reference)
register(OP, "torch", torch_path.rotary_embedding)
launch.register_kernel(OP, _triton)


def rotary_embedding(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of a layer's queries and keys, each token by its own angles.

        y1 = x1 * cos1 - x2 * sin1    x1, x2 the halves of x[..., :R], cos1, cos2 and sin1, sin2 those of cos and sin
        y2 = x2 * cos2 + x1 * sin2    for each head of q and of k; channels from R on are copied

    The method is RoFormer's, Su et al. 2021 (arXiv:2104.09864), with the channels paired as Hugging Face's rotate_half
    does. The rotation is computed in float32 (float64 for float64) and rounded once. The gradients go back through its
    transpose. cos and sin are constants: no gradient reaches them. torch.autocast changes nothing.

    Args:
        q: [N, H, D], float64, float32, bfloat16 or float16, with a gradient. Any strides: it is copied only if D's is
            not 1. N counts the tokens of all rows. N, H and H_kv may be 0.
        k: [N, H_kv, D], as q. The two may be slices of one tensor.
        cos: [N, R], what the model's rotary module returns for each token's position; R even, 2 to D. Any of these
            dtypes. Rows may be expanded.
        sin: as cos, in the same dtype.
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`. "triton"
            takes no float64 q. Under torch.compile it gives way to "torch", whose operators the compiler fuses.

    Returns:
        The turned q and k, as they came in, contiguous, sharing no memory with the arguments.

    Kept for the backward pass are cos and sin and nothing else with "triton". There the same call gives the same bits,
    nothing waits for the device, and there is no second derivative. A token's NaN stays in its head.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype or device that is not as above; a backend that cannot take the call.
    """
    check_tensors(q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 3 or q.dtype not in _DTYPES:
        raise ValueError(
            f"expected q [N, H, D] in float64, float32, bfloat16 or float16, got {list(q.shape)} in {q.dtype}"
        )
    (tokens, _, dim), device = q.shape, q.device
    if k.dim() != 3 or k.shape[0] != tokens or k.shape[2] != dim or k.dtype != q.dtype or k.device != device:
        raise ValueError(
            f"expected k [N = {tokens}, H_kv, D = {dim}] in {q.dtype} on {device}, "
            f"got {list(k.shape)} in {k.dtype} on {k.device}"
        )
    width = cos.shape[-1] if cos.dim() == 2 else 0
    if cos.dim() != 2 or cos.shape[0] != tokens or not 2 <= width <= dim or width % 2 or cos.device != device:
        raise ValueError(
            f"expected cos [N = {tokens}, R] with R even, 2 to D = {dim}, on {device}, "
            f"got {list(cos.shape)} on {cos.device}"
        )
    if cos.dtype not in _DTYPES:
        raise ValueError(f"expected cos in float64, float32, bfloat16 or float16, got {cos.dtype}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.device != device:
        raise ValueError(
            f"expected sin as cos, {list(cos.shape)} in {cos.dtype} on {device}, "
            f"got {list(sin.shape)} in {sin.dtype} on {sin.device}"
        )
    chosen = resolve_backend(backend, device, OP, dtype=q.dtype, no_kernel_because=_no_kernel_because(cos))
    return implementation(OP, launch.compiled_or(chosen))(q, k, cos, sin)


def _no_kernel_because(cos: Tensor) -> str | None:
    """What the dispatcher does not look at; None where the kernel takes the call."""
    if cos.dtype in launch.DTYPES or (cos.dtype == torch.float64 and not launch.INTERPRETED):
        return None
    return f"the triton implementation of {OP} takes no angles in {str(cos.dtype).removeprefix('torch.')} here"
