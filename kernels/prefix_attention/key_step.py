"""One block of queries' part in the gradient of one block of keys and values.

The inner step of both the row's and the prefix's part of the backward kernel. Knows neither rows nor prompts, only
offsets and indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_attention.device import bend, inside

__all__ = ["accumulators", "key_step"]


@triton.jit
def _along(x, SWAPPED: tl.constexpr):
    """A vector over queries, to broadcast against scores."""
    return tl.expand_dims(x, 1 if SWAPPED else 0)


@triton.jit
def key_step(
    dk, dv, b_k, b_v, m_q, o_q, o_grad, o_base, own_q, i_head, own_k, i_n, bound,
    q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr, scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
    DENSE: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    BOUNDED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Add one block of queries' part of the gradient of one block of keys and values.

    Scores are [N, M], keys by queries, so that weights come out as the left side of the products; SWAPPED, they are
    [M, N] and the gradients [D, N], for blocks of fewer keys than the tensor cores take as rows. With BOUNDED a query
    sees keys `i_n` up to its `bound` [M]. `own_q` [M] and `own_k` [N, 1] or [N, M] are the indices of `bend`.
    """
    base = tl.load(base_ptr + o_base, mask=m_q, other=float("inf"))  # [M]
    delta = tl.load(delta_ptr + o_base, mask=m_q, other=0.0)  # [M]
    if DENSE:
        m_q = m_q & (base < float("inf"))  # whatever lies in padding is not touched
    b_q = tl.load(q_ptr + o_q[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)  # [M, D]
    b_grad = tl.load(grad_ptr + o_grad[:, None] + i_dv[None, :], mask=m_q[:, None] & m_dv[None, :], other=0.0)  # [M,DV]
    if SWAPPED:
        own_k = tl.trans(own_k)  # [1, N] or [M, N]
        keys = i_n[None, :]
        qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, D] @ [D, N]
        dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")  # [M, DV] @ [DV, N]
    else:
        keys = i_n[:, None]
        qk = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [N, D] @ [D, M]
        dp = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")  # [N, DV] @ [DV, M]
    scores, slope = bend(
        qk, _along(own_q, SWAPPED), own_k, _along(i_head, SWAPPED), slopes_ptr, bias_ptr, scale, softcap, reach, SOFTCAP
    )
    p = tl.exp2(scores - _along(base, SWAPPED))
    if BOUNDED:
        p = tl.where(keys <= _along(bound, SWAPPED), p, 0.0)
    if WINDOW:
        p = tl.where(inside(_along(own_q, SWAPPED), own_k, window, WINDOW_ON_PREFIX), p, 0.0)
    ds = (p * (dp - _along(delta, SWAPPED)) * slope).to(b_q.dtype)
    p = p.to(b_grad.dtype)
    if SWAPPED:
        dv = tl.dot(tl.trans(b_grad), p, dv, input_precision="ieee")  # [DV, M] @ [M, N]
        dk = tl.dot(tl.trans(b_q), ds, dk, input_precision="ieee")  # [D, M] @ [M, N]
    else:
        dv = tl.dot(p, b_grad, dv, input_precision="ieee")  # [N, M] @ [M, DV]
        dk = tl.dot(ds, b_q, dk, input_precision="ieee")  # [N, M] @ [M, D]
    return dk, dv


@triton.jit
def accumulators(BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SWAPPED: tl.constexpr):
    """Zeros for dk and dv: [N, D] and [N, DV], the other way round with SWAPPED."""
    if SWAPPED:
        dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        dv = tl.zeros([BLOCK_DV, BLOCK_N], tl.float32)
    else:
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    return dk, dv
