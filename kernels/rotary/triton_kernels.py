"""The Triton kernel of rotary: some heads of one token's queries or keys. It knows pointers and strides only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turn_heads(
    out_ptr, x_ptr, stride_x_n, stride_x_h, p_cos, p_sin, i_n, i_tile,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Heads of token `i_n` through the rotation at `p_cos` and `p_sin`, or through its transpose."""
    HALF: tl.constexpr = R // 2
    o_h = i_tile.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)  # [H]
    o_d = tl.arange(0, BLOCK_HALF)
    m_h = (o_h < H)[:, None]
    m_d = o_d < HALF
    m = m_h & m_d[None, :]
    p_x = x_ptr + i_n * stride_x_n + (o_h * stride_x_h)[:, None]  # [H, 1]
    p_out = out_ptr + i_n * H * D + (o_h * D)[:, None]  # [H, 1]
    b_first = tl.load(p_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [H, HALF]
    b_second = tl.load(p_x + HALF + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [H, HALF]
    b_cos_first = tl.load(p_cos + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, HALF]
    b_cos_second = tl.load(p_cos + HALF + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin_first = tl.load(p_sin + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin_second = tl.load(p_sin + HALF + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if BACK:
        b_new_first = b_first * b_cos_first + b_second * b_sin_second
        b_new_second = b_second * b_cos_second - b_first * b_sin_first
    else:
        b_new_first = b_first * b_cos_first - b_second * b_sin_first
        b_new_second = b_second * b_cos_second + b_first * b_sin_second
    tl.store(p_out + o_d[None, :], b_new_first.to(out_ptr.dtype.element_ty), mask=m)
    tl.store(p_out + HALF + o_d[None, :], b_new_second.to(out_ptr.dtype.element_ty), mask=m)
    if R < D:
        o_rest = R + tl.arange(0, BLOCK_REST)
        m_rest = m_h & (o_rest < D)[None, :]
        tl.store(p_out + o_rest[None, :], tl.load(p_x + o_rest[None, :], mask=m_rest, other=0.0), mask=m_rest)


@triton.jit
def turn_kernel(
    out_q_ptr, out_k_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr,
    stride_q_n, stride_q_h, stride_k_n, stride_k_h, stride_angle_n,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """out_q [N, H, D] and out_k [N, H_kv, D], contiguous. The programs of one token: queries' heads, then keys'."""
    TILES_Q: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    TILES: tl.constexpr = TILES_Q + (H_KV + BLOCK_H - 1) // BLOCK_H
    i_n = (tl.program_id(0) // TILES).to(tl.int64)
    i_tile = tl.program_id(0) % TILES
    p_cos = cos_ptr + i_n * stride_angle_n
    p_sin = sin_ptr + i_n * stride_angle_n
    if i_tile < TILES_Q:
        _turn_heads(
            out_q_ptr, q_ptr, stride_q_n, stride_q_h, p_cos, p_sin, i_n, i_tile,
            H, D, R, BLOCK_H, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
    else:
        _turn_heads(
            out_k_ptr, k_ptr, stride_k_n, stride_k_h, p_cos, p_sin, i_n, i_tile - TILES_Q,
            H_KV, D, R, BLOCK_H, BLOCK_HALF, BLOCK_REST, BACK,
        )  # fmt: skip
