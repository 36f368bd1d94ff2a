"""What the values of index tensors must be; their shapes, dtypes and devices are checked in `api.py`.

Values are looked at on a CPU only, where reading them waits for no device, and by the implementations as they start:
a compiler would drop what the public functions say of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels.packed_rows import brief, check_bounds

__all__ = ["check_dense_values", "check_packed_values"]


def check_packed_values(
    total: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix_k: Tensor | None,  # [N, P, H_kv, D]
    prompt_ids: Tensor | None,
    prefix_rows: Tensor | None,
    prefix_lengths: Tensor | None,
) -> None:
    """Raise ValueError as `prefix_attention_varlen` says."""
    if not _readable(cu_seqlens):
        return
    check_bounds(cu_seqlens.tolist(), total, max_seqlen)
    _check_prompts(prefix_k, prompt_ids, prefix_lengths)
    if prefix_rows is None:
        return
    sources = prefix_rows.tolist()
    if any(not -1 <= source < len(sources) for source in sources):
        raise ValueError(f"expected prefix_rows from -1 to {len(sources) - 1}, got {brief(sources)}")
    chained = [source for source in sources if source >= 0 and sources[source] >= 0]
    if chained:
        raise ValueError(f"expected rows that are read to read no row themselves, got row {chained[0]} doing both")


def check_dense_values(
    k: Tensor,  # [B, H_kv, Tk, D]
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    prefix_k: Tensor | None,  # [N, P, H_kv, D]
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
) -> None:
    """Raise ValueError as `prefix_attention` says."""
    if not _readable(k):
        return
    for name, bound in (("key_lengths", key_lengths), ("key_starts", key_starts)):
        _check_range(name, bound, 0, k.shape[2])
    _check_prompts(prefix_k, prompt_ids, prefix_lengths)


def _check_prompts(prefix_k: Tensor | None, prompt_ids: Tensor | None, prefix_lengths: Tensor | None) -> None:
    if prefix_k is not None:
        _check_range("prompt_ids", prompt_ids, -1, prefix_k.shape[0] - 1)
        _check_range("prefix_lengths", prefix_lengths, 0, prefix_k.shape[1])


def _check_range(name: str, x: Tensor | None, least: int, most: int) -> None:
    values = [] if x is None else x.tolist()
    if any(not least <= value <= most for value in values):
        raise ValueError(f"expected {name} from {least} to {most}, got {brief(values)}")


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
