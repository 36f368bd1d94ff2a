"""The backward kernels: preparation, one launch for every gradient, and the fixed-order sum of a prefix's partial ones.

`backward_kernel` is three parts in one grid, so that they run side by side. The prefix part streams over all queries
that read a prefix, whichever rows they are in: the batch disappears. It is spread over a fixed number of programs, each
of which finds its share of the work from lengths on the device, so the host never waits to learn them. Where a prefix is
itself a row of the batch, the same program adds the gradient that comes from within the row, and the key part leaves
that row out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_attention.device import (
    LOG2E,
    PREFIX_APART,
    PREFIX_IN_ROWS,
    bend,
    prefix_span,
    row_span,
    visible,
)

__all__ = ["backward_kernel", "prepare_kernel", "reduce_kernel"]


@triton.jit
def prepare_kernel(
    grad_ptr, out_ptr, lse_ptr, delta_ptr, bounds_ptr, prompts_ptr, order_ptr, offsets_ptr, place_ptr,
    stride_g_t, stride_g_h, total, rows, groups, q_len, num_tiles,
    HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    DENSE: tl.constexpr, ORDERED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """What the gradients need first; grid (num_tiles + rows + groups + 1).

    delta [H, total], the sum of grad * out of each query, 0 for padding. With ORDERED: order [total], the tokens sorted
    by what they read, and offsets [groups + 1], where the readers of each begin. With PLACED: place [total], each
    token's slot in its row.
    """
    i_program = tl.program_id(0)
    if i_program < num_tiles:
        i_pair = i_program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        i_dv = tl.arange(0, BLOCK_DV)
        i_token, i_head = i_pair // HEADS, i_pair % HEADS
        m_pair = i_token < total
        o_lse = i_head * total + i_token  # [M]
        m_row = m_pair & (tl.load(lse_ptr + o_lse, mask=m_pair, other=0.0) > float("-inf"))
        m = m_row[:, None] & (i_dv < DIM_V)[None, :]
        o_grad = i_token * stride_g_t + i_head * stride_g_h  # [M]
        b_grad = tl.load(grad_ptr + o_grad[:, None] + i_dv[None, :], mask=m, other=0.0).to(tl.float32)  # [M, DV]
        b_out = tl.load(out_ptr + i_pair[:, None] * DIM_V + i_dv[None, :], mask=m, other=0.0).to(tl.float32)  # [M, DV]
        tl.store(delta_ptr + o_lse, tl.sum(b_grad * b_out, 1), mask=m_pair)
    elif i_program < num_tiles + rows:
        i_row = i_program - num_tiles
        if DENSE:
            start = i_row.to(tl.int64) * q_len
            length = q_len
        else:
            start = tl.load(bounds_ptr + i_row).to(tl.int64)
            length = (tl.load(bounds_ptr + i_row + 1).to(tl.int64) - start).to(tl.int32)
        to = start * 0
        group = i_row * 0
        if ORDERED:
            group = tl.load(prompts_ptr + i_row).to(tl.int32)
            to = _readers_before(group, i_row, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R, DENSE)
        for i_first in range(0, length, BLOCK_R):
            i_t = i_first + tl.arange(0, BLOCK_R)  # [R]
            if PLACED:
                tl.store(place_ptr + start + i_t, i_t, mask=i_t < length)
            if ORDERED:
                tl.store(order_ptr + to + i_t, start + i_t, mask=i_t < tl.where(group >= 0, length, 0))
    elif ORDERED:
        i_group = i_program - num_tiles - rows
        before = _readers_before(i_group, 0, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R, DENSE)
        tl.store(offsets_ptr + i_group, before)


@triton.jit
def _readers_before(
    group, i_row, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """Tokens of rows that read something before `group`, or `group` itself and stand before row `i_row`."""
    count = tl.zeros([BLOCK_R], tl.int64)
    for i_first in range(0, rows, BLOCK_R):
        i_other = i_first + tl.arange(0, BLOCK_R)  # [R]
        m_other = i_other < rows
        other = tl.load(prompts_ptr + i_other, mask=m_other, other=-1).to(tl.int32)  # [R]
        if DENSE:
            lengths = tl.zeros([BLOCK_R], tl.int64) + q_len
        else:
            lengths = tl.load(bounds_ptr + i_other + 1, mask=m_other, other=0).to(tl.int64)
            lengths -= tl.load(bounds_ptr + i_other, mask=m_other, other=0).to(tl.int64)
        earlier = (other >= 0) & ((other < group) | ((other == group) & (i_other < i_row)))
        count += tl.where(earlier & m_other, lengths, 0)
    return tl.sum(count, 0)


@triton.jit
def _prefix_blocks(
    bounds_ptr, offsets_ptr, rows, prompts, prefix_len,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """How many blocks of BLOCK keys all prefixes together have."""
    if PREFIX == PREFIX_APART:
        blocks = prompts * tl.cdiv(prefix_len, BLOCK)
    else:
        blocks = rows * 0
        for i_first in range(0, rows, BLOCK_R):
            blocks += tl.sum(_blocks_of_rows(i_first, bounds_ptr, offsets_ptr, rows, BLOCK, BLOCK_R), 0)
    return blocks


@triton.jit
def _blocks_of_rows(i_first, bounds_ptr, offsets_ptr, rows, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Blocks of each of the rows from `i_first` on that others read, 0 for rows that none reads; int32 [R]."""
    i_row = i_first + tl.arange(0, BLOCK_R)  # [R]
    m_row = i_row < rows
    length = tl.load(bounds_ptr + i_row + 1, mask=m_row, other=0).to(tl.int64)
    length -= tl.load(bounds_ptr + i_row, mask=m_row, other=0).to(tl.int64)
    readers = tl.load(offsets_ptr + i_row + 1, mask=m_row, other=0) - tl.load(offsets_ptr + i_row, mask=m_row, other=0)
    return tl.where(readers > 0, tl.cdiv(length, BLOCK), 0).to(tl.int32)


