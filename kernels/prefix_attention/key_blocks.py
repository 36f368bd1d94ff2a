"""Which keys a tile of queries reads, and one block of them: what the forward kernel and the gradient of queries share.

A block belongs to the prefix or to the row, each read from where it lies. Knows no scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["key_bounds", "load_keys"]


@triton.jit
def key_bounds(
    first_t, last_t, shift, num_keys, num_prefix, window,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr,
):  # fmt: skip
    """The keys that query slots `first_t` to `last_t` of a row may see.

    Returns the first block and the end, in keys, of the prefix's and of the row's own, and the first query's index in
    its row, at least 0. Nothing for a tile that is all padding; a window passes over whole blocks.
    """
    own_first = tl.maximum(first_t + shift, 0)
    own_last = last_t + shift
    padding = (own_last < 0) | (own_first >= num_keys)
    prefix_begin = own_first * 0
    own_begin = own_first * 0
    prefix_end = tl.where(padding, 0, num_prefix)
    own_end = tl.where(padding, 0, tl.minimum(own_last + 1, num_keys) if CAUSAL else num_keys)
    if WINDOW:
        own_begin = tl.maximum(own_first - window + 1, 0) // BLOCK_N
        own_end = tl.minimum(own_end, own_last + window)
        if WINDOW_ON_PREFIX:
            prefix_begin = tl.maximum(num_prefix + own_first - window + 1, 0) // BLOCK_N
    return prefix_begin, prefix_end, own_begin, own_end, own_first


@triton.jit
def load_keys(
    i_block, is_prefix, p_k, p_v, p_pk, p_pv, stride_k_t, stride_v_t, stride_pk_t, stride_pv_t, num_keys, num_prefix,
    i_d, i_dv, m_d, m_dv, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Block `i_block` of the prefix or of the row: keys [N, D], values [N, DV], their indices (negative in a prefix, as
    in `device.bend`) and which of them exist, both [N]. Without MASKED all do, and none is looked at."""
    i_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    base_k = tl.where(is_prefix, p_pk, p_k)
    base_v = tl.where(is_prefix, p_pv, p_v)
    o_k = i_n.to(tl.int64) * tl.where(is_prefix, stride_pk_t, stride_k_t)  # [N]
    o_v = i_n.to(tl.int64) * tl.where(is_prefix, stride_pv_t, stride_v_t)  # [N]
    m_n = i_n < tl.where(is_prefix, num_prefix, num_keys)
    m_key = m_d[None, :]
    m_value = m_dv[None, :]
    if MASKED:
        m_key = m_key & m_n[:, None]
        m_value = m_value & m_n[:, None]
    b_k = tl.load(base_k + o_k[:, None] + i_d[None, :], mask=m_key, other=0.0)  # [N, D]
    b_v = tl.load(base_v + o_v[:, None] + i_dv[None, :], mask=m_value, other=0.0)  # [N, DV]
    return b_k, b_v, i_n - tl.where(is_prefix, num_prefix, 0), m_n
