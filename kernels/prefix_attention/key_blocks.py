"""Which keys a tile of queries reads, and one block of them: what the forward kernel and the gradient of queries share.

A block belongs to the prefix or to the row, each read from where it lies. Knows no scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["key_blocks", "load_keys"]


@triton.jit
def key_blocks(
    first_t, last_t, shift, num_keys, num_prefix, window,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr,
):  # fmt: skip
    """The blocks of keys that query slots `first_t` to `last_t` of a row read, in the order in which they are read.

    Whole blocks, which every one of these queries sees, of the prefix and then of the row; then those that need a mask,
    of the prefix and then of the row. A window masks everything it does not pass over. Nothing is read for a tile that
    is all padding.

    Returns how many are whole of the prefix, whole in all, masked of the prefix, masked in all, and the first masked
    block of the prefix and of the row.
    """
    own_first = tl.maximum(first_t + shift, 0)
    own_last = last_t + shift
    padding = (own_last < 0) | (own_first >= num_keys)
    prefix_end = tl.where(padding, 0, num_prefix)
    own_end = tl.where(padding, 0, tl.minimum(own_last + 1, num_keys) if CAUSAL else num_keys)
    if WINDOW:
        whole_prefix = own_first * 0
        whole_own = own_first * 0
        prefix_begin = own_first * 0
        if WINDOW_ON_PREFIX:
            prefix_begin = tl.maximum(num_prefix + own_first - window + 1, 0) // BLOCK_N
        own_begin = tl.maximum(own_first - window + 1, 0) // BLOCK_N
        own_end = tl.minimum(own_end, own_last + window)
    else:
        whole_prefix = prefix_end // BLOCK_N
        whole_own = (tl.minimum(own_first + 1, own_end) if CAUSAL else own_end) // BLOCK_N
        prefix_begin = whole_prefix
        own_begin = whole_own
    masked_prefix = tl.maximum(tl.cdiv(prefix_end, BLOCK_N) - prefix_begin, 0)
    masked_own = tl.maximum(tl.cdiv(own_end, BLOCK_N) - own_begin, 0)
    return whole_prefix, whole_prefix + whole_own, masked_prefix, masked_prefix + masked_own, prefix_begin, own_begin


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
