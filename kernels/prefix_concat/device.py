"""Device functions that the forward and the backward kernels share: moving tokens from one layout to another.

Tokens are given by the offsets of their first channels, so a layout is whatever the caller computed them from.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_channels(
    out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_out, m_x,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels FIRST to LAST of tokens at `o_x` go to `o_out` (int64 [S] both), where `m_out`; NaN where not `m_x`."""
    o_d = FIRST + tl.arange(0, BLOCK).to(tl.int64)  # a channel may lie further than 2^31 elements from the first
    m_d = (o_d < LAST)[None, :]
    b_x = tl.load(
        x_ptr + o_x[:, None] + o_d[None, :] * stride_x_d, mask=(m_out & m_x)[:, None] & m_d, other=float("nan")
    )  # [S, BLOCK]
    p_out = out_ptr + o_out[:, None] + o_d[None, :] * stride_out_d
    tl.store(p_out, b_x.to(out_ptr.dtype.element_ty), mask=m_out[:, None] & m_d)


@triton.jit
def turn_channels(
    out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_token,
    cos_ptr, sin_ptr, o_angle, stride_angle_d,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The first 2 * HALF channels through the rotation given at `o_angle` (int64 [S]), or through its transpose."""
    o_first = tl.arange(0, BLOCK).to(tl.int64)
    o_second = o_first + HALF
    m = m_token[:, None] & (o_first < HALF)[None, :]
    b_first = tl.load(x_ptr + o_x[:, None] + o_first[None, :] * stride_x_d, mask=m).to(tl.float32)  # [S, BLOCK]
    b_second = tl.load(x_ptr + o_x[:, None] + o_second[None, :] * stride_x_d, mask=m).to(tl.float32)  # [S, BLOCK]
    o_angle_first = o_angle[:, None] + o_first[None, :] * stride_angle_d
    o_angle_second = o_angle[:, None] + o_second[None, :] * stride_angle_d
    b_cos_first = tl.load(cos_ptr + o_angle_first, mask=m).to(tl.float32)  # [S, BLOCK]
    b_cos_second = tl.load(cos_ptr + o_angle_second, mask=m).to(tl.float32)  # [S, BLOCK]
    b_sin_first = tl.load(sin_ptr + o_angle_first, mask=m).to(tl.float32)  # [S, BLOCK]
    b_sin_second = tl.load(sin_ptr + o_angle_second, mask=m).to(tl.float32)  # [S, BLOCK]
    if BACK:
        b_new_first = b_first * b_cos_first + b_second * b_sin_second
        b_new_second = b_second * b_cos_second - b_first * b_sin_first
    else:
        b_new_first = b_first * b_cos_first - b_second * b_sin_first
        b_new_second = b_second * b_cos_second + b_first * b_sin_second
    p_out = out_ptr + o_out[:, None]
    tl.store(p_out + o_first[None, :] * stride_out_d, b_new_first.to(out_ptr.dtype.element_ty), mask=m)
    tl.store(p_out + o_second[None, :] * stride_out_d, b_new_second.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
def move_tokens(
    out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_token,
    cos_ptr, sin_ptr, o_angle, stride_angle_d,
    D: tl.constexpr, D_ROT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All D channels of a row's own tokens, the first D_ROT of them turned; 0 is no rotation."""
    if D_ROT == 0:
        copy_channels(out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_token, m_token, 0, D, BLOCK_D)
    else:
        turn_channels(
            out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_token,
            cos_ptr, sin_ptr, o_angle, stride_angle_d, D_ROT // 2, BLOCK_HALF, BACK,
        )  # fmt: skip
        if D_ROT < D:
            copy_channels(
                out_ptr, o_out, stride_out_d, x_ptr, o_x, stride_x_d, m_token, m_token, D_ROT, D, BLOCK_REST
            )  # fmt: skip


@triton.jit
def prompt_of(prompt_ids_ptr, i_row, N):
    """The prompt of row `i_row`, int64, and whether there is such a prompt; prompt 0 without `prompt_ids_ptr`."""
    prompt = i_row * 0
    if prompt_ids_ptr is not None:
        prompt = tl.load(prompt_ids_ptr + i_row).to(tl.int64)
    return prompt, (prompt >= 0) & (prompt < N)
