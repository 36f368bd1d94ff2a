"""Launches the Triton kernels: strides, tiles and grids. What they compute stands in `forward.py` and `backward.py`.

Called by `operators.py` with checked arguments and outside autograd. The host never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptengine.kernels.launch import ceil_div, power_of_two
from ptengine.kernels.prefix_concat.backward import own_kernel, sum_kernel
from ptengine.kernels.prefix_concat.forward import concat_kernel, concat_packed_kernel
from ptengine.kernels.prefix_concat.tiles import tile, tokens

_COUNTED = 1024  # prompt ids read at a time where a packed row adds up the prefixes before it


def concat(prefix: Tensor, rows: Tensor, prompt_ids: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """[B, H_kv, P + T, D]"""
    batch, heads, length, dim = rows.shape
    out = rows.new_empty(batch, heads, prefix.shape[-3] + length, dim)
    stride_b, stride_h, stride_s, stride_d = out.stride()
    _launch_concat(out, (stride_b, stride_s, stride_h, stride_d), prefix, rows, prompt_ids, cos, sin, None)
    return out


def concat_paged(
    prefix: Tensor,
    rows: Tensor,
    cache: Tensor,
    block_table: Tensor,
    prompt_ids: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Into cache [num_blocks, block_size, H_kv, D]."""
    _launch_concat(cache, cache.stride(), prefix, rows, prompt_ids, cos, sin, block_table)


def _launch_concat(
    out: Tensor,
    out_strides: tuple[int, ...],
    prefix: Tensor,
    rows: Tensor,
    prompt_ids: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    block_table: Tensor | None,
) -> None:
    batch, heads, length, dim = rows.shape
    if prompt_ids is None:
        prefix = prefix[None]
    else:
        prompt_ids = prompt_ids.contiguous()
    prompts, virtual = prefix.shape[:2]
    cos, sin, angle_strides = _rotary_operands(cos, sin, batched=True)
    blocks = _block_sizes(rows, cos)
    tiles = ceil_div(virtual, blocks["BLOCK_S"]) + ceil_div(length, blocks["BLOCK_S"])
    if batch * tiles == 0:
        return
    table = (0, 0, 1, 0) if block_table is None else (*block_table.stride(), out.shape[1], out.shape[0])
    with torch.cuda.device_of(rows):
        concat_kernel[batch * tiles, heads](
            out, prefix, rows, prompt_ids, cos, sin, block_table,
            *out_strides, *prefix.stride(), *rows.stride(), *angle_strides, *table,
            prompts, virtual, length, tiles, D=dim, **blocks, enable_fp_fusion=True,
        )  # fmt: skip


def concat_packed(
    prefix: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out_tokens: int,
) -> tuple[Tensor, Tensor]:
    """[out_tokens, H_kv, D] and its cu_seqlens."""
    _, heads, dim = rows.shape
    count = cu_seqlens.shape[0] - 1
    out = rows.new_empty(out_tokens, heads, dim)
    if count == 0:
        return out, torch.zeros_like(cu_seqlens)
    cu_seqlens_out = cu_seqlens.new_empty(count + 1)
    if prompt_ids is None:
        prefix = prefix[None]
    else:
        prompt_ids = prompt_ids.contiguous()
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths.contiguous()
    prompts, virtual = prefix.shape[:2]
    cos, sin, (_, *angle_strides) = _rotary_operands(cos, sin, batched=False)
    blocks = _block_sizes(rows, cos)
    # At least one tile a row: the first also writes the row's bounds.
    tiles = max(ceil_div(virtual, blocks["BLOCK_S"]) + ceil_div(max_seqlen, blocks["BLOCK_S"]), 1)
    with torch.cuda.device_of(rows):
        concat_packed_kernel[count * tiles, heads](
            out, cu_seqlens_out, prefix, rows, cu_seqlens.contiguous(), prompt_ids, prefix_lengths, cos, sin,
            *out.stride(), *prefix.stride(), *rows.stride(), *angle_strides,
            prompts, virtual, tiles, out_tokens, D=dim, **blocks, COUNTED=_COUNTED, enable_fp_fusion=True,
        )  # fmt: skip
    return out, cu_seqlens_out


def sum_rows(of_head: Tensor, prompt_ids: Tensor | None, prompts: int, dtype: torch.dtype) -> Tensor:
    """of_head [B, H_kv, P, D] summed to [P, H_kv, D] or [N, P, H_kv, D]."""
    batch, heads, virtual, dim = of_head.shape
    count = 1 if prompt_ids is None else prompts
    out = of_head.new_empty(count, virtual, heads, dim, dtype=dtype)
    _launch_sum(out, of_head, of_head.stride(), batch, prompt_ids, None, None)
    return out[0] if prompt_ids is None else out


