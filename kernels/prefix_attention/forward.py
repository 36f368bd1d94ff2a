"""The forward kernel: one pass over a row's prefix and its own keys, and the merge of passes split along the keys.

One program computes BLOCK_M packed queries (tokens times the query heads that share a key head) of one row and one key
head. Keys come in two loops: blocks that every query of the tile sees whole, prefix first, without a mask; then what is
left, the prefix's tail and the diagonal. Both read the prefix and the row from where they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_attention.device import COUNTS, LN2, LOG2E, bend, prefix_span, row_span, visible
from ptengine.kernels.prefix_attention.key_blocks import key_blocks, load_keys

__all__ = ["combine_kernel", "forward_kernel"]


@triton.jit(do_not_specialize=[*COUNTS, "num_tiles"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, out_ptr, lse_ptr,
    bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, sinks_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_pk_n, stride_pk_t, stride_pk_h, stride_pv_n, stride_pv_t, stride_pv_h,
    scale, softcap, window, reach, total, q_len, k_len, prefix_len, num_tiles,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out [SPLITS *] [total, H, D_v] and lse [SPLITS *] [H, total]; grid (rows * H_kv * SPLITS * num_tiles)."""
    i_program = tl.program_id(0)
    i_tile = num_tiles - 1 - i_program % num_tiles  # under causality the last tiles are the longest: first
    i_split = (i_program // num_tiles) % SPLITS
    i_head_kv = (i_program // (num_tiles * SPLITS)) % HEADS_KV
    i_row = i_program // (num_tiles * SPLITS * HEADS_KV)
    flat, num_queries, start_q, start_k, num_keys, shift = row_span(i_row, bounds_ptr, ends_ptr, q_len, k_len, DENSE)
    if i_tile * BLOCK_M >= num_queries * GROUP:
        return
    o_prompt, o_token, num_prefix = prefix_span(i_row, bounds_ptr, prompts_ptr, lengths_ptr, prefix_len, PREFIX)

    i_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    i_t = i_m // GROUP  # [M]
    i_head = i_head_kv * GROUP + i_m % GROUP  # [M]
    own_q = i_t + shift  # [M]
    m_stored = i_t < num_queries
    m_q = m_stored & (own_q >= 0) & (own_q < num_keys)
    i_d = tl.arange(0, BLOCK_D)
    i_dv = tl.arange(0, BLOCK_DV)
    m_d = i_d < DIM
    m_dv = i_dv < DIM_V
    row = i_row.to(tl.int64)
    head_kv = i_head_kv.to(tl.int64)
    o_q = row * stride_q_b + (start_q + i_t) * stride_q_t + i_head.to(tl.int64) * stride_q_h  # [M]
    b_q = tl.load(q_ptr + o_q[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)  # [M, D]

    p_k = k_ptr + row * stride_k_b + start_k * stride_k_t + head_kv * stride_k_h
    p_v = v_ptr + row * stride_v_b + start_k * stride_v_t + head_kv * stride_v_h
    p_pk = prefix_k_ptr + o_prompt * stride_pk_n + o_token * stride_pk_t + head_kv * stride_pk_h
    p_pv = prefix_v_ptr + o_prompt * stride_pv_n + o_token * stride_pv_t + head_kv * stride_pv_h

    last_t = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    whole_prefix, whole, masked_prefix, masked, prefix_begin, own_begin = key_blocks(
        i_tile * BLOCK_M // GROUP, last_t, shift, num_keys, num_prefix, window,
        BLOCK_N, CAUSAL, WINDOW, WINDOW_ON_PREFIX,
    )  # fmt: skip
    blocks = whole + masked
    share = tl.cdiv(blocks, SPLITS)
    first = i_split * share
    last = tl.minimum(first + share, blocks)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_p = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        counted = i_split == 0  # once, however the keys are split
        maximum = tl.where(counted, tl.load(sinks_ptr + i_head).to(tl.float32) * LOG2E, maximum)  # [M]
        total_p = tl.where(counted, 1.0, total_p)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for i_block in range(first, tl.minimum(last, whole)):
        is_prefix = i_block < whole_prefix
        b_k, b_v, own_k, m_n = load_keys(
            i_block - tl.where(is_prefix, 0, whole_prefix), is_prefix,
            p_k, p_v, p_pk, p_pv, stride_k_t, stride_v_t, stride_pk_t, stride_pv_t, num_keys, num_prefix,
            i_d, i_dv, m_d, m_dv, BLOCK_N, False,
        )  # fmt: skip
        acc, maximum, total_p = _attend(
            acc, maximum, total_p, b_q, b_k, b_v, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
            scale, softcap, window, reach, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, False,
        )  # fmt: skip

    for i_block in range(tl.maximum(first, whole) - whole, last - whole):
        is_prefix = i_block < masked_prefix
        b_k, b_v, own_k, m_n = load_keys(
            tl.where(is_prefix, prefix_begin + i_block, own_begin + i_block - masked_prefix), is_prefix,
            p_k, p_v, p_pk, p_pv, stride_k_t, stride_v_t, stride_pk_t, stride_pv_t, num_keys, num_prefix,
            i_d, i_dv, m_d, m_dv, BLOCK_N, True,
        )  # fmt: skip
        acc, maximum, total_p = _attend(
            acc, maximum, total_p, b_q, b_k, b_v, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
            scale, softcap, window, reach, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, True,
        )  # fmt: skip

    nothing = (total_p == 0.0) | (m_q == 0)
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total_p)[:, None])  # [M, DV]
    lse = tl.where(nothing, float("-inf"), (maximum + tl.log2(tl.where(nothing, 1.0, total_p))) * LN2)  # [M]
    i_flat = i_split.to(tl.int64) * total + flat + i_t  # [M]
    o_out = (i_flat * (HEADS_KV * GROUP) + i_head) * DIM_V  # [M]
    tl.store(out_ptr + o_out[:, None] + i_dv[None, :], acc.to(out_ptr.dtype.element_ty),
             mask=m_stored[:, None] & m_dv[None, :])  # fmt: skip
    o_lse = (i_split.to(tl.int64) * (HEADS_KV * GROUP) + i_head) * total + flat + i_t  # [M]
    tl.store(lse_ptr + o_lse, lse, mask=m_stored)


@triton.jit
def _attend(
    acc, maximum, total_p, b_q, b_k, b_v, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
    scale, softcap, window, reach,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax: acc [M, DV], its maximum [M] and its sum [M]."""
    qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, D] @ [D, N]
    scores, _ = bend(
        qk, own_q[:, None], own_k[None, :], i_head[:, None], slopes_ptr, bias_ptr, scale, softcap, reach, SOFTCAP
    )
    if MASKED:
        seen = visible(own_q[:, None], own_k[None, :], m_n[None, :], window, CAUSAL, WINDOW, WINDOW_ON_PREFIX)
        scores = tl.where(seen, scores, float("-inf"))
    b_max = tl.maximum(maximum, tl.max(scores, 1))  # [M]
    pivot = b_max
    if MASKED:
        pivot = tl.where(b_max == float("-inf"), 0.0, b_max)  # nothing seen yet: weights of 0, not NaN
    p = tl.exp2(scores - pivot[:, None])  # [M, N]
    alpha = tl.exp2(maximum - pivot)
    total_p = total_p * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision="ieee")  # [M, N] @ [N, DV]
    return acc, b_max, total_p


@triton.jit(do_not_specialize=["total"])
def combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, total,
    HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge SPLITS partial results, fp32 [SPLITS, total, H, D_v] with lse [SPLITS, H, total]; grid (total * H)."""
    i_pair = tl.program_id(0).to(tl.int64)
    i_token, i_head = i_pair // HEADS, i_pair % HEADS
    i_s = tl.arange(0, BLOCK_S).to(tl.int64)
    i_dv = tl.arange(0, BLOCK_DV)
    m_s = i_s < SPLITS
    m_dv = i_dv < DIM_V
    o_lse = (i_s * HEADS + i_head) * total + i_token  # [S]
    lse = tl.load(part_lse_ptr + o_lse, mask=m_s, other=float("-inf"))  # [S]
    highest = tl.max(lse, 0)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2((lse - pivot) * LOG2E)  # [S]
    whole = tl.sum(weights, 0)
    o_part = ((i_s * total + i_token) * HEADS + i_head) * DIM_V  # [S]
    part = tl.load(part_ptr + o_part[:, None] + i_dv[None, :], mask=m_s[:, None] & m_dv[None, :], other=0.0)  # [S, DV]
    nothing = whole == 0.0
    whole = tl.where(nothing, 1.0, whole)
    out = tl.sum(part * weights[:, None], 0) / whole  # [DV]
    tl.store(out_ptr + i_pair * DIM_V + i_dv, out.to(out_ptr.dtype.element_ty), mask=m_dv)
    tl.store(lse_ptr + i_head * total + i_token, tl.where(nothing, float("-inf"), pivot + tl.log2(whole) * LN2))
