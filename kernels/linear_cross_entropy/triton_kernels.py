"""The two Triton kernels of linear_cross_entropy, on one tile of rows. They know pointers and strides only.

State between the chunks of the vocabulary, float32 [n, 5]: the running maximum of the logits, the sum of
exp(logit - maximum), the label's logit, the cap's slope there (1 without a cap), the sum of the logits. The label's two
start as NaN, so that a label that no chunk contains makes the loss and the gradient NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cap(x, softcap):
    """softcap * tanh(x / softcap) and its derivative by x, from exp alone: the interpreter has no libdevice."""
    u = x * (1.0 / softcap)
    e = tl.exp(-2.0 * tl.abs(u))
    inverse = 1.0 / (1.0 + e)
    ratio = (1.0 - e) * inverse
    # 1 - e cancels near 0. There the first five terms of the series are exact to float32.
    s = u * u
    near = u * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0 - s * (62.0 / 2835.0)))))
    tanh = tl.where(tl.abs(u) < 0.25, near, tl.where(u < 0.0, -ratio, ratio))
    # 1 - tanh**2 without its cancellation.
    return softcap * tanh, 4.0 * e * inverse * inverse


@triton.jit
def _raw_logits(p_logits, p_bias, stride_bias_v, o_c, m_n, m_c):
    """A block of logits with the bias; anything where m_c is false. [N, C]"""
    # No mask over columns, which would split the loads: the rows of the buffer are whole blocks.
    x = tl.load(p_logits + o_c[None, :], mask=m_n[:, None], other=0.0)  # [N, C]
    if p_bias is not None:
        x += tl.load(p_bias + o_c.to(tl.int64) * stride_bias_v, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, C]
    return x


@triton.jit(do_not_specialize=["rows"])
def chunk_kernel(
    logits_ptr,
    stride_logits_n,
    bias_ptr,
    stride_bias_v,
    labels_ptr,
    stride_labels_n,
    state_ptr,
    weights_ptr,
    stride_weights_n,
    sums_ptr,
    stride_sums_n,
    softcap,
    start,
    width,
    rows,
    D,
    FIRST: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the logits of words start .. start + width to the state, the weights of those words' rows, and the sums
    (the gradient so far, [n, D]) rescaled to the new maximum, ready for weights @ head to be added.

    bias, softcap: None for none. weights, sums: None where no gradient is needed.
    weights: [n, C], or with softcap and smoothing [2 n, C], the lower half being the cap's slopes. Both are times
    WEIGHT_SCALE, and 0 or finite beyond `width`.
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    m_n = o_n < rows
    p_logits = logits_ptr + o_n[:, None] * stride_logits_n  # [N, 1]
    p_bias = bias_ptr
    if bias_ptr is not None:
        p_bias += start.to(tl.int64) * stride_bias_v

    b_highest = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
    b_logit_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_c in range(0, width, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        b_x = _raw_logits(p_logits, p_bias, stride_bias_v, o_c, m_n, m_c)  # [N, C]
        b_highest = tl.maximum(b_highest, tl.where(m_c[None, :], b_x, float("-inf")))
        if SMOOTHED and softcap is None:  # here, where registers are free; capped logits are known below only
            b_logit_sum += tl.where(m_c[None, :], b_x, 0.0)
    b_maximum = tl.max(b_highest, axis=1)  # [N]
    if softcap is None:
        b_sum = tl.sum(b_logit_sum, axis=1)  # [N]
    else:  # the cap is monotonic
        b_maximum, _ = _cap(b_maximum, softcap)
    if not FIRST:
        b_previous = tl.load(state_ptr + o_n * 5, mask=m_n, other=0.0)  # [N]
        b_maximum = tl.maximum(b_maximum, b_previous)
    # All -inf so far (a bias that masks): exp must give 0, not NaN.
    b_pivot = tl.where(b_maximum == float("-inf"), 0.0, b_maximum)

    b_exp_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_c in range(0, width, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        b_x = _raw_logits(p_logits, p_bias, stride_bias_v, o_c, m_n, m_c)  # [N, C]
        if softcap is not None:
            b_x, b_slopes = _cap(b_x, softcap)
        b_weights = tl.where(m_c[None, :], tl.exp(b_x - b_pivot[:, None]), 0.0)
        b_exp_sum += b_weights
        if SMOOTHED and softcap is not None:
            b_logit_sum += tl.where(m_c[None, :], b_x, 0.0)
        if weights_ptr is not None:
            p_weights = weights_ptr + o_n[:, None] * stride_weights_n + o_c[None, :]  # [N, C]
            if softcap is not None:
                b_weights *= b_slopes
                if SMOOTHED:
                    b_slopes = (b_slopes * WEIGHT_SCALE).to(weights_ptr.dtype.element_ty)
                    tl.store(p_weights + rows.to(tl.int64) * stride_weights_n, b_slopes, mask=m_n[:, None])
            tl.store(p_weights, (b_weights * WEIGHT_SCALE).to(weights_ptr.dtype.element_ty), mask=m_n[:, None])

    p_state = state_ptr + o_n * 5  # [N]
    b_total = tl.sum(b_exp_sum, axis=1)  # [N]
    if softcap is not None:
        b_sum = tl.sum(b_logit_sum, axis=1)  # [N]
    b_local = tl.load(labels_ptr + o_n * stride_labels_n, mask=m_n, other=-1) - start  # [N]
    m_local = (b_local >= 0) & (b_local < width)
    b_local = tl.where(m_local, b_local, 0)
    b_picked = tl.load(logits_ptr + o_n * stride_logits_n + b_local, mask=m_local, other=0.0)  # [N]
    if bias_ptr is not None:
        b_picked += tl.load(p_bias + b_local * stride_bias_v, mask=m_local, other=0.0).to(tl.float32)  # [N]
    b_slope = tl.full([BLOCK_N], 1.0, tl.float32)
    if softcap is not None:
        b_picked, b_slope = _cap(b_picked, softcap)
    if FIRST:
        b_picked = tl.where(m_local, b_picked, float("nan"))
        b_slope = tl.where(m_local, b_slope, float("nan"))
    else:
        b_rescale = tl.exp(b_previous - b_pivot)  # [N]
        b_total += tl.load(p_state + 1, mask=m_n, other=0.0) * b_rescale
        b_sum += tl.load(p_state + 4, mask=m_n, other=0.0)
        b_picked = tl.where(m_local, b_picked, tl.load(p_state + 2, mask=m_n, other=0.0))
        b_slope = tl.where(m_local, b_slope, tl.load(p_state + 3, mask=m_n, other=0.0))
    # Every warp has read the previous maximum: the sums above are barriers.
    tl.store(p_state, b_maximum, mask=m_n)
    tl.store(p_state + 1, b_total, mask=m_n)
    tl.store(p_state + 2, b_picked, mask=m_n)
    tl.store(p_state + 3, b_slope, mask=m_n)
    tl.store(p_state + 4, b_sum, mask=m_n)

    if not FIRST and weights_ptr is not None:
        # The later the chunk, the rarer a new maximum: most of the time the sums need not be touched.
        moved = tl.max((m_n & (b_rescale != 1.0)).to(tl.int32), axis=0)
        if moved > 0:
            for i_d in range(0, D, BLOCK_C):
                o_d = i_d + tl.arange(0, BLOCK_C)
                m_d = m_n[:, None] & (o_d < D)[None, :]
                p_sums = sums_ptr + o_n[:, None] * stride_sums_n + o_d[None, :]  # [N, C]
                tl.store(p_sums, tl.load(p_sums, mask=m_d, other=0.0) * b_rescale[:, None], mask=m_d)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def finish_kernel(
    state_ptr,
    labels_ptr,
    stride_labels_n,
    ignore_index,
    weight_ptr,
    stride_weight_v,
    stride_weight_d,
    sums_ptr,
    stride_sums_n,
    uniform_ptr,
    stride_uniform_n,
    loss_ptr,
    gradient_ptr,
    stride_gradient_n,
    label_smoothing,
    z_loss,
    rows,
    V,
    D,
    SMOOTHED: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the state and the sums to the loss, [n], and its gradient, [n, D], which may be the sums' own memory.

    gradient: None where it is not needed.
    uniform: the gradient of the sum of the logits times WEIGHT_SCALE, [n, D], or one row for all (stride 0).
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    m_n = o_n < rows
    p_state = state_ptr + o_n * 5  # [N]
    b_maximum = tl.load(p_state, mask=m_n, other=0.0)  # [N]
    b_total = tl.load(p_state + 1, mask=m_n, other=1.0)  # [N]
    b_picked = tl.load(p_state + 2, mask=m_n, other=0.0)  # [N]
    b_label = tl.load(labels_ptr + o_n * stride_labels_n, mask=m_n, other=-1)  # [N]
    m_kept = b_label != ignore_index

    b_lse = b_maximum + tl.log(b_total)
    b_loss = (1.0 - label_smoothing) * (b_lse - b_picked) + z_loss * b_lse * b_lse
    if SMOOTHED:
        b_sum = tl.load(p_state + 4, mask=m_n, other=0.0)  # [N]
        b_loss += label_smoothing * (b_lse - b_sum / V)
    tl.store(loss_ptr + o_n, tl.where(m_kept, b_loss, 0.0), mask=m_n)

    if gradient_ptr is not None:
        b_of_lse = (1.0 + 2.0 * z_loss * b_lse) / b_total / WEIGHT_SCALE
        b_slope = tl.load(p_state + 3, mask=m_n, other=0.0)  # [N]
        b_of_label = (label_smoothing - 1.0) * b_slope
        m_label = m_n & (b_label >= 0) & (b_label < V)
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
            m_d = o_d < D
            m_nd = m_n[:, None] & m_d[None, :]
            b_sums = tl.load(sums_ptr + o_n[:, None] * stride_sums_n + o_d[None, :], mask=m_nd, other=0.0)  # [N, D]
            p_weight = weight_ptr + b_label[:, None] * stride_weight_v + o_d[None, :] * stride_weight_d
            b_weight = tl.load(p_weight, mask=m_label[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [N, D]
            b_gradient = b_sums * b_of_lse[:, None] + b_weight * b_of_label[:, None]
            if SMOOTHED:
                p_uniform = uniform_ptr + o_n[:, None] * stride_uniform_n + o_d[None, :]
                b_uniform = tl.load(p_uniform, mask=m_nd, other=0.0)  # [N, D]
                b_gradient -= b_uniform * (label_smoothing / V / WEIGHT_SCALE)
            p_gradient = gradient_ptr + o_n[:, None] * stride_gradient_n + o_d[None, :]
            tl.store(p_gradient, tl.where(m_kept[:, None], b_gradient, 0.0), mask=m_nd)
