"""The backward kernel: every gradient in one launch, in three parts of one grid that run side by side.

The prefix part stands in `backward_prefix.py`; here are the other two: gradients of a row's keys and values, a tile of
keys passing over the row's queries, and of the queries, a tile of them passing over its prefix and its row's keys. A
row that others read as their prefix is left to the prefix part, own queries included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_attention.backward_prefix import prefix_part
from ptengine.kernels.prefix_attention.device import (
    COUNTS,
    NO_PREFIX,
    PREFIX_IN_ROWS,
    bend,
    prefix_span,
    row_span,
    visible,
)
from ptengine.kernels.prefix_attention.key_blocks import key_blocks, load_keys
from ptengine.kernels.prefix_attention.key_step import accumulators, key_step

__all__ = ["backward_kernel"]


@triton.jit(do_not_specialize=[*COUNTS, "rows", "prompts", "prefix_programs", "wanted", "key_tiles", "query_tiles"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, base_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
    bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_pk_n, stride_pk_t, stride_pk_h, stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
    prefix_programs, wanted, key_tiles, query_tiles,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, QUERY_M: tl.constexpr, QUERY_N: tl.constexpr,
    KEY_M: tl.constexpr, KEY_N: tl.constexpr, PREFIX_M: tl.constexpr, PREFIX_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    ATOMIC: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Every gradient; grid (prefix_programs + rows * H_kv * (key_tiles + query_tiles) if ROWS)."""
    i_program = tl.program_id(0)
    if i_program < prefix_programs:
        if PREFIX != NO_PREFIX:  # else some of these pointers are None, which does not compile
            prefix_part(
                i_program, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, base_ptr, delta_ptr,
                dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
                bounds_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_pk_n, stride_pk_t, stride_pk_h,
                stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h, stride_dk_t, stride_dk_h,
                stride_dv_t, stride_dv_h, scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
                wanted, HEADS_KV, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, PREFIX_M, PREFIX_N, BLOCK_R,
                DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, ATOMIC, SWAPPED,
            )  # fmt: skip
    elif ROWS:
        i_rest = i_program - prefix_programs
        per_row = key_tiles + query_tiles
        i_tile = i_rest % per_row
        i_head_kv = (i_rest // per_row) % HEADS_KV
        i_row = i_rest // (per_row * HEADS_KV)
        if i_tile < key_tiles:
            _key_part(
                i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, grad_ptr, base_ptr, delta_ptr, dk_ptr, dv_ptr,
                bounds_ptr, ends_ptr, offsets_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_g_t, stride_g_h,
                stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
                scale, softcap, window, reach, total, q_len, k_len,
                GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, KEY_M, KEY_N,
                DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, SWAPPED,
            )  # fmt: skip
        else:
            _query_part(
                i_row, i_head_kv, i_tile - key_tiles, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
                grad_ptr, base_ptr, delta_ptr, dq_ptr,
                bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_pk_n, stride_pk_t, stride_pk_h,
                stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
                scale, softcap, window, reach, total, q_len, k_len, prefix_len,
                HEADS_KV, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, QUERY_M, QUERY_N,
                DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP,
            )  # fmt: skip


@triton.jit
def _key_part(
    i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, grad_ptr, base_ptr, delta_ptr, dk_ptr, dv_ptr,
    bounds_ptr, ends_ptr, offsets_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_g_t, stride_g_h, stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    scale, softcap, window, reach, total, q_len, k_len,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a row's keys and values; every slot is written, padding with zeros."""
    flat, num_queries, start_q, start_k, num_keys, shift = row_span(i_row, bounds_ptr, ends_ptr, q_len, k_len, DENSE)
    i_slot = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]: of the row in memory
    first_slot = (start_k if DENSE else start_k * 0).to(tl.int32)  # where the row's keys begin in it
    slots = k_len if DENSE else num_keys
    mine = i_tile * BLOCK_N < slots
    if PREFIX == PREFIX_IN_ROWS:
        mine = mine & (tl.load(offsets_ptr + i_row + 1) == tl.load(offsets_ptr + i_row))
    if mine:
        i_n = i_slot - first_slot  # [N]: index of each key in its row
        m_n = (i_n >= 0) & (i_n < num_keys)
        i_d = tl.arange(0, BLOCK_D)
        i_dv = tl.arange(0, BLOCK_DV)
        m_d = i_d < DIM
        m_dv = i_dv < DIM_V
        row = i_row.to(tl.int64)
        head_kv = i_head_kv.to(tl.int64)
        i_key = start_k + i_n  # [N]
        p_k = k_ptr + row * stride_k_b + head_kv * stride_k_h + i_key[:, None] * stride_k_t
        p_v = v_ptr + row * stride_v_b + head_kv * stride_v_h + i_key[:, None] * stride_v_t
        b_k = tl.load(p_k + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)  # [N, D]
        b_v = tl.load(p_v + i_dv[None, :], mask=m_n[:, None] & m_dv[None, :], other=0.0)  # [N, DV]
        dk, dv = accumulators(BLOCK_N, BLOCK_D, BLOCK_DV, SWAPPED)
        first_key = i_tile * BLOCK_N - first_slot  # negative where a block begins in padding
        slot_first = tl.maximum(-shift, 0)  # the first query slot that holds a token
        slot_end = tl.minimum(num_queries, num_keys - shift)
        if CAUSAL:
            slot_first = tl.maximum(slot_first, first_key - shift)
        if WINDOW:
            slot_first = tl.maximum(slot_first, first_key - window + 1 - shift)
            slot_end = tl.minimum(slot_end, first_key + BLOCK_N + window - shift)
        begin = slot_first * GROUP // BLOCK_M * BLOCK_M
        whole = begin  # packed queries from here on see every key of the block
        if CAUSAL:
            slot_whole = tl.minimum(first_key + BLOCK_N - 1 - shift, slot_end)
            whole = tl.maximum(tl.cdiv(slot_whole * GROUP, BLOCK_M) * BLOCK_M, begin)
            for i_first in range(begin, tl.minimum(whole, slot_end * GROUP), BLOCK_M):
                dk, dv = _key_block(
                    dk, dv, b_k, b_v, i_first, i_n, flat, start_q, shift, slot_end, row, i_head_kv,
                    q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr,
                    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
                    scale, softcap, window, reach, total, i_d, i_dv, m_d, m_dv,
                    GROUP, BLOCK_M, DENSE, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, True, SWAPPED,
                )  # fmt: skip
        for i_first in range(whole, slot_end * GROUP, BLOCK_M):
            dk, dv = _key_block(
                dk, dv, b_k, b_v, i_first, i_n, flat, start_q, shift, slot_end, row, i_head_kv,
                q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
                scale, softcap, window, reach, total, i_d, i_dv, m_d, m_dv,
                GROUP, BLOCK_M, DENSE, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, False, SWAPPED,
            )  # fmt: skip
        m_stored = i_slot < slots
        if SWAPPED:
            dk, dv = tl.trans(dk), tl.trans(dv)  # [N, D], [N, DV]
        dk = tl.where(m_n[:, None], dk * scale, 0.0)
        dv = tl.where(m_n[:, None], dv, 0.0)
        p_dk = dk_ptr + row * stride_dk_b + head_kv * stride_dk_h + i_key[:, None] * stride_dk_t
        p_dv = dv_ptr + row * stride_dv_b + head_kv * stride_dv_h + i_key[:, None] * stride_dv_t
        tl.store(p_dk + i_d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=m_stored[:, None] & m_d[None, :])
        tl.store(p_dv + i_dv[None, :], dv.to(dv_ptr.dtype.element_ty), mask=m_stored[:, None] & m_dv[None, :])


@triton.jit
def _key_block(
    dk, dv, b_k, b_v, i_first, i_n, flat, start_q, shift, slot_end, row, i_head_kv,
    q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
    scale, softcap, window, reach, total, i_d, i_dv, m_d, m_dv,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """The part of the row's packed queries from `i_first` on, one block of them, in the gradient of keys `i_n`."""
    i_m = i_first + tl.arange(0, BLOCK_M)  # [M]
    i_t = i_m // GROUP
    i_head = i_head_kv * GROUP + i_m % GROUP
    head = i_head.to(tl.int64)
    token = flat + i_t  # [M]
    own_q = i_t + shift
    return key_step(
        dk, dv, b_k, b_v, i_t < slot_end, row * stride_q_b + (start_q + i_t) * stride_q_t + head * stride_q_h,
        token * stride_g_t + head * stride_g_h, head * total + token, own_q, i_head, i_n[:, None], i_n, own_q,
        q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr,
        scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
        DENSE, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, BOUNDED, SWAPPED,
    )  # fmt: skip


@triton.jit
def _query_part(
    i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, base_ptr, delta_ptr, dq_ptr,
    bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_pk_n, stride_pk_t, stride_pk_h, stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
    scale, softcap, window, reach, total, q_len, k_len, prefix_len,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of packed queries, over its prefix and its own keys."""
    flat, num_queries, start_q, start_k, num_keys, shift = row_span(i_row, bounds_ptr, ends_ptr, q_len, k_len, DENSE)
    if i_tile * BLOCK_M < num_queries * GROUP:
        o_prompt, o_token, num_prefix = prefix_span(i_row, bounds_ptr, prompts_ptr, lengths_ptr, prefix_len, PREFIX)
        i_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        i_t = i_m // GROUP
        i_head = i_head_kv * GROUP + i_m % GROUP
        head = i_head.to(tl.int64)
        own_q = i_t + shift
        m_stored = i_t < num_queries
        i_d = tl.arange(0, BLOCK_D)
        i_dv = tl.arange(0, BLOCK_DV)
        m_d = i_d < DIM
        m_dv = i_dv < DIM_V
        row = i_row.to(tl.int64)
        head_kv = i_head_kv.to(tl.int64)
        token = flat + i_t  # [M]
        base = tl.load(base_ptr + head * total + token, mask=m_stored, other=float("inf"))  # [M]
        m_q = base < float("inf")
        delta = tl.load(delta_ptr + head * total + token, mask=m_q, other=0.0)  # [M]
        o_q = row * stride_q_b + (start_q + i_t) * stride_q_t + head * stride_q_h
        o_grad = token * stride_g_t + head * stride_g_h
        b_q = tl.load(q_ptr + o_q[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)  # [M, D]
        b_grad = tl.load(grad_ptr + o_grad[:, None] + i_dv[None, :], mask=m_q[:, None] & m_dv[None, :], other=0.0)

        p_k = k_ptr + row * stride_k_b + start_k * stride_k_t + head_kv * stride_k_h
        p_v = v_ptr + row * stride_v_b + start_k * stride_v_t + head_kv * stride_v_h
        p_pk = prefix_k_ptr + o_prompt * stride_pk_n + o_token * stride_pk_t + head_kv * stride_pk_h
        p_pv = prefix_v_ptr + o_prompt * stride_pv_n + o_token * stride_pv_t + head_kv * stride_pv_h
        last_t = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
        whole_prefix, whole, masked_prefix, masked, prefix_begin, own_begin = key_blocks(
            i_tile * BLOCK_M // GROUP, last_t, shift, num_keys, num_prefix, window,
            BLOCK_N, CAUSAL, WINDOW, WINDOW_ON_PREFIX,
        )  # fmt: skip
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i_block in range(whole):
            is_prefix = i_block < whole_prefix
            b_k, b_v, own_k, m_n = load_keys(
                i_block - tl.where(is_prefix, 0, whole_prefix), is_prefix,
                p_k, p_v, p_pk, p_pv, stride_k_t, stride_v_t, stride_pk_t, stride_pv_t, num_keys, num_prefix,
                i_d, i_dv, m_d, m_dv, BLOCK_N, False,
            )  # fmt: skip
            dq = _query_block(
                dq, b_q, b_grad, b_k, b_v, base, delta, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
                scale, softcap, window, reach, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, False,
            )  # fmt: skip
        for i_block in range(masked):
            is_prefix = i_block < masked_prefix
            b_k, b_v, own_k, m_n = load_keys(
                tl.where(is_prefix, prefix_begin + i_block, own_begin + i_block - masked_prefix), is_prefix,
                p_k, p_v, p_pk, p_pv, stride_k_t, stride_v_t, stride_pk_t, stride_pv_t, num_keys, num_prefix,
                i_d, i_dv, m_d, m_dv, BLOCK_N, True,
            )  # fmt: skip
            dq = _query_block(
                dq, b_q, b_grad, b_k, b_v, base, delta, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
                scale, softcap, window, reach, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, True,
            )  # fmt: skip
        o_dq = (token * (HEADS_KV * GROUP) + head) * DIM  # [M]
        tl.store(dq_ptr + o_dq[:, None] + i_d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty),
                 mask=m_stored[:, None] & m_d[None, :])  # fmt: skip


@triton.jit
def _query_block(
    dq, b_q, b_grad, b_k, b_v, base, delta, own_q, own_k, m_n, i_head, slopes_ptr, bias_ptr,
    scale, softcap, window, reach,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys' part of the gradient of one tile of queries, dq [M, D]."""
    qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, D] @ [D, N]
    dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")  # [M, DV] @ [DV, N]
    scores, slope = bend(
        qk, own_q[:, None], own_k[None, :], i_head[:, None], slopes_ptr, bias_ptr, scale, softcap, reach, SOFTCAP
    )
    p = tl.exp2(scores - base[:, None])  # [M, N]
    if MASKED:
        seen = visible(own_q[:, None], own_k[None, :], m_n[None, :], window, CAUSAL, WINDOW, WINDOW_ON_PREFIX)
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta[:, None]) * slope  # [M, N]
    return tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision="ieee")  # [M, N] @ [N, D]
