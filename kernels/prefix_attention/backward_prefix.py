"""The prefix part of the backward kernel, what it needs prepared, and the fixed-order sum of its partial results.

It streams over all queries that read a prefix, whichever rows they are in: the batch disappears. The work is cut into
blocks of keys, key heads and splits of the queries from lengths on the device, so that the host never waits to learn
them. Where a prefix is itself a row of the batch, the row's own queries come first in the stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptengine.kernels.prefix_attention.device import LOG2E, PREFIX_APART, PREFIX_IN_ROWS
from ptengine.kernels.prefix_attention.key_step import accumulators, key_step

__all__ = ["prefix_part", "prepare_kernel", "reduce_kernel"]


@triton.jit(do_not_specialize=["total", "rows", "groups", "q_len", "num_tiles"])
def prepare_kernel(
    grad_ptr, out_ptr, lse_ptr, base_ptr, delta_ptr, bounds_ptr, prompts_ptr, order_ptr, offsets_ptr, place_ptr,
    stride_g_t, stride_g_h, total, rows, groups, q_len, num_tiles,
    HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    DENSE: tl.constexpr, ORDERED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """What the gradients need first; grid (num_tiles + rows + groups + 1).

    base [H, total], each query's log-sum-exp in units of log2, +inf where it saw nothing, so that its weights are 0;
    delta [H, total], the sum of its grad * out, 0 for padding. With ORDERED: order [total], the tokens sorted by what
    they read, those that read nothing first, and offsets [groups + 1], where the readers of each begin. With PLACED:
    place [total], each token's slot in its row.
    """
    i_program = tl.program_id(0)
    if i_program < num_tiles:
        i_pair = i_program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        i_dv = tl.arange(0, BLOCK_DV)
        i_token, i_head = i_pair // HEADS, i_pair % HEADS
        m_pair = i_token < total
        o_lse = i_head * total + i_token  # [M]
        lse = tl.load(lse_ptr + o_lse, mask=m_pair, other=float("-inf"))  # [M]
        m_row = lse > float("-inf")
        tl.store(base_ptr + o_lse, tl.where(m_row, lse * LOG2E, float("inf")), mask=m_pair)
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
        to = i_row * 0
        group = i_row * 0
        if ORDERED:
            group = tl.load(prompts_ptr + i_row).to(tl.int32)
            to = _readers_before(group, i_row, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R, DENSE)
        for i_first in range(0, length, BLOCK_R):
            i_t = i_first + tl.arange(0, BLOCK_R)  # [R]
            if PLACED:
                tl.store(place_ptr + start + i_t, i_t, mask=i_t < length)
            if ORDERED:
                tl.store(order_ptr + to + i_t, (start + i_t).to(tl.int32), mask=i_t < length)
    elif ORDERED:
        i_group = i_program - num_tiles - rows
        before = _readers_before(i_group, 0, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R, DENSE)
        tl.store(offsets_ptr + i_group, before)


@triton.jit
def _readers_before(
    group, i_row, bounds_ptr, prompts_ptr, rows, q_len, BLOCK_R: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """Tokens of rows that read what comes before `group`, or `group` itself and stand before row `i_row`."""
    count = tl.zeros([BLOCK_R], tl.int32)
    for i_first in range(0, rows, BLOCK_R):
        i_other = i_first + tl.arange(0, BLOCK_R)  # [R]
        m_other = i_other < rows
        other = tl.load(prompts_ptr + i_other, mask=m_other, other=-1).to(tl.int32)  # [R]
        lengths = tl.zeros([BLOCK_R], tl.int32) + q_len if DENSE else _differences(bounds_ptr, i_other, m_other)
        earlier = (other < group) | ((other == group) & (i_other < i_row))
        count += tl.where(earlier & m_other, lengths, 0)
    return tl.sum(count, 0)


@triton.jit
def _differences(sums_ptr, i, m):
    """From one running sum to the next, int32; 0 where not `m`."""
    return (tl.load(sums_ptr + i + 1, mask=m, other=0) - tl.load(sums_ptr + i, mask=m, other=0)).to(tl.int32)


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
    length = _differences(bounds_ptr, i_row, m_row)
    readers = _differences(offsets_ptr, i_row, m_row)
    return tl.where(readers > 0, tl.cdiv(length, BLOCK), 0)


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
def _splits(blocks, wanted, HEADS_KV: tl.constexpr):
    """Into how many parts the queries that read one block are cut, so that up to `wanted` programs have work."""
    return tl.maximum(wanted // tl.maximum(blocks * HEADS_KV, 1), 1)


@triton.jit
def prefix_part(
    i_program, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, grad_ptr, base_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, part_k_ptr, part_v_ptr,
    bounds_ptr, lengths_ptr, order_ptr, offsets_ptr, place_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_pk_n, stride_pk_t, stride_pk_h,
    stride_pv_n, stride_pv_t, stride_pv_h, stride_g_t, stride_g_h, stride_dk_t, stride_dk_h,
    stride_dv_t, stride_dv_h, scale, softcap, window, reach, total, rows, prompts, q_len, k_len, prefix_len,
    wanted, HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, ATOMIC: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of one prefix for one key head, or one split of it: over all queries that read it."""
    i_d = tl.arange(0, BLOCK_D)
    i_dv = tl.arange(0, BLOCK_DV)
    m_d = i_d < DIM
    m_dv = i_dv < DIM_V
    blocks = _prefix_blocks(bounds_ptr, offsets_ptr, rows, prompts, prefix_len, BLOCK_N, BLOCK_R, PREFIX)
    splits = _splits(blocks, wanted, HEADS_KV)
    if i_program < blocks * HEADS_KV * splits:
        i_split = i_program % splits
        i_head_kv = (i_program // splits) % HEADS_KV
        i_block = i_program // (splits * HEADS_KV)
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
        dk, dv = accumulators(BLOCK_N, BLOCK_D, BLOCK_DV, SWAPPED)

        # Queries in one stream: a row that is itself the prefix begins with its own, then come all readers.
        own = num_prefix if PREFIX == PREFIX_IN_ROWS else num_prefix * 0
        first_reader = num_prefix * 0
        readers = total + num_prefix * 0
        if order_ptr is not None:
            first_reader = tl.load(offsets_ptr + group)
            readers = tl.load(offsets_ptr + group + 1) - first_reader
        queries = (own + readers) * GROUP
        share = tl.cdiv(tl.cdiv(queries, BLOCK_M), splits) * BLOCK_M
        end = tl.minimum((i_split + 1) * share, queries)
        end = tl.where(within * BLOCK_N < num_prefix, end, 0)  # beyond a shorter prompt there is nothing to add
        begin = i_split * share
        if CAUSAL and PREFIX == PREFIX_IN_ROWS:
            # Only the prompt row's own queries are bounded; its readers see all of it.
            bounded = tl.minimum(tl.cdiv(own * GROUP, BLOCK_M) * BLOCK_M, end)
            for i_first in range(begin, bounded, BLOCK_M):
                dk, dv = _prefix_block(
                    dk, dv, b_k, b_v, i_first, end, own, first_reader, source, num_prefix, i_n, i_head_kv,
                    q_ptr, grad_ptr, base_ptr, delta_ptr, bounds_ptr, order_ptr, place_ptr, slopes_ptr, bias_ptr,
                    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
                    scale, softcap, window, reach, total, q_len, k_len, i_d, i_dv, m_d, m_dv,
                    GROUP, BLOCK_M, DENSE, PREFIX, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, True, SWAPPED,
                )  # fmt: skip
            begin = tl.maximum(begin, bounded)
        for i_first in range(begin, end, BLOCK_M):
            dk, dv = _prefix_block(
                dk, dv, b_k, b_v, i_first, end, own, first_reader, source, num_prefix, i_n, i_head_kv,
                q_ptr, grad_ptr, base_ptr, delta_ptr, bounds_ptr, order_ptr, place_ptr, slopes_ptr, bias_ptr,
                stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
                scale, softcap, window, reach, total, q_len, k_len, i_d, i_dv, m_d, m_dv,
                GROUP, BLOCK_M, DENSE, PREFIX, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, False, SWAPPED,
            )  # fmt: skip
        if SWAPPED:
            dk, dv = tl.trans(dk), tl.trans(dv)  # [N, D], [N, DV]
        dk = tl.where(m_n[:, None], dk * scale, 0.0)  # beyond a shorter prompt: zeros
        dv = tl.where(m_n[:, None], dv, 0.0)
        if splits == 1:
            _store_prefix(
                dk, dv, source, head_kv, i_n, size, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, i_d, i_dv, m_d, m_dv,
                stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, HEADS_KV, DIM, DIM_V, PREFIX,
            )  # fmt: skip
        else:
            i_part = i_program // splits if ATOMIC else i_program
            i_slot = i_part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
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
def _prefix_block(
    dk, dv, b_k, b_v, i_first, end, own, first_reader, source, num_prefix, i_n, i_head_kv,
    q_ptr, grad_ptr, base_ptr, delta_ptr, bounds_ptr, order_ptr, place_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_g_t, stride_g_h,
    scale, softcap, window, reach, total, q_len, k_len, i_d, i_dv, m_d, m_dv,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, DENSE: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_ON_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """The part of one block of the stream, packed queries from `i_first` on, in the gradient of keys `i_n`."""
    i_m = i_first + tl.arange(0, BLOCK_M)  # [M]
    m_q = i_m < end
    i_head = i_head_kv * GROUP + i_m % GROUP  # [M]
    i_query = i_m // GROUP  # [M]
    is_own = i_query < own
    token = first_reader + i_query - own  # [M]
    if order_ptr is not None:
        token = tl.load(order_ptr + token, mask=m_q & (i_query >= own), other=0)  # [M]
    own_q = i_query * 0
    if place_ptr is not None:
        own_q = tl.load(place_ptr + token, mask=m_q, other=0)  # [M]
    if DENSE:
        i_row = token // q_len
        o_q = i_row.to(tl.int64) * stride_q_b + (token % q_len).to(tl.int64) * stride_q_t
        if place_ptr is not None:
            own_q += k_len - q_len
            if bounds_ptr is not None:
                own_q -= tl.load(bounds_ptr + i_row, mask=m_q, other=0).to(tl.int32)
    else:
        if PREFIX == PREFIX_IN_ROWS:
            token = tl.where(is_own, source.to(tl.int32) + i_query, token)
            own_q = tl.where(is_own, i_query, own_q)
        o_q = token.to(tl.int64) * stride_q_t
    head = i_head.to(tl.int64)
    own_k = i_n[:, None] - tl.where(is_own, 0, num_prefix)[None, :]  # [N, M]
    return key_step(
        dk, dv, b_k, b_v, m_q, o_q + head * stride_q_h, token.to(tl.int64) * stride_g_t + head * stride_g_h,
        head * total + token, own_q, i_head, own_k, i_n, tl.where(is_own, i_query, num_prefix),
        q_ptr, grad_ptr, base_ptr, delta_ptr, slopes_ptr, bias_ptr,
        scale, softcap, window, reach, i_d, i_dv, m_d, m_dv,
        DENSE, WINDOW, WINDOW_ON_PREFIX, SOFTCAP, BOUNDED, SWAPPED,
    )  # fmt: skip


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


@triton.jit(do_not_specialize=["rows", "prompts", "prefix_len", "wanted"])
def reduce_kernel(
    part_k_ptr, part_v_ptr, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, bounds_ptr, offsets_ptr,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, rows, prompts, prefix_len, wanted,
    HEADS_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE_N: tl.constexpr, BLOCK_R: tl.constexpr, PREFIX: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients of each prefix block in the order of the splits; grid (wanted * slices)."""
    slices: tl.constexpr = BLOCK_N // SLICE_N
    i_item = tl.program_id(0) // slices  # (block, key head)
    i_slice = tl.program_id(0) % slices
    i_d = tl.arange(0, BLOCK_D)
    i_dv = tl.arange(0, BLOCK_DV)
    m_d = i_d < DIM
    m_dv = i_dv < DIM_V
    blocks = _prefix_blocks(bounds_ptr, offsets_ptr, rows, prompts, prefix_len, BLOCK_N, BLOCK_R, PREFIX)
    splits = _splits(blocks, wanted, HEADS_KV)
    if (splits > 1) & (i_item < blocks * HEADS_KV):
        if ATOMIC:
            splits = splits * 0 + 1
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
        for i_split in range(splits):
            i_slot = (i_item.to(tl.int64) * splits + i_split) * BLOCK_N + i_in_block  # [S]
            p_k = part_k_ptr + i_slot[:, None] * DIM + i_d[None, :]
            p_v = part_v_ptr + i_slot[:, None] * DIM_V + i_dv[None, :]
            dk += tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [S, D]
            dv += tl.load(p_v, mask=m_n[:, None] & m_dv[None, :], other=0.0)  # [S, DV]
        _store_prefix(
            dk, dv, source, head_kv, i_n, size, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, i_d, i_dv, m_d, m_dv,
            stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, HEADS_KV, DIM, DIM_V, PREFIX,
        )  # fmt: skip
