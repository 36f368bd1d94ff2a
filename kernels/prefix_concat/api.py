"""The public function prefix_concat: checks and dispatch. It knows tensors only, no cache and no model."""

from __future__ import annotations

import torch

from ptengine.kernels.dispatch import implementation, register, resolve_backend
from ptengine.kernels.prefix_concat.checks import check_arguments
from ptengine.kernels.prefix_concat.reference import prefix_concat_reference
from ptengine.kernels.prefix_concat.torch_path import prefix_concat_torch

OP = "prefix_concat"
register(OP, "reference", prefix_concat_reference)
register(OP, "torch", prefix_concat_torch)


def prefix_concat(
    prefix: torch.Tensor,
    rows: torch.Tensor,
    *,
    prompt_ids: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Put a shared prefix before every row: the keys or values a stock cache holds, written in one pass.

        out[b, h, :P] = prefix[:, h]                    one prompt
        out[b, h, :P] = prefix[prompt_ids[b], :, h]     N prompts
        out[b, h, P:] = rows[b, h]

    The gradient of the prefix is the sum over the rows that read it, taken in float32 (float64 for float64 rows) and
    in a fixed order: the same call gives the same bits. A prompt that no row reads has gradient 0.

    Args:
        prefix: [P, H_kv, D], or [N, P, H_kv, D] together with `prompt_ids`. float64, float32, bfloat16 or float16; it
            is rounded to rows' dtype, so a float32 prompt may go before bfloat16 rows.
        rows: [B, H_kv, T, D], of any of these dtypes. Any strides, 0 included. P, T and B may be 0.
        prompt_ids: int32 or int64 [B], each in [0, N): the prompt of a row. None with a [P, H_kv, D] prefix. -1 (no
            prompt) is refused, since the rows of the result would differ in length.
        backend: None (chosen by device), "reference", "torch" or "triton"; see `ptengine.kernels.dispatch`.

    Returns:
        [B, H_kv, P + T, D], contiguous, in rows' dtype, sharing no memory with its arguments.

    Raises:
        ValueError: a shape, dtype or device that is not as above, or a prompt id out of range. Ids are looked at on a
            CPU only, since looking would make the host wait for the device: elsewhere PyTorch's own device-side
            assertion reports one that is out of range.
    """
    check_arguments(prefix, rows, prompt_ids)
    return implementation(OP, resolve_backend(backend, rows.device, OP))(prefix, rows, prompt_ids=prompt_ids)
