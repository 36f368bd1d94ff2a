"""Launches the kernels: tiles, grids, workspaces and strides. What is computed stands in `forward.py`, `backward.py`.

The host never waits for the device: whatever depends on lengths there is found there. Tensors are read where they lie;
one whose last dimension is not contiguous is copied first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptengine.kernels import launch
from ptengine.kernels.launch import ceil_div, power_of_two
from ptengine.kernels.prefix_attention import device
from ptengine.kernels.prefix_attention.backward import backward_kernel
from ptengine.kernels.prefix_attention.backward_prefix import prepare_kernel, reduce_kernel
from ptengine.kernels.prefix_attention.forward import combine_kernel, forward_kernel
from ptengine.kernels.prefix_attention.scores import ScoreRules
from ptengine.kernels.prefix_attention.tiles import backward_tile, forward_tile

__all__ = ["Layout", "backward", "forward"]

_DECODE_QUERIES = 16  # packed queries of a row, at most, for its keys to be split among programs
_MAX_SPLITS = 64
_PREPARE_ELEMENTS = 2048  # of the result and of its gradient that one program multiplies
_PREPARE_ROWS = 128  # rows looked at together when lengths are summed
_REDUCE_ROWS = 16  # keys whose partial gradients one program sums


# As plain numbers: comparing Triton's constants costs the host microseconds.
_NO_PREFIX, _PREFIX_APART, _PREFIX_IN_ROWS = (
    mode.value for mode in (device.NO_PREFIX, device.PREFIX_APART, device.PREFIX_IN_ROWS)
)


class Layout(NamedTuple):
    """How rows lie in memory and which prefix they read.

    A packed call: q [total, H, D], k and v [total, H_kv, D], `bounds` = cu_seqlens, `q_len` = `k_len` = max_seqlen.
    A dense call: q [B, Tq, H, D], k and v [B, H_kv, Tk, D], `bounds` = key_starts and `ends` = key_lengths, or None.
    """

    dense: bool
    rows: int
    q_len: int
    k_len: int
    bounds: Tensor | None
    ends: Tensor | None
    prompts: Tensor | None  # prompt_ids, or prefix_rows
    in_rows: bool  # prompts are prefix_rows
    lengths: Tensor | None  # prefix_lengths

    def strides(self, x: Tensor, heads_first: bool) -> tuple[int, int, int]:
        """Elements from one row, one token and one head of x to the next."""
        if not self.dense:
            return 0, x.stride(0), x.stride(1)
        return (x.stride(0), x.stride(2), x.stride(1)) if heads_first else (x.stride(0), x.stride(1), x.stride(2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, layout: Layout, rules: ScoreRules
) -> tuple[Tensor, Tensor]:
    """out [M, H, D_v] in q's dtype and lse fp32 [H, M], M query slots in all; prefixes are [N, P, H_kv, D]."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    prefix_k, prefix_v = _unit_strides(prefix_k, prefix_v)
    heads, dim, dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    heads_kv = k.shape[1]
    total = q.shape[:-2].numel()
    out = q.new_empty(total, heads, dim_v)
    lse = q.new_empty(heads, total, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.fill_(float("-inf"))
    group = heads // heads_kv
    queries = layout.q_len * group
    width, width_v = _width(dim), _width(dim_v)
    if queries <= 64:
        regime = "decode" if queries <= _DECODE_QUERIES else "short"
    else:
        regime = "medium" if layout.k_len <= 256 else "long"
    tile = forward_tile(launch.architecture(q.device), q.dtype.itemsize * 8, max(width, width_v), regime)
    num_tiles = ceil_div(queries, tile.block_m)
    prefix_len = 0 if prefix_k is None else prefix_k.shape[1]
    splits = 1
    if regime == "decode":
        blocks = ceil_div(prefix_len, tile.block_n) + ceil_div(layout.k_len, tile.block_n)
        wanted = ceil_div(2 * launch.multiprocessors(q.device), layout.rows * heads_kv)
        splits = min(power_of_two(wanted), power_of_two(blocks), _MAX_SPLITS)
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(splits, total, heads, dim_v, dtype=torch.float32)
        part_lse = q.new_empty(splits, heads, total, dtype=torch.float32)
    window = _window(rules, layout, prefix_len)
    forward_kernel[(layout.rows * heads_kv * splits * num_tiles,)](
        q, k, v, *_prefix_pointers(k, v, prefix_k, prefix_v), part, part_lse,
        layout.bounds, layout.ends, layout.prompts, layout.lengths, *_constants(rules),
        *layout.strides(q, False), *layout.strides(k, True), *layout.strides(v, True),
        *_prefix_strides(layout, k, v, prefix_k, prefix_v),
        rules.scale, rules.softcap or 1.0, window or 0, _reach(rules), total, layout.q_len, layout.k_len, prefix_len,
        num_tiles, heads_kv, group, dim, dim_v, width, width_v, tile.block_m, tile.block_n, splits,
        layout.dense, _prefix_mode(layout, prefix_k), rules.causal, window is not None, rules.window_includes_prefix,
        rules.softcap is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(total * heads,)](
            part, part_lse, out, lse, total, heads, dim_v, width_v, splits, power_of_two(splits),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,  # [M, H, D_v]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,  # [M, H, D_v]
    lse: Tensor,  # [H, M]
    layout: Layout,
    rules: ScoreRules,
    rows_need_grad: bool,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of `forward`, given its results: of q, k and v if `rows_need_grad`, then of the prefix if it is given.

    They are contiguous and in their tensors' dtype. Only with `deterministic=False` are a prefix's partial gradients
    added by atomic operations, in no fixed order.
    """
    grad, q, k, v = _unit_stride(grad), _unit_stride(q), _unit_stride(k), _unit_stride(v)
    prefix_k, prefix_v = _unit_strides(prefix_k, prefix_v)
    out, lse = out.contiguous(), lse.contiguous()
    heads, dim, dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    heads_kv = k.shape[1]
    total, group = lse.shape[1], heads // heads_kv
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)] if rows_need_grad else []
    prefixes = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (prefix_k, prefix_v) if x is not None
    ]
    if total == 0 or heads == 0:
        return [x.zero_() for x in rows + prefixes]
    mode = _prefix_mode(layout, prefix_k)
    prefix_len = 0 if prefix_k is None else prefix_k.shape[1]
    prompts = 0 if prefix_k is None else prefix_k.shape[0]
    window = _window(rules, layout, prefix_len)
    width, width_v = _width(dim), _width(dim_v)
    _, *biases = _constants(rules)
    positional = window is not None or any(x is not None for x in biases)
    plain = not positional and rules.softcap is None and (dim, dim_v) == (width, width_v)
    tile = backward_tile(launch.architecture(q.device), q.dtype.itemsize * 8, max(width, width_v), layout.k_len, plain)

    ordered = layout.prompts is not None and mode != _NO_PREFIX
    placed = mode != _NO_PREFIX and positional
    groups = layout.rows if layout.in_rows else prompts
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    order = q.new_empty(total, dtype=torch.int32) if ordered else None
    offsets = q.new_empty(groups + 1, dtype=torch.int32) if ordered else None
    place = q.new_empty(total, dtype=torch.int32) if placed else None
    pairs = _PREPARE_ELEMENTS // width_v
    delta_tiles = ceil_div(total * heads, pairs)
    row_programs = layout.rows if ordered or placed else 0
    prepare_kernel[(delta_tiles + row_programs + (groups + 1 if ordered else 0),)](
        grad, out, lse, base, delta, layout.bounds, layout.prompts, order, offsets, place,
        grad.stride(0), grad.stride(1), total, row_programs, groups, layout.q_len, delta_tiles,
        heads, dim_v, width_v, pairs, _PREPARE_ROWS, layout.dense, ordered, placed,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip

    # A prefix's block is cut among programs until this many have work; more programs only where there are more blocks.
    wanted = 2 * launch.multiprocessors(q.device)
    if mode == _PREFIX_IN_ROWS:
        blocks = total // tile.prefix_n + layout.rows  # at most: which rows are read, only the device knows
    else:
        blocks = prompts * ceil_div(prefix_len, tile.prefix_n)
    programs = max(wanted, blocks * heads_kv) if blocks else 0
    part_k = part_v = None
    if programs:
        make = torch.empty if deterministic else torch.zeros
        part_k, part_v = (
            make(wanted, tile.prefix_n, width, dtype=torch.float32, device=q.device) for width in (dim, dim_v)
        )
    key_tiles = query_tiles = 0
    if rows_need_grad:
        key_tiles = ceil_div(layout.k_len, tile.key_n)
        query_tiles = ceil_div(layout.q_len * group, tile.query_m)
    dq, dk, dv = rows or (None, None, None)
    dpk, dpv = prefixes or (None, None)
    of_keys = (0,) * 6
    if rows:
        of_keys = (*layout.strides(rows[1], True), *layout.strides(rows[2], True))
    grid = programs + layout.rows * heads_kv * (key_tiles + query_tiles)
    if grid == 0:
        return prefixes
    backward_kernel[(grid,)](
        q, k, v, *_prefix_pointers(k, v, prefix_k, prefix_v), grad, base, delta, dq, dk, dv, dpk, dpv, part_k, part_v,
        layout.bounds, layout.ends, layout.prompts, layout.lengths, order, offsets, place, *biases,
        *layout.strides(q, False), *layout.strides(k, True), *layout.strides(v, True),
        *_prefix_strides(layout, k, v, prefix_k, prefix_v), grad.stride(0), grad.stride(1), *of_keys,
        rules.scale, rules.softcap or 1.0, window or 0, _reach(rules), total, layout.rows, prompts,
        layout.q_len, layout.k_len, prefix_len, programs, wanted, key_tiles, query_tiles,
        heads_kv, group, dim, dim_v, width, width_v, tile.query_m, tile.query_n, tile.key_m, tile.key_n,
        tile.prefix_m, tile.prefix_n, _PREPARE_ROWS, layout.dense, mode, rules.causal, window is not None,
        rules.window_includes_prefix, rules.softcap is not None, rows_need_grad, not deterministic,
        tile.swapped, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if programs:
        reduce_kernel[(wanted * ceil_div(tile.prefix_n, _REDUCE_ROWS),)](
            part_k, part_v, dk, dv, dpk, dpv, layout.bounds, offsets,
            of_keys[1], of_keys[2], of_keys[4], of_keys[5], layout.rows, prompts, prefix_len, wanted,
            heads_kv, dim, dim_v, width, width_v, tile.prefix_n, _REDUCE_ROWS, _PREPARE_ROWS, mode, not deterministic,
            num_warps=8 if max(width, width_v) > 128 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return rows + prefixes


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _unit_strides(prefix_k: Tensor | None, prefix_v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if prefix_k is None or prefix_v is None:
        return None, None
    return _unit_stride(prefix_k), _unit_stride(prefix_v)


def _width(dim: int) -> int:
    """The block that holds a head: a power of two of at least 16, the least a product takes."""
    return max(16, power_of_two(dim))


def _prefix_mode(layout: Layout, prefix_k: Tensor | None) -> int:
    if layout.in_rows:
        return _PREFIX_IN_ROWS
    return _NO_PREFIX if prefix_k is None or prefix_k.shape[1] == 0 else _PREFIX_APART


def _prefix_pointers(k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without a prefix given apart, the rows themselves: read through `prefix_rows`, or not at all."""
    return (k, v) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)


def _prefix_strides(
    layout: Layout, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> tuple[int, ...]:
    if prefix_k is None or prefix_v is None:
        return (*layout.strides(k, True), *layout.strides(v, True))
    return (*prefix_k.stride()[:3], *prefix_v.stride()[:3])


def _constants(rules: ScoreRules) -> list[Tensor | None]:
    """Sinks, slopes and table as the kernels step through them."""
    return [None if x is None else x.contiguous() for x in (rules.sinks, rules.alibi_slopes, rules.relative_bias)]


def _reach(rules: ScoreRules) -> int:
    return 0 if rules.relative_bias is None else rules.relative_bias.shape[1] // 2


def _window(rules: ScoreRules, layout: Layout, prefix_len: int) -> int | None:
    """None where the window is wider than anything it could hide, so that whole blocks need no mask."""
    if rules.window is None:
        return None
    longest = layout.k_len + (layout.k_len if layout.in_rows else prefix_len)
    return None if rules.window >= longest else rules.window
