"""The two Triton kernels of rms_norm, on one tile of rows. They know pointers and strides only.

Row i of an input lies at i // INNER times the outer stride plus i % INNER times the inner one, so that the heads of a
slice of one projection need no copy. Outputs are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(x_ptr, stride_outer, stride_inner, o_n, o_d, m, INNER: tl.constexpr):
    """float32 [N, D], 0 where not m."""
    o_x = (o_n // INNER) * stride_outer + (o_n % INNER) * stride_inner  # [N]
    return tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    out_ptr, x_ptr, weight_ptr, stride_x_outer, stride_x_inner, rows, eps, offset,
    D: tl.constexpr, INNER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [rows, D]"""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    o_d = tl.arange(0, BLOCK_D)  # [D]
    m_d = o_d < D
    m = (o_n < rows)[:, None] & m_d[None, :]
    b_x = _load_rows(x_ptr, stride_x_outer, stride_x_inner, o_n, o_d, m, INNER)  # [N, D]
    b_scale = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32) + offset  # [D]
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)  # [N]
    b_out = b_x * b_rstd[:, None] * b_scale[None, :]
    tl.store(out_ptr + o_n[:, None] * D + o_d[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    of_x_ptr, of_out_ptr, x_ptr, weight_ptr,
    stride_of_out_outer, stride_of_out_inner, stride_x_outer, stride_x_inner, rows, eps, offset,
    D: tl.constexpr, INNER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """of_x [rows, D]. The row is read anyway, so its norm is computed again instead of having been stored."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    o_d = tl.arange(0, BLOCK_D)  # [D]
    m_d = o_d < D
    m = (o_n < rows)[:, None] & m_d[None, :]
    b_x = _load_rows(x_ptr, stride_x_outer, stride_x_inner, o_n, o_d, m, INNER)  # [N, D]
    b_of_out = _load_rows(of_out_ptr, stride_of_out_outer, stride_of_out_inner, o_n, o_d, m, INNER)  # [N, D]
    b_scale = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32) + offset  # [D]
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)  # [N]
    b_normed = b_x * b_rstd[:, None]  # [N, D]
    b_of_normed = b_of_out * b_scale[None, :]  # [N, D]
    b_along = tl.sum(b_normed * b_of_normed, axis=1) / D  # [N]
    b_of_x = (b_of_normed - b_normed * b_along[:, None]) * b_rstd[:, None]
    tl.store(of_x_ptr + o_n[:, None] * D + o_d[None, :], b_of_x.to(of_x_ptr.dtype.element_ty), mask=m)