def sum_packed(
    of_out: Tensor,
    cu_seqlens_out: Tensor,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    prompts: int,
    virtual: int,
    dtype: torch.dtype,
) -> Tensor:
    """The first tokens of each row of of_out [out_tokens, H_kv, D] summed to [P, H_kv, D] or [N, P, H_kv, D]."""
    count = 1 if prompt_ids is None else prompts
    out = of_out.new_empty(count, virtual, *of_out.shape[1:], dtype=dtype)
    stride_s, stride_h, stride_d = of_out.stride()
    rows = cu_seqlens_out.shape[0] - 1
    _launch_sum(out, of_out, (0, stride_h, stride_s, stride_d), rows, prompt_ids, cu_seqlens_out, prefix_lengths)
    return out[0] if prompt_ids is None else out


def _launch_sum(
    out: Tensor,
    of_out: Tensor,
    strides: tuple[int, ...],
    rows: int,
    prompt_ids: Tensor | None,
    cu_seqlens_out: Tensor | None,
    prefix_lengths: Tensor | None,
) -> None:
    prompts, virtual, heads, dim = out.shape
    chosen, block_d = tile(of_out, "sum"), power_of_two(dim)
    block_p = tokens(chosen.elements, block_d)
    tiles = ceil_div(virtual, block_p)
    if tiles == 0:
        return
    with torch.cuda.device_of(out):
        sum_kernel[prompts * tiles, heads](
            out, of_out,
            None if prompt_ids is None else prompt_ids.contiguous(), cu_seqlens_out,
            None if prefix_lengths is None else prefix_lengths.contiguous(),
            *strides, rows, virtual, tiles,
            D=dim, BLOCK_P=block_p, BLOCK_D=block_d, ROWS=chosen.rows,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def rotate_back(of_own: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """of_own [B, H_kv, T, D] through the rotation's transpose."""
    batch, heads, length, dim = of_own.shape
    out = of_own.new_empty(batch, length, heads, dim)
    _launch_own(out, of_own, of_own.stride(), batch, length, None, None, cos, sin)
    return out.transpose(1, 2)


def take_own(
    of_out: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_out: Tensor,
    total: int,
    max_seqlen: int,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The rows' own tokens [total, H_kv, D], the last of each row of of_out [out_tokens, H_kv, D]."""
    out = of_out.new_empty(total, *of_out.shape[1:])
    stride_s, stride_h, stride_d = of_out.stride()
    rows, strides = cu_seqlens.shape[0] - 1, (0, stride_h, stride_s, stride_d)
    _launch_own(out, of_out, strides, rows, max_seqlen, cu_seqlens.contiguous(), cu_seqlens_out, cos, sin)
    return out


def _launch_own(
    out: Tensor,
    of_out: Tensor,
    strides: tuple[int, ...],
    rows: int,
    longest: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    heads, dim = out.shape[-2:]
    cos, sin, angle_strides = _rotary_operands(cos, sin, batched=cu_seqlens is None)
    blocks = _block_sizes(out, cos)
    tiles = ceil_div(longest, blocks["BLOCK_S"])
    if rows * tiles == 0:
        return
    with torch.cuda.device_of(out):
        own_kernel[rows * tiles, heads](
            out, of_out, cu_seqlens, cu_seqlens_out, cos, sin, *strides, *angle_strides, longest, tiles,
            D=dim, **blocks, enable_fp_fusion=True,
        )  # fmt: skip


def _rotary_operands(
    cos: Tensor | None, sin: Tensor | None, *, batched: bool
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """cos and sin in one layout, and its strides by row, token and channel; 0 by row where rows share a line."""
    if cos is None or sin is None:
        return None, None, (0, 0, 0)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    stride_b = cos.stride(0) if batched and cos.dim() == 3 else 0
    return cos, sin, (stride_b, cos.stride(-2), cos.stride(-1))


def _block_sizes(rows: Tensor, cos: Tensor | None) -> dict[str, Any]:
    """What a launch that moves tokens is compiled for, other than D."""
    dim, turned = rows.shape[-1], 0 if cos is None else cos.shape[-1]
    block_d = power_of_two(dim)
    chosen = tile(rows, "rotate" if turned else "copy")
    return {
        "D_ROT": turned,
        "BLOCK_S": tokens(chosen.elements, block_d),
        "BLOCK_D": block_d,
        "BLOCK_HALF": power_of_two(turned // 2),
        "BLOCK_REST": power_of_two(dim - turned),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
