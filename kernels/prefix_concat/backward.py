"""Triton, backward: a prefix's gradient summed over the rows that read it, and the rows' own through the rotation.

The sum is taken by one program per tile of one prompt, for one head: float32, groups of rows in ascending order, so the
same call gives the same bits. `triton_path.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_concat.device import move_tokens


@triton.jit(do_not_specialize=["B", "P", "tiles"])
def sum_kernel(
    of_prefix_ptr, of_out_ptr, prompt_ids_ptr, cu_seqlens_out_ptr, prefix_lengths_ptr,
    stride_of_out_b, stride_of_out_h, stride_of_out_s, stride_of_out_d,
    B, P, tiles,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """of_prefix [N, P, H_kv, D] from the first tokens of each row of of_out, dense or, with its cu_seqlens, packed."""
    i_prompt = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = (tl.program_id(0) % tiles).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_row = tl.arange(0, ROWS)[:, None, None]
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = (o_d < D)[None, :]
    length = i_prompt * 0 + P
    if prefix_lengths_ptr is not None:
        length = tl.load(prefix_lengths_ptr + i_prompt).to(tl.int64)
    m_read = ((o_p < length)[:, None] & m_d)[None, :, :]
    o_read = o_p[:, None] * stride_of_out_s + o_d[None, :] * stride_of_out_d
    p_of_out = of_out_ptr + i_head * stride_of_out_h + o_read[None, :, :]
    b_sum = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for first in range(0, B, ROWS):
        i_row = (first + o_row).to(tl.int64)
        m_row = i_row < B
        readers = ROWS
        if prompt_ids_ptr is not None:
            m_row = m_row & (tl.load(prompt_ids_ptr + i_row, mask=m_row, other=-1) == i_prompt)  # [ROWS, 1, 1]
            readers = tl.sum(m_row.to(tl.int32))
        if readers > 0:
            o_of_out = i_row * stride_of_out_b
            if cu_seqlens_out_ptr is not None:
                b_start = tl.load(cu_seqlens_out_ptr + i_row, mask=m_row, other=0)  # [ROWS, 1, 1]
                o_of_out = b_start.to(tl.int64) * stride_of_out_s
            # One block, so that the loads of all its rows are in flight together.
            b_of_out = tl.load(p_of_out + o_of_out, mask=m_row & m_read, other=0.0)  # [ROWS, BLOCK_P, BLOCK_D]
            b_sum += tl.sum(b_of_out.to(tl.float32), axis=0)
    o_of_prefix = ((i_prompt * P + o_p) * tl.num_programs(1) + i_head) * D
    p_of_prefix = of_prefix_ptr + o_of_prefix[:, None] + o_d[None, :]
    tl.store(p_of_prefix, b_sum.to(of_prefix_ptr.dtype.element_ty), mask=(o_p < P)[:, None] & m_d)


@triton.jit(do_not_specialize=["T", "tiles"])
def own_kernel(
    of_rows_ptr, of_out_ptr, cu_seqlens_ptr, cu_seqlens_out_ptr, cos_ptr, sin_ptr,
    stride_of_out_b, stride_of_out_h, stride_of_out_s, stride_of_out_d,
    stride_angle_b, stride_angle_t, stride_angle_d,
    T, tiles,
    D: tl.constexpr, D_ROT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """of_rows, token-major, from the own tokens of of_out: of_out starts with them, or, packed, rows end with them."""
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = (tl.program_id(0) % tiles).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_t = i_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    if cu_seqlens_ptr is None:
        length = T
        o_token = i_row * T + o_t
        o_of_out = i_row * stride_of_out_b + o_t * stride_of_out_s
    else:
        start = tl.load(cu_seqlens_ptr + i_row).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + i_row + 1).to(tl.int64) - start
        o_token = start + o_t
        o_of_out = (tl.load(cu_seqlens_out_ptr + i_row + 1).to(tl.int64) - length + o_t) * stride_of_out_s
    o_of_rows = (o_token * tl.num_programs(1) + i_head) * D
    o_angle = i_row * stride_angle_b + (o_t if cu_seqlens_ptr is None else o_token) * stride_angle_t
    move_tokens(
        of_rows_ptr, o_of_rows, 1, of_out_ptr, o_of_out + i_head * stride_of_out_h, stride_of_out_d, o_t < length,
        cos_ptr, sin_ptr, o_angle, stride_angle_d, D, D_ROT, BLOCK_D, BLOCK_HALF, BLOCK_REST, True,
    )  # fmt: skip
