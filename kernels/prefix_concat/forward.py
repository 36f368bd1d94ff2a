"""Triton, forward: prefix and own tokens written to a dense, packed or paged layout, one launch each.

A program writes one tile of one row's prefix or of its own tokens, for one head. `triton_path.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_concat.device import copy_channels, move_tokens, prompt_of

# Lengths differ from call to call; specialising on them would compile again and gain nothing.
_LENGTHS = ["N", "P", "T", "tiles"]


@triton.jit
def _place(
    i_row, o_s, m_s, stride_out_b, stride_out_s,
    block_table_ptr, stride_table_b, stride_table_i, block_size, num_blocks,
):  # fmt: skip
    """Where tokens `o_s` of row `i_row` go, int64 [S], and which of them go anywhere."""
    if block_table_ptr is None:
        o_out = i_row * stride_out_b + o_s * stride_out_s
    else:
        p_block = block_table_ptr + i_row * stride_table_b + (o_s // block_size) * stride_table_i
        b_block = tl.load(p_block, mask=m_s, other=-1).to(tl.int64)  # [S]
        m_s = m_s & (b_block >= 0) & (b_block < num_blocks)
        o_out = b_block * stride_out_b + (o_s % block_size) * stride_out_s
    return o_out, m_s


@triton.jit(do_not_specialize=_LENGTHS)
def concat_kernel(
    out_ptr, prefix_ptr, rows_ptr, prompt_ids_ptr, cos_ptr, sin_ptr, block_table_ptr,
    stride_out_b, stride_out_s, stride_out_h, stride_out_d,
    stride_prefix_n, stride_prefix_p, stride_prefix_h, stride_prefix_d,
    stride_rows_b, stride_rows_h, stride_rows_t, stride_rows_d,
    stride_angle_b, stride_angle_t, stride_angle_d,
    stride_table_b, stride_table_i, block_size, num_blocks,
    N, P, T, tiles,
    D: tl.constexpr, D_ROT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Dense, or paged with `block_table_ptr`: then stride_out_b is that of a block and stride_out_s that of a slot."""
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_head = tl.program_id(1).to(tl.int64)
    out_ptr += i_head * stride_out_h
    prefix_tiles = tl.cdiv(P, BLOCK_S)
    if i_tile < prefix_tiles:
        i_prompt, known = prompt_of(prompt_ids_ptr, i_row, N)
        o_s = i_tile.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        o_out, m_out = _place(
            i_row, o_s, o_s < P, stride_out_b, stride_out_s,
            block_table_ptr, stride_table_b, stride_table_i, block_size, num_blocks,
        )  # fmt: skip
        o_prefix = i_prompt * stride_prefix_n + i_head * stride_prefix_h + o_s * stride_prefix_p
        copy_channels(
            out_ptr, o_out, stride_out_d, prefix_ptr, o_prefix, stride_prefix_d,
            m_out, m_out & (o_s < tl.where(known, P, 0)), 0, D, BLOCK_D,
        )  # fmt: skip
    else:
        o_t = (i_tile - prefix_tiles).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        o_out, m_out = _place(
            i_row, P + o_t, o_t < T, stride_out_b, stride_out_s,
            block_table_ptr, stride_table_b, stride_table_i, block_size, num_blocks,
        )  # fmt: skip
        o_rows = i_row * stride_rows_b + i_head * stride_rows_h + o_t * stride_rows_t
        o_angle = i_row * stride_angle_b + o_t * stride_angle_t
        move_tokens(
            out_ptr, o_out, stride_out_d, rows_ptr, o_rows, stride_rows_d, m_out,
            cos_ptr, sin_ptr, o_angle, stride_angle_d, D, D_ROT, BLOCK_D, BLOCK_HALF, BLOCK_REST, False,
        )  # fmt: skip


@triton.jit
def _length_of(i_prompt, known, prefix_lengths_ptr, P):
    """Prefix tokens of a row that reads `i_prompt`, int64; scalars or blocks alike."""
    length = tl.where(known, P, 0).to(tl.int64)
    if prefix_lengths_ptr is not None:
        length = tl.load(prefix_lengths_ptr + i_prompt, mask=known, other=0).to(tl.int64)
    return length


@triton.jit
def _virtual_before(i_row, prompt_ids_ptr, prefix_lengths_ptr, N, P, COUNTED: tl.constexpr):
    """Prefix tokens of all rows before `i_row`, int64."""
    count = i_row * 0
    if prompt_ids_ptr is None:
        count = i_row * _length_of(i_row * 0, i_row >= 0, prefix_lengths_ptr, P)
    else:
        for first in range(0, i_row, COUNTED):
            o_row = first + tl.arange(0, COUNTED)
            b_prompt = tl.load(prompt_ids_ptr + o_row, mask=o_row < i_row, other=-1).to(tl.int64)  # [COUNTED]
            known = (b_prompt >= 0) & (b_prompt < N)
            count += tl.sum(_length_of(b_prompt, known, prefix_lengths_ptr, P))
    return count


@triton.jit(do_not_specialize=[*_LENGTHS, "out_tokens"])
def concat_packed_kernel(
    out_ptr, cu_seqlens_out_ptr, prefix_ptr, rows_ptr, cu_seqlens_ptr, prompt_ids_ptr, prefix_lengths_ptr,
    cos_ptr, sin_ptr,
    stride_out_s, stride_out_h, stride_out_d,
    stride_prefix_n, stride_prefix_p, stride_prefix_h, stride_prefix_d,
    stride_rows_t, stride_rows_h, stride_rows_d, stride_angle_t, stride_angle_d,
    N, P, tiles, out_tokens,
    D: tl.constexpr, D_ROT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i_row).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + i_row + 1).to(tl.int64) - start
    i_prompt, known = prompt_of(prompt_ids_ptr, i_row, N)
    virtual = _length_of(i_prompt, known, prefix_lengths_ptr, P)
    start_out = start + _virtual_before(i_row, prompt_ids_ptr, prefix_lengths_ptr, N, P, COUNTED)
    if (i_tile == 0) & (i_head == 0):
        p_bound = cu_seqlens_out_ptr + i_row
        tl.store(p_bound, start_out.to(cu_seqlens_out_ptr.dtype.element_ty))  # the end of the row before, too
        tl.store(p_bound + 1, (start_out + virtual + length).to(cu_seqlens_out_ptr.dtype.element_ty))
    out_ptr += i_head * stride_out_h
    prefix_tiles = tl.cdiv(P, BLOCK_S)
    if i_tile < prefix_tiles:
        o_s = i_tile.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        m_s = (o_s < virtual) & (start_out + o_s < out_tokens)
        o_prefix = i_prompt * stride_prefix_n + i_head * stride_prefix_h + o_s * stride_prefix_p
        copy_channels(
            out_ptr, (start_out + o_s) * stride_out_s, stride_out_d, prefix_ptr, o_prefix, stride_prefix_d,
            m_s, m_s, 0, D, BLOCK_D,
        )  # fmt: skip
    else:
        o_t = (i_tile - prefix_tiles).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        o_s = start_out + virtual + o_t
        m_s = (o_t < length) & (o_s < out_tokens)
        o_rows = (start + o_t) * stride_rows_t + i_head * stride_rows_h
        move_tokens(
            out_ptr, o_s * stride_out_s, stride_out_d, rows_ptr, o_rows, stride_rows_d, m_s,
            cos_ptr, sin_ptr, (start + o_t) * stride_angle_t, stride_angle_d,
            D, D_ROT, BLOCK_D, BLOCK_HALF, BLOCK_REST, False,
        )  # fmt: skip
