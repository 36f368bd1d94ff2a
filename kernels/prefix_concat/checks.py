"""What the arguments of prefix_concat must be; nothing is computed here."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(prefix: torch.Tensor, rows: torch.Tensor, prompt_ids: torch.Tensor | None) -> None:
    """Shapes, dtypes and devices; raises ValueError. Reads no element, so it never waits for a device."""
    if rows.dim() != 4:
        raise ValueError(f"expected rows of shape [B, H_kv, T, D], got {list(rows.shape)}")
    batch, heads, _, dim = rows.shape
    if prompt_ids is None and prefix.dim() == 4:
        raise ValueError(f"expected prompt_ids with a prefix of shape {list(prefix.shape)} ([N, P, H_kv, D]), got None")
    expected = "[P, H_kv, D]" if prompt_ids is None else "[N >= 1, P, H_kv, D] (prompt_ids was given)"
    if prefix.dim() != (3 if prompt_ids is None else 4) or (prompt_ids is not None and prefix.shape[0] == 0):
        raise ValueError(f"expected prefix of shape {expected}, got {list(prefix.shape)}")
    if tuple(prefix.shape[-2:]) != (heads, dim):
        raise ValueError(f"expected prefix with rows' H_kv = {heads} and D = {dim}, got {list(prefix.shape)}")
    for name, tensor in (("prefix", prefix), ("rows", rows)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"expected {name} in float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if prefix.device != rows.device:
        raise ValueError(f"expected prefix on rows' device {rows.device}, got {prefix.device}")
    if prompt_ids is None:
        return
    if prompt_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected prompt_ids of dtype torch.int32 or torch.int64, got {prompt_ids.dtype}")
    if prompt_ids.shape != rows.shape[:1]:
        raise ValueError(f"expected prompt_ids of shape [B = {batch}], got {list(prompt_ids.shape)}")
    if prompt_ids.device != rows.device:
        raise ValueError(f"expected prompt_ids on rows' device {rows.device}, got {prompt_ids.device}")


def check_prompt_range(prompt_ids: torch.Tensor | None, prompts: int) -> None:
    """On a CPU, name the first id outside [0, N); on other devices nothing, since reading one would wait for it."""
    if prompt_ids is None or prompt_ids.device.type != "cpu":
        return
    wrong = (prompt_ids < 0) | (prompt_ids >= prompts)  # [B]
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"expected prompt_ids in [0, {prompts}), got {int(prompt_ids[row])} at row {row}")