@triton.jit
def _find_block(
    i_block, bounds_ptr, offsets_ptr, rows, prefix_len,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """The prefix (a prompt, or a row) that block `i_block` of all belongs to, and its number within that prefix."""
    if PREFIX == PREFIX_APART:
        per_prompt = tl.cdiv(prefix_len, BLOCK)
        group = i_block // per_prompt
        within = i_block % per_prompt
    else:
        group = i_block * 0
        within = i_block * 0
        seen = i_block * 0
        for i_first in range(0, rows, BLOCK_R):
            blocks = _blocks_of_rows(i_first, bounds_ptr, offsets_ptr, rows, BLOCK, BLOCK_R)  # [R]
            ends = seen + tl.cumsum(blocks, 0)  # [R]
            here = (ends > i_block) & (ends - blocks <= i_block)  # at most one
            group += tl.sum(tl.where(here, i_first + tl.arange(0, BLOCK_R), 0), 0)
            within += tl.sum(tl.where(here, i_block - ends + blocks, 0), 0)
            seen += tl.sum(blocks, 0)
    return group, within


@triton.jit
def _splits(blocks, programs, HEADS_KV: tl.constexpr):
    """Into how many parts the queries that read one block are cut, so that `programs` have work."""
    return tl.maximum(programs // tl.maximum(blocks * HEADS_KV, 1), 1)


@triton.jit
def _key_block_step(
    dk, dv, b_k, b_v, m_q, o_q, o_grad, o_lse, own_q, i_head, own_k, m_n,
    q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr, scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries' part of the gradient of one block of keys and values, scores transposed: [N, M]."""
    lse = tl.load(lse_ptr + o_lse, mask=m_q, other=float("-inf"))  # [M]
    m_q = lse > float("-inf")  # padding has seen nothing, and whatever lies there is not touched
    lse = tl.where(m_q, lse * LOG2E, float("inf"))
    delta = tl.load(delta_ptr + o_lse, mask=m_q, other=0.0)  # [M]
    b_q = tl.load(q_ptr + o_q[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)  # [M, D]
    b_grad = tl.load(grad_ptr + o_grad[:, None] + i_dv[None, :], mask=m_q[:, None] & m_dv[None, :], other=0.0)  # [M,DV]
    qk = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, D] @ [D, M]
    scores, slope = bend(
        qk, own_q[None, :], own_k[:, None], i_head[None, :], slopes_ptr, bias_ptr, scale, softcap, reach, SOFTCAP
    )
    p = tl.exp2(scores - lse[None, :])  # [N, M]
    if MASKED:
        seen = visible(own_q[None, :], own_k[:, None], m_n[:, None], window, CAUSAL, WINDOW, WINDOW_ON_PREFIX)
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(b_grad.dtype), b_grad, dv, input_precision=PRECISION)  # [N, M] @ [M, DV]
    dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [N, DV] @ [DV, M]
    ds = p * (dp - delta[None, :]) * slope  # [N, M]
    dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION)  # [N, M] @ [M, D]
    return dk, dv


@triton.jit
def _key_block_of_row(
    dk, dv, b_k, b_v, i_n, i_row, i_head_kv, flat, num_queries, start_q, num_keys, shift, total,
    q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr, scale, softcap, window, reach,
    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h, i_d, i_dv, m_d, m_dv, first_key,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of keys `i_n` of a row that comes from the row's own queries."""
    slot_first = tl.maximum(-shift, 0)  # the first slot that holds a token
    slot_end = tl.minimum(num_queries, num_keys - shift)
    if CAUSAL:
        slot_first = tl.maximum(slot_first, first_key - shift)
    if WINDOW:
        slot_first = tl.maximum(slot_first, first_key - window + 1 - shift)
        slot_end = tl.minimum(slot_end, first_key + BLOCK_N + window - shift)
    for i_first in range(slot_first * GROUP // BLOCK_M * BLOCK_M, slot_end * GROUP, BLOCK_M):
        i_m = i_first + tl.arange(0, BLOCK_M)  # [M]
        i_t = i_m // GROUP
        i_head = i_head_kv * GROUP + i_m % GROUP
        token = flat + i_t  # [M]
        o_q = i_row.to(tl.int64) * stride_q_b + (start_q + i_t) * stride_q_t + i_head.to(tl.int64) * stride_q_h
        o_grad = token * stride_g_t + i_head.to(tl.int64) * stride_g_h
        dk, dv = _key_block_step(
            dk, dv, b_k, b_v, i_t < slot_end, o_q, o_grad, i_head.to(tl.int64) * total + token, i_t + shift, i_head,
            i_n, (i_n >= 0) & (i_n < num_keys), q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr,
            scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
            CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, True, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
    bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_pk_n, stride_pk_t, stride_pk_h, stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
    prefix_programs, key_tiles, query_tiles,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, QUERY_M: tl.constexpr, QUERY_N: tl.constexpr,
    KEY_M: tl.constexpr, KEY_N: tl.constexpr, PREFIX_M: tl.constexpr, PREFIX_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Every gradient; grid (prefix_programs + rows * H_kv * (key_tiles + query_tiles) if ROWS)."""
    i_program = tl.program_id(0)
    if i_program < prefix_programs:
        _prefix_part(
            i_program, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, lse_ptr, delta_ptr,
            dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
            bounds_ptr, ends_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
            stride_q_b, stride_q_t, stride_q_h, stride_pk_n, stride_pk_t, stride_pk_h,
            stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h, stride_dk_t, stride_dk_h,
            stride_dv_t, stride_dv_h, scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
            prefix_programs, HEADS_KV, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, PREFIX_M, PREFIX_N, BLOCK_R,
            DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, PRECISION, ATOMIC,
        )  # fmt: skip
    elif ROWS:
        i_rest = i_program - prefix_programs
        per_row = key_tiles + query_tiles
        i_tile = i_rest % per_row
        i_head_kv = (i_rest // per_row) % HEADS_KV
        i_row = i_rest // (per_row * HEADS_KV)
        if i_tile < key_tiles:
            _key_part(
                i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
                bounds_ptr, ends_ptr, offsets_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_g_t, stride_g_h,
                stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
                scale, softcap, window, reach, total, q_len, k_len,
                GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, KEY_M, KEY_N,
                DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, PRECISION,
            )  # fmt: skip
        else:
            _query_part(
                i_row, i_head_kv, i_tile - key_tiles, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
                grad_ptr, lse_ptr, delta_ptr, dq_ptr,
                bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_pk_n, stride_pk_t, stride_pk_h,
                stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
                scale, softcap, window, reach, total, q_len, k_len, prefix_len,
                HEADS_KV, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, QUERY_M, QUERY_N,
                DENSE, PREFIX, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, PRECISION,
            )  # fmt: skip


@triton.jit
def _prefix_part(
    i_program, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
    bounds_ptr, ends_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_pk_n, stride_pk_t, stride_pk_h,
    stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h, stride_dk_t, stride_dk_h,
    stride_dv_t, stride_dv_h, scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
    programs, HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Gradients of prefixes: items are (block, key head, split), dealt out to the programs in turn."""
    i_d = tl.arange(0, BLOCK_D)
    i_dv = tl.arange(0, BLOCK_DV)
    m_d = i_d < DIM
    m_dv = i_dv < DIM_V
    blocks = _prefix_blocks(bounds_ptr, offsets_ptr, rows, prompts, prefix_len, BLOCK_N, BLOCK_R, PREFIX)
    splits = _splits(blocks, programs, HEADS_KV)
    for i_item in range(i_program, blocks * HEADS_KV * splits, programs):
        i_item = tl.cast(i_item, tl.int32)
        i_split = i_item % splits
        i_head_kv = (i_item // splits) % HEADS_KV
        i_block = i_item // (splits * HEADS_KV)
        group, within = _find_block(i_block, bounds_ptr, offsets_ptr, rows, prefix_len, BLOCK_N, BLOCK_R, PREFIX)
        head_kv = i_head_kv.to(tl.int64)
        if PREFIX == PREFIX_IN_ROWS:
            source = tl.load(bounds_ptr + group).to(tl.int64)
            num_prefix = (tl.load(bounds_ptr + group + 1).to(tl.int64) - source).to(tl.int32)
            o_k = source * stride_pk_t
            o_v = source * stride_pv_t
            size = num_prefix
        else:
            source = group.to(tl.int64)
            num_prefix = prefix_len + group * 0
            if lengths_ptr is not None:
                num_prefix = tl.load(lengths_ptr + group).to(tl.int32)
            o_k = source * stride_pk_n
            o_v = source * stride_pv_n
            size = prefix_len
        i_n = within * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
        m_n = i_n < num_prefix
        p_k = prefix_k_ptr + o_k + head_kv * stride_pk_h + i_n.to(tl.int64)[:, None] * stride_pk_t
        p_v = prefix_v_ptr + o_v + head_kv * stride_pv_h + i_n.to(tl.int64)[:, None] * stride_pv_t
        b_k = tl.load(p_k + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)  # [N, D]
        b_v = tl.load(p_v + i_dv[None, :], mask=m_n[:, None] & m_dv[None, :], other=0.0)  # [N, DV]
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

        first_reader = source * 0
        readers = total + source * 0
        if order_ptr is not None:
            first_reader = tl.load(offsets_ptr + group)
            readers = tl.load(offsets_ptr + group + 1) - first_reader
        share = tl.cdiv(tl.cdiv(readers * GROUP, BLOCK_M), splits) * BLOCK_M
        end = tl.minimum((i_split + 1) * share, readers * GROUP)
        end = tl.where(within * BLOCK_N < num_prefix, end, 0)  # beyond a shorter prompt there is nothing to add
        for i_first in range(i_split * share, end, BLOCK_M):
            i_m = i_first + tl.arange(0, BLOCK_M)  # [M]
            m_q = i_m < end
            i_head = i_head_kv * GROUP + (i_m % GROUP).to(tl.int32)  # [M]
            token = first_reader + i_m // GROUP  # [M]
            if order_ptr is not None:
                token = tl.load(order_ptr + token, mask=m_q, other=0)
            own_q = i_head * 0
            if place_ptr is not None:
                own_q = tl.load(place_ptr + token, mask=m_q, other=0)
            if DENSE:
                i_row = token // q_len
                o_q = i_row * stride_q_b + (token % q_len) * stride_q_t
                if place_ptr is not None:
                    own_q += k_len - q_len
                    if bounds_ptr is not None:
                        own_q -= tl.load(bounds_ptr + i_row, mask=m_q, other=0).to(tl.int32)
            else:
                o_q = token * stride_q_t
            dk, dv = _key_block_step(
                dk, dv, b_k, b_v, m_q, o_q + i_head.to(tl.int64) * stride_q_h,
                token * stride_g_t + i_head.to(tl.int64) * stride_g_h, i_head.to(tl.int64) * total + token,
                own_q, i_head, i_n - num_prefix, m_n,
                q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr,
                scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
                CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, WINDOW, PRECISION,
            )  # fmt: skip
        if PREFIX == PREFIX_IN_ROWS:
            if i_split == 0:
                # A row that is read reads nothing itself, so its own positions begin at 0.
                dk, dv = _key_block_of_row(
                    dk, dv, b_k, b_v, i_n, group, i_head_kv, source, num_prefix, source, num_prefix, 0, total,
                    q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr, scale, softcap, window, reach,
                    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h, i_d, i_dv, m_d, m_dv,
                    within * BLOCK_N, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, PRECISION,
                )  # fmt: skip
        dk = tl.where(m_n[:, None], dk * scale, 0.0)  # beyond a shorter prompt: zeros
        dv = tl.where(m_n[:, None], dv, 0.0)
        if splits == 1:
            _store_prefix(
                dk, dv, source, head_kv, i_n, size, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, i_d, i_dv, m_d, m_dv,
                stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, HEADS_KV, DIM, DIM_V, PREFIX,
            )  # fmt: skip
        else:
            i_slot = (i_item // splits if ATOMIC else i_item).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
            p_dk = part_k_ptr + i_slot[:, None] * DIM + i_d[None, :]
            p_dv = part_v_ptr + i_slot[:, None] * DIM_V + i_dv[None, :]
            m_dk = (i_n < size)[:, None] & m_d[None, :]
            m_dvs = (i_n < size)[:, None] & m_dv[None, :]
            if ATOMIC:
                tl.atomic_add(p_dk, dk, mask=m_dk, sem="relaxed")
                tl.atomic_add(p_dv, dv, mask=m_dvs, sem="relaxed")
            else:
                tl.store(p_dk, dk, mask=m_dk)
                tl.store(p_dv, dv, mask=m_dvs)


@triton.jit
def _store_prefix(
    dk, dv, source, head_kv, i_n, size, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, i_d, i_dv, m_d, m_dv,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    HEADS_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Write the finished gradient of keys `i_n` [N] of one prefix: to its row, or to [N, P, H_kv, D], contiguous."""
    m_n = i_n < size
    if PREFIX == PREFIX_IN_ROWS:
        p_dk = dk_ptr + (source + i_n) * stride_dk_t + head_kv * stride_dk_h
        p_dv = dv_ptr + (source + i_n) * stride_dv_t + head_kv * stride_dv_h
    else:
        i_key = (source * size + i_n) * HEADS_KV + head_kv  # [N]
        p_dk = dpk_ptr + i_key * DIM
        p_dv = dpv_ptr + i_key * DIM_V
    tl.store(p_dk[:, None] + i_d[None, :], dk.to(p_dk.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    tl.store(p_dv[:, None] + i_dv[None, :], dv.to(p_dv.dtype.element_ty), mask=m_n[:, None] & m_dv[None, :])


@triton.jit
def reduce_kernel(
    part_k_ptr, part_v_ptr, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, bounds_ptr, offsets_ptr,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, rows, prompts, prefix_len, programs,
    HEADS_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE_N: tl.constexpr, BLOCK_R: tl.constexpr, PREFIX: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients of each prefix block in the order of the splits; grid (programs * slices)."""
    slices: tl.constexpr = BLOCK_N // SLICE_N
    i_program = tl.program_id(0) // slices
    i_slice = tl.program_id(0) % slices
    i_d = tl.arange(0, BLOCK_D)
    i_dv = tl.arange(0, BLOCK_DV)
    m_d = i_d < DIM
    m_dv = i_dv < DIM_V
    blocks = _prefix_blocks(bounds_ptr, offsets_ptr, rows, prompts, prefix_len, BLOCK_N, BLOCK_R, PREFIX)
    splits = _splits(blocks, programs, HEADS_KV)
    if splits == 1:
        return
    if ATOMIC:
        splits = 1
    for i_item in range(i_program, blocks * HEADS_KV, programs):
        i_item = tl.cast(i_item, tl.int32)
        head_kv = (i_item % HEADS_KV).to(tl.int64)
        group, within = _find_block(
            i_item // HEADS_KV, bounds_ptr, offsets_ptr, rows, prefix_len, BLOCK_N, BLOCK_R, PREFIX
        )
        source = group.to(tl.int64)
        size = prefix_len
        if PREFIX == PREFIX_IN_ROWS:
            source = tl.load(bounds_ptr + group).to(tl.int64)
            size = (tl.load(bounds_ptr + group + 1).to(tl.int64) - source).to(tl.int32)
        i_in_block = i_slice * SLICE_N + tl.arange(0, SLICE_N)  # [S]
        i_n = within * BLOCK_N + i_in_block  # [S]
        m_n = i_n < size
        dk = tl.zeros([SLICE_N, BLOCK_D], tl.float32)
        dv = tl.zeros([SLICE_N, BLOCK_DV], tl.float32)
        for i_split in range(0, splits):
            i_slot = (i_item.to(tl.int64) * splits + i_split) * BLOCK_N + i_in_block  # [S]
            p_k = part_k_ptr + i_slot[:, None] * DIM + i_d[None, :]
            p_v = part_v_ptr + i_slot[:, None] * DIM_V + i_dv[None, :]
            dk += tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [S, D]
            dv += tl.load(p_v, mask=m_n[:, None] & m_dv[None, :], other=0.0)  # [S, DV]
        _store_prefix(
            dk, dv, source, head_kv, i_n, size, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, i_d, i_dv, m_d, m_dv,
            stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, HEADS_KV, DIM, DIM_V, PREFIX,
        )  # fmt: skip


@triton.jit
def _key_part(
    i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    bounds_ptr, ends_ptr, offsets_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_g_t, stride_g_h, stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    scale, softcap, window, reach, total, q_len, k_len,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
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
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        dk, dv = _key_block_of_row(
            dk, dv, b_k, b_v, i_n, i_row, i_head_kv, flat, num_queries, start_q, num_keys, shift, total,
            q_ptr, grad_ptr, lse_ptr, delta_ptr, slopes_ptr, bias_ptr, scale, softcap, window, reach,
            stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h, i_d, i_dv, m_d, m_dv,
            i_tile * BLOCK_N - first_slot, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, PRECISION,
        )  # fmt: skip
        m_stored = i_slot < slots
        dk = tl.where(m_n[:, None], dk * scale, 0.0)
        dv = tl.where(m_n[:, None], dv, 0.0)
        p_dk = dk_ptr + row * stride_dk_b + head_kv * stride_dk_h + i_key[:, None] * stride_dk_t
        p_dv = dv_ptr + row * stride_dv_b + head_kv * stride_dv_h + i_key[:, None] * stride_dv_t
        tl.store(p_dk + i_d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=m_stored[:, None] & m_d[None, :])
        tl.store(p_dv + i_dv[None, :], dv.to(dv_ptr.dtype.element_ty), mask=m_stored[:, None] & m_dv[None, :])


@triton.jit
def _query_part(
    i_row, i_head_kv, i_tile, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    bounds_ptr, ends_ptr, prompts_ptr, lengths_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_pk_n, stride_pk_t, stride_pk_h, stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h,
    scale, softcap, window, reach, total, q_len, k_len, prefix_len,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
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
        lse = tl.load(lse_ptr + head * total + token, mask=m_stored, other=float("-inf"))  # [M]
        m_q = lse > float("-inf")
        lse = tl.where(m_q, lse * LOG2E, float("inf"))
        delta = tl.load(delta_ptr + head * total + token, mask=m_q, other=0.0)  # [M]
        o_q = row * stride_q_b + (start_q + i_t) * stride_q_t + head * stride_q_h
        o_grad = token * stride_g_t + head * stride_g_h
        b_q = tl.load(q_ptr + o_q[:, None] + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)  # [M, D]
        b_grad = tl.load(grad_ptr + o_grad[:, None] + i_dv[None, :], mask=m_q[:, None] & m_dv[None, :], other=0.0)

        p_k = k_ptr + row * stride_k_b + start_k * stride_k_t + head_kv * stride_k_h
        p_v = v_ptr + row * stride_v_b + start_k * stride_v_t + head_kv * stride_v_h
        p_pk = prefix_k_ptr + o_prompt * stride_pk_n + o_token * stride_pk_t + head_kv * stride_pk_h
        p_pv = prefix_v_ptr + o_prompt * stride_pv_n + o_token * stride_pv_t + head_kv * stride_pv_h
        own_first = tl.maximum(i_tile * BLOCK_M // GROUP + shift, 0)
        own_last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1) + shift
        own_end = tl.minimum(own_last + 1, num_keys) if CAUSAL else num_keys
        own_begin = 0
        prefix_begin = 0
        if WINDOW:
            own_begin = tl.maximum(own_first - window + 1, 0) // BLOCK_N
            own_end = tl.minimum(own_end, own_last + window)
            if WINDOW_ON_PREFIX:
                prefix_begin = tl.maximum(num_prefix + own_first - window + 1, 0) // BLOCK_N
        prefix_blocks = tl.maximum(tl.cdiv(num_prefix, BLOCK_N) - prefix_begin, 0)
        own_blocks = tl.maximum(tl.cdiv(own_end, BLOCK_N) - own_begin, 0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i_block in range(0, prefix_blocks + own_blocks):
            is_prefix = i_block < prefix_blocks
            i_n = tl.where(is_prefix, prefix_begin + i_block, own_begin + i_block - prefix_blocks) * BLOCK_N
            i_n = i_n + tl.arange(0, BLOCK_N)  # [N]
            base_k = tl.where(is_prefix, p_pk, p_k)
            base_v = tl.where(is_prefix, p_pv, p_v)
            o_k = i_n.to(tl.int64) * tl.where(is_prefix, stride_pk_t, stride_k_t)  # [N]
            o_v = i_n.to(tl.int64) * tl.where(is_prefix, stride_pv_t, stride_v_t)  # [N]
            m_n = i_n < tl.where(is_prefix, num_prefix, num_keys)
            b_k = tl.load(base_k + o_k[:, None] + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)  # [N, D]
            b_v = tl.load(base_v + o_v[:, None] + i_dv[None, :], mask=m_n[:, None] & m_dv[None, :], other=0.0)  # [N, DV]
            qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, D] @ [D, N]
            own_k = i_n - tl.where(is_prefix, num_prefix, 0)
            scores, slope = bend(
                qk, own_q[:, None], own_k[None, :], i_head[:, None], slopes_ptr, bias_ptr,
                scale, softcap, reach, SOFTCAP,
            )  # fmt: skip
            seen = visible(own_q[:, None], own_k[None, :], m_n[None, :], window, CAUSAL, WINDOW, WINDOW_ON_PREFIX)
            p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)  # [M, N]
            dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [M, DV] @ [DV, N]
            ds = p * (dp - delta[:, None]) * slope  # [M, N]
            dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=PRECISION)  # [M, N] @ [N, D]
        o_dq = (token * (HEADS_KV * GROUP) + head) * DIM  # [M]
        tl.store(dq_ptr + o_dq[:, None] + i_d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty),
                 mask=m_stored[:, None] & m_d[None, :])  # fmt: skip
