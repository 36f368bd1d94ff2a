"""The two Triton kernels of gated_activation, on one block of one row. They know pointers and strides only."""

from __future__ import annotations

import triton
import triton.language as tl

# To the right of a block in a product: the interpreter takes a block times a constant, not a constant times a block.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi), the normal density at 0
_TWO_SQRT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and sigmoid(-x), each without the other's cancellation: the slopes need both."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x >= 0.0, larger, smaller), tl.where(x >= 0.0, smaller, larger)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative, of which the forward kernel leaves the second to be dropped."""
    if ACTIVATION == "silu":
        s, opposite = _sigmoid(x)
        value = x * s
        slope = s + value * opposite
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        value = x * s
        slope = s + x * _DENSITY * tl.exp(-0.5 * x * x)
    else:  # 0.5 * (1 + tanh(u)) is sigmoid(2 u), which needs no libdevice
        square = x * x
        s, opposite = _sigmoid(x * _TWO_SQRT * (square * _CUBIC + 1.0))
        value = x * s
        slope = s + value * opposite * (square * (3.0 * _CUBIC) + 1.0) * _TWO_SQRT
    return value, slope


@triton.jit
def _place(tiles, columns, BLOCK: tl.constexpr):
    """This program's row and columns, int64, and which of them there are."""
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_c = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i_row, o_c, o_c < columns


@triton.jit(do_not_specialize=["tiles"])
def forward_kernel(
    out_ptr, gate_ptr, up_ptr, stride_gate, stride_up, columns, tiles, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [rows, columns], contiguous."""
    i_row, o_c, m = _place(tiles, columns, BLOCK)
    b_gate = tl.load(gate_ptr + i_row * stride_gate + o_c, mask=m, other=0.0).to(tl.float32)  # [C]
    b_up = tl.load(up_ptr + i_row * stride_up + o_c, mask=m, other=0.0).to(tl.float32)  # [C]
    b_value, _ = _activate(b_gate, ACTIVATION)
    tl.store(out_ptr + i_row * columns + o_c, (b_value * b_up).to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["tiles"])
def backward_kernel(
    of_gate_ptr, of_up_ptr, of_out_ptr, gate_ptr, up_ptr, stride_of_out, stride_gate, stride_up, columns, tiles,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """of_gate and of_up [rows, columns], contiguous. The activation is computed again instead of having been stored."""
    i_row, o_c, m = _place(tiles, columns, BLOCK)
    b_of_out = tl.load(of_out_ptr + i_row * stride_of_out + o_c, mask=m, other=0.0).to(tl.float32)  # [C]
    b_gate = tl.load(gate_ptr + i_row * stride_gate + o_c, mask=m, other=0.0).to(tl.float32)  # [C]
    b_up = tl.load(up_ptr + i_row * stride_up + o_c, mask=m, other=0.0).to(tl.float32)  # [C]
    b_value, b_slope = _activate(b_gate, ACTIVATION)
    o_out = i_row * columns + o_c
    tl.store(of_gate_ptr + o_out, (b_of_out * b_up * b_slope).to(of_gate_ptr.dtype.element_ty), mask=m)
    tl.store(of_up_ptr + o_out, (b_of_out * b_value).to(of_up_ptr.dtype.element_ty), mask=m)
