"""The CPU path: rows stay packed, every prefix is read once for all of its readers, keys are never expanded over rows.

Each token belongs to one *own* rectangle (its row, bucketed with rows of similar length) and at most one *prefix*
rectangle (all tokens of all rows that read one prompt, as one long sequence). The two are merged by their log-sum-exp.
The batch disappears from the prefix gradient, which is summed inside one rectangle in a fixed order. Half types are
computed in fp32. Runs on any device; PyTorch's fused kernel serves the rectangles on CPU where scores are not capped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptengine.kernels.prefix_attention.blocks import block_backward, block_forward
from ptengine.kernels.prefix_attention.plan import OwnBlock, Plan, PrefixBlock
from ptengine.kernels.prefix_attention.scores import ScoreRules

__all__ = ["backward", "forward"]


def forward(
    q: Tensor,  # [M, H, D]
    k: Tensor,  # [S, H_kv, D], or [B, H_kv, Tk, D] of a dense call
    v: Tensor,  # [S, H_kv, D_v]
    prefix_k: Tensor | None,  # [N, P, H_kv, D]
    prefix_v: Tensor | None,
    plan: Plan,
    rules: ScoreRules,
) -> tuple[Tensor, Tensor]:
    """Returns out [M, H, D_v] in q's dtype and the log-sum-exp [H, M] in fp32 (fp64 for fp64)."""
    dtype = _compute_dtype(q)
    qc, kc, vc = q.to(dtype), k.to(dtype), v.to(dtype)
    # Own rectangles cover every token, so nothing needs to be cleared first.
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=dtype, device=q.device)  # [M, H, D_v]
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)  # [H, M]

    for own in plan.own:
        o, l = block_forward(  # noqa: E741
            own.take_queries(qc), own.take_keys(kc), own.take_keys(vc), *_own_mask(own, plan, rules, dtype),
            rules.scale, rules.softcap,
        )  # fmt: skip
        own.put_queries(out, o)
        own.put_lse(lse, l)
    for block in plan.prefixes:
        pk, pv = block.keys(kc, prefix_k), block.keys(vc, prefix_v)  # [P_n, H_kv, D]
        o, l = block_forward(  # noqa: E741
            _heads_first(qc[block.tokens]), _heads_first(pk.to(dtype)), _heads_first(pv.to(dtype)), False,
            _prefix_bias(block, plan, rules, dtype), rules.scale, rules.softcap,
        )  # fmt: skip
        before = lse[:, block.tokens]  # [H, M_n]
        after = torch.logaddexp(before, l[0])
        kept, added = _weight(before, after), _weight(l[0], after)  # [M_n, H, 1]
        lse[:, block.tokens] = after
        out[block.tokens] = torch.addcmul(out[block.tokens] * kept, o[0].transpose(0, 1), added)
    if rules.sinks is not None:
        seen = lse > float("-inf")  # padding keeps zeros
        after = torch.where(seen, torch.logaddexp(lse, rules.sinks.to(dtype)[:, None]), lse)
        out *= _weight(lse, after)
        lse = after
    return out.to(q.dtype), lse if dtype == torch.float64 else lse.float()


def backward(
    grad: Tensor,  # [M, H, D_v]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,  # [M, H, D_v]
    lse: Tensor,  # [H, M]
    plan: Plan,
    rules: ScoreRules,
    rows_need_grad: bool,
) -> list[Tensor]:
    """Gradients of `forward`, given its results: of q, k and v if `rows_need_grad`, then of the prefix if it is given.

    In the first layer of a frozen backbone nothing but the prefix needs a gradient, and the rows' rectangles are
    skipped.
    """
    dtype = _compute_dtype(q)
    gc, qc, kc, vc, oc = grad.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype), out.to(dtype)
    lse = lse.to(dtype)
    # Own rectangles cover every query and key, so nothing needs to be cleared first (without queries there are none).
    blank = torch.empty_like if rows_need_grad and plan.own else torch.zeros_like
    dq, dk, dv = (blank(x, memory_format=torch.contiguous_format) for x in (qc, kc, vc))
    dpk, dpv = (
        None if x is None else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for x in (prefix_k, prefix_v)
    )

    for own in plan.own if rows_need_grad else ():
        gq, gk, gv = block_backward(
            own.take_gradients(gc), own.take_queries(qc), own.take_keys(kc), own.take_keys(vc), own.take_queries(oc),
            own.take_lse(lse), *_own_mask(own, plan, rules, dtype), rules.scale, rules.softcap,
        )  # fmt: skip
        own.put_queries(dq, gq)
        own.put_keys(dk, gk)
        own.put_keys(dv, gv)
    for block in plan.prefixes:
        pk, pv = block.keys(kc, prefix_k).to(dtype), block.keys(vc, prefix_v).to(dtype)  # [P_n, H_kv, D]
        gq, gk, gv = block_backward(
            _heads_first(gc[block.tokens]), _heads_first(qc[block.tokens]), _heads_first(pk), _heads_first(pv),
            _heads_first(oc[block.tokens]), lse[None, :, block.tokens], False,
            _prefix_bias(block, plan, rules, dtype), rules.scale, rules.softcap,
        )  # fmt: skip
        dq[block.tokens] += gq[0].transpose(0, 1)
        block.add_keys(dk, dpk, gk[0].transpose(0, 1))
        block.add_keys(dv, dpv, gv[0].transpose(0, 1))
    rows = [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)] if rows_need_grad else []
    return rows + [x.to(q.dtype) for x in (dpk, dpv) if x is not None]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), 0 where nothing was seen; [H, M] -> [M, H, 1]."""
    nothing = part == float("-inf")
    return torch.exp(part - whole).masked_fill(nothing, 0.0).transpose(0, 1).unsqueeze(-1)


def _own_mask(own: OwnBlock, plan: Plan, rules: ScoreRules, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """Either plain causality (True, None) or everything within rows as a bias [R or 1, 1 or H, Tq, Tk]."""
    hidden = own.hidden_keys(rules.positional)  # [R, Tq, Tk] or None
    if not rules.positional:
        return own.causal, None if hidden is None else _blank(hidden, dtype)[:, None]
    q_pos, k_pos = own.query_positions(plan), own.key_positions(plan)  # [R, Tq], [R, Tk]
    seen = rules.visible(q_pos, k_pos, False)  # [R, Tq, Tk], causality included
    bias = _blank(~seen if hidden is None else hidden | ~seen, dtype)[:, None]  # [R, 1, Tq, Tk]
    extra = rules.bias(q_pos, k_pos, dtype)
    return False, bias if extra is None else bias + extra


def _prefix_bias(block: PrefixBlock, plan: Plan, rules: ScoreRules, dtype: torch.dtype) -> Tensor | None:
    """The same between tokens and their prefix, [1, 1 or H, M_n, P_n]; None where every token sees all of it alike."""
    if not rules.positional:
        return None
    q_pos = plan.positions[block.tokens]  # [M_n]
    k_pos = torch.arange(block.length, device=q_pos.device)  # [P_n]
    bias = _blank(~rules.visible(q_pos, k_pos, True), dtype)[None, None]  # [1, 1, M_n, P_n]
    extra = rules.bias(q_pos, k_pos, dtype)
    return bias if extra is None else bias + extra


def _blank(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
