"""What the arguments of the operations must be; nothing is computed here.

Another kind of value than a tensor or a whole number is a TypeError, everything else a ValueError. `check_dense`,
`check_packed`, `check_rotary` and `check_cache` read no element, so they never wait for a device; the public functions
call them. The `check_..._values` functions read index tensors, on a CPU only; the implementations call them, since in
the public functions a compiler would drop them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels.arguments import check_optional_tensors, check_tensors, check_whole
from ptengine.kernels.packed_rows import check_bounds

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_dense(prefix: Tensor, rows: Tensor, prompt_ids: Tensor | None) -> None:
    """prefix, rows [B, H_kv, T, D] and prompt_ids [B]."""
    check_tensors(prefix=prefix, rows=rows)
    check_optional_tensors(prompt_ids=prompt_ids)
    if rows.dim() != 4:
        raise ValueError(f"expected rows of shape [B, H_kv, T, D], got {list(rows.shape)}")
    _check_prefix(prefix, rows, rows.shape[1], prompt_ids)
    if prompt_ids is not None:
        _check_index("prompt_ids", prompt_ids, rows.device, "B", rows.shape[0])


def check_packed(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
) -> None:
    """prefix, rows [total, H_kv, D] and the index tensors of packed rows."""
    check_tensors(prefix=prefix, rows=rows, cu_seqlens=cu_seqlens)
    check_optional_tensors(prompt_ids=prompt_ids, prefix_lengths=prefix_lengths)
    check_whole(max_seqlen=max_seqlen)
    if rows.dim() != 3:
        raise ValueError(f"expected rows of shape [total, H_kv, D], got {list(rows.shape)}")
    if max_seqlen < 0:
        raise ValueError(f"expected max_seqlen of at least 0, got {max_seqlen}")
    _check_prefix(prefix, rows, rows.shape[1], prompt_ids)
    _check_index("cu_seqlens", cu_seqlens, rows.device, "R + 1", None)
    if prompt_ids is not None:
        _check_index("prompt_ids", prompt_ids, rows.device, "R", cu_seqlens.shape[0] - 1)
    if prefix_lengths is not None:
        _check_index("prefix_lengths", prefix_lengths, rows.device, "N", 1 if prompt_ids is None else prefix.shape[0])


def check_rotary(rows: Tensor, tokens: tuple[int, ...], cos: Tensor | None, sin: Tensor | None) -> None:
    """cos and sin for rows whose tokens are `tokens`: (B, T), which allows [T, D_rot] too, or (total,)."""
    check_optional_tensors(cos=cos, sin=sin)
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"expected both cos and sin or neither, got {'sin' if cos is None else 'cos'} alone")
    layout = "[T, D_rot] or [B, T, D_rot]" if len(tokens) == 2 else "[total, D_rot]"
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dim() == 0 or tuple(x.shape[:-1]) not in (tokens, tokens[-1:]) or x.shape != cos.shape:
            raise ValueError(
                f"expected cos and sin of one shape {layout} for rows {list(rows.shape)}, "
                f"got {list(cos.shape)} and {list(sin.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"expected {name} in float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != rows.device:
            raise ValueError(f"expected {name} on rows' device {rows.device}, got {x.device}")
    if not 2 <= cos.shape[-1] <= rows.shape[-1] or cos.shape[-1] % 2:
        raise ValueError(f"expected an even D_rot from 2 to D = {rows.shape[-1]}, got {cos.shape[-1]}")


def check_cache(rows: Tensor, cache: Tensor, block_table: Tensor, tokens: int) -> None:
    """cache and block_table for rows [B, H_kv, T, D] that become `tokens` tokens each."""
    check_tensors(cache=cache, block_table=block_table)
    batch, heads, _, dim = rows.shape
    if cache.dim() != 4 or tuple(cache.shape[2:]) != (heads, dim) or cache.shape[1] == 0:
        raise ValueError(
            f"expected cache of shape [num_blocks, block_size >= 1, H_kv = {heads}, D = {dim}], got {list(cache.shape)}"
        )
    if cache.dtype != rows.dtype or cache.device != rows.device:
        raise ValueError(f"expected cache as rows, {rows.dtype} on {rows.device}, got {cache.dtype} on {cache.device}")
    if cache.requires_grad:
        raise ValueError("expected a cache without requires_grad, which is written in place, got one with")
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        raise ValueError(f"expected a cache whose entries share no memory, got strides {list(cache.stride())}")
    if block_table.dtype not in INDEX_DTYPES or block_table.device != rows.device:
        raise ValueError(
            f"expected block_table of dtype torch.int32 or torch.int64 on {rows.device}, "
            f"got {block_table.dtype} on {block_table.device}"
        )
    least = -(-tokens // cache.shape[1])
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] < least:
        raise ValueError(
            f"expected block_table of shape [B = {batch}, max_blocks >= {least}] for P + T = {tokens} tokens in blocks "
            f"of {cache.shape[1]}, got {list(block_table.shape)}"
        )


def check_prompt_values(prompt_ids: Tensor | None, prompts: int, lowest: int = 0) -> None:
    """Name the first id outside [lowest, N)."""
    if prompt_ids is not None:
        _check_range("prompt_ids", prompt_ids, lowest, prompts, "row")


def check_block_values(block_table: Tensor, cache: Tensor, tokens: int) -> None:
    """Name the first row of block_table with a block out of range among those that `tokens` tokens need."""
    used = block_table[:, : -(-tokens // cache.shape[1])]  # [B, blocks]
    _check_range("block_table", used.reshape(-1), 0, cache.shape[0], "entry")


def check_packed_values(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
) -> None:
    """The values of the index tensors of packed rows."""
    if cu_seqlens.device.type != "cpu":
        return
    check_bounds(cu_seqlens.tolist(), rows.shape[0], max_seqlen)
    check_prompt_values(prompt_ids, prefix.shape[0], lowest=-1)
    if prefix_lengths is not None:
        _check_range("prefix_lengths", prefix_lengths, 0, prefix.shape[-3] + 1, "prompt")


def check_out_tokens(out_tokens: int | None, counted: int) -> None:
    if out_tokens is not None and out_tokens != counted:
        raise ValueError(f"expected out_tokens = {counted}, tokens and prefixes together, got {out_tokens}")


def _check_prefix(prefix: Tensor, rows: Tensor, heads: int, prompt_ids: Tensor | None) -> None:
    dim = rows.shape[-1]
    if heads == 0 or dim == 0:
        raise ValueError(f"expected rows with H_kv and D of at least 1, got {list(rows.shape)}")
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


def _check_index(name: str, x: Tensor, device: torch.device, size: str, count: int | None) -> None:
    if x.dtype not in INDEX_DTYPES:
        raise ValueError(f"expected {name} of dtype torch.int32 or torch.int64, got {x.dtype}")
    if x.dim() != 1 or (x.shape[0] == 0 if count is None else x.shape[0] != count):
        raise ValueError(
            f"expected {name} of shape [{size}{'' if count is None else f' = {count}'}], got {list(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"expected {name} on rows' device {device}, got {x.device}")


def _check_range(name: str, x: Tensor, lowest: int, limit: int, what: str) -> None:
    """On a CPU, name the first value outside [lowest, limit)."""
    if x.device.type != "cpu":
        return
    wrong = (x < lowest) | (x >= limit)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"expected {name} in [{lowest}, {limit}), got {int(x[place])} at {what} {place}")
