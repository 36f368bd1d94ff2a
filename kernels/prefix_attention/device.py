"""Device functions that the forward and the backward kernels share: where a row lies, what it reads, how scores bend.

Positions, masks and score rules are those of `scores.py`, in Triton. Nothing here loads keys or computes a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Where a row's prefix lies: it has none, it is given apart, or it is another row of the batch.
NO_PREFIX = tl.constexpr(0)
PREFIX_APART = tl.constexpr(1)
PREFIX_IN_ROWS = tl.constexpr(2)


# Arguments that change from batch to batch: nothing is gained by compiling for 1 or for multiples of 16 anew.
COUNTS = ("window", "reach", "total", "q_len", "k_len", "prefix_len")


@triton.jit
def row_span(i_row, bounds_ptr, ends_ptr, q_len, k_len, DENSE: tl.constexpr):
    """Where row `i_row` lies.

    Returns the flat index of its first query, its number of queries, the first query's and the first own key's offset
    in tokens from the row's base, its number of own keys, and `shift`: query slot t is own token t + shift.
    """
    if DENSE:
        first_key = 0
        if bounds_ptr is not None:
            first_key = tl.load(bounds_ptr + i_row).to(tl.int32)
        last_key = k_len
        if ends_ptr is not None:
            last_key = tl.load(ends_ptr + i_row).to(tl.int32)
        flat = i_row.to(tl.int64) * q_len
        start_q = flat * 0
        num_queries = q_len
        start_k = start_q + first_key
        num_keys = tl.maximum(last_key - first_key, 0)
        shift = k_len - q_len - first_key
    else:
        flat = tl.load(bounds_ptr + i_row).to(tl.int64)
        num_queries = (tl.load(bounds_ptr + i_row + 1).to(tl.int64) - flat).to(tl.int32)
        start_q = flat
        start_k = flat
        num_keys = num_queries
        shift = 0
    return flat, num_queries, start_q, start_k, num_keys, shift


@triton.jit
def prefix_span(i_row, bounds_ptr, prompts_ptr, lengths_ptr, prefix_len, PREFIX: tl.constexpr):
    """What row `i_row` reads: prompt, token offset within it (int64 both), and length."""
    if PREFIX == PREFIX_APART:
        prompt = i_row * 0
        if prompts_ptr is not None:
            prompt = tl.load(prompts_ptr + i_row).to(tl.int32)
        length = prefix_len + i_row * 0
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + tl.maximum(prompt, 0)).to(tl.int32)
        length = tl.where(prompt >= 0, length, 0)
        o_prompt = tl.maximum(prompt, 0).to(tl.int64)
        o_token = o_prompt * 0
    elif PREFIX == PREFIX_IN_ROWS:
        source = tl.load(prompts_ptr + i_row).to(tl.int32)
        some = tl.maximum(source, 0)
        o_token = tl.load(bounds_ptr + some).to(tl.int64)
        length = (tl.load(bounds_ptr + some + 1).to(tl.int64) - o_token).to(tl.int32)
        length = tl.where(source >= 0, length, 0)
        o_prompt = o_token * 0
    else:
        length = i_row * 0
        o_prompt = i_row.to(tl.int64) * 0
        o_token = o_prompt
    return o_prompt, o_token, length


@triton.jit
def tanh(x):
    """Hyperbolic tangent to fp32 rounding; near 0, where 1 - exp(-2x) cancels, by its series."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    outer = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.04, series, tl.where(x < 0, -outer, outer))


@triton.jit
def bend(qk, own_q, own_k, heads, slopes_ptr, bias_ptr, scale, softcap, reach, SOFTCAP: tl.constexpr):
    """Scores in units of log2 from raw products, and the capping's derivative (1.0 without it).

    `own_q` is a query's index in its row; `own_k` a key's, which is negative for a prefix: -P_n to -1. With `heads`
    they broadcast against `qk`, whichever way round it is.
    """
    slope = 1.0
    if not SOFTCAP and slopes_ptr is None and bias_ptr is None:
        scores = qk * (scale * LOG2E)
    else:
        scores = qk * scale
        if SOFTCAP:
            bent = tanh(scores / softcap)
            scores = softcap * bent
            slope = 1.0 - bent * bent
        if slopes_ptr is not None:
            scores -= tl.load(slopes_ptr + heads).to(tl.float32) * tl.abs(own_q - own_k)
        if bias_ptr is not None:
            o_bias = tl.minimum(tl.maximum(own_k - own_q, -reach), reach) + reach
            scores += tl.load(bias_ptr + heads.to(tl.int64) * (2 * reach + 1) + o_bias).to(tl.float32)
        scores = scores * LOG2E
    return scores, slope


@triton.jit
def inside(own_q, own_k, window, WINDOW_ON_PREFIX: tl.constexpr):
    """Which keys the window leaves in view; indices as in `bend`."""
    seen = tl.abs(own_q - own_k) < window
    if not WINDOW_ON_PREFIX:
        seen = seen | (own_k < 0)
    return seen


@triton.jit
def visible(
    own_q, own_k, m_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_ON_PREFIX: tl.constexpr
):  # fmt: skip
    """Which keys are seen, of those that exist (`m_k`); indices as in `bend`, so causality never hides a prefix."""
    seen = m_k
    if CAUSAL:
        seen = seen & (own_k <= own_q)
    if WINDOW:
        seen = seen & inside(own_q, own_k, window, WINDOW_ON_PREFIX)
    return seen
