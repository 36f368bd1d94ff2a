"""The operation as `torch.library` operators, so that torch.compile, fake tensors and autograd see through it.

One forward and one backward operator for packed rows, and a pair for dense batches; `kernel` says whether the Triton
kernels or the PyTorch path compute them. Options travel as plain arguments because operator schemas know no classes.
Eager calls skip the operators, see `eager.shortcut`. Importing this module registers the implementations with the
dispatcher, Triton's without importing Triton.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptengine.kernels.dispatch import register
from ptengine.kernels.eager import shortcut
from ptengine.kernels.launch import register_kernel
from ptengine.kernels.prefix_attention import reference, torch_path
from ptengine.kernels.prefix_attention.plan import Plan, plan_dense, plan_varlen
from ptengine.kernels.prefix_attention.scores import ScoreRules
from ptengine.kernels.prefix_attention.values import check_dense_values, check_packed_values

__all__: list[str] = []


def _values(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.tolist())


def _prompt_lengths(prefix_k: Tensor | None, prefix_lengths: Tensor | None) -> tuple[int, ...]:
    if prefix_k is None:
        return ()
    return _values(prefix_lengths) or (prefix_k.shape[1],) * prefix_k.shape[0]


def _varlen_plan(
    q: Tensor,
    prefix_k: Tensor | None,
    cu_seqlens: Tensor,
    prompt_ids: Tensor | None,
    prefix_rows: Tensor | None,
    prefix_lengths: Tensor | None,
    causal: bool,
) -> Plan:
    bounds = tuple(cu_seqlens.tolist())
    prompts = _values(prompt_ids)
    if prompts is None and prefix_k is not None:
        prompts = (0,) * (len(bounds) - 1)
    lengths = _prompt_lengths(prefix_k, prefix_lengths)
    return plan_varlen(bounds, prompts, _values(prefix_rows), lengths, causal, q.device)


def _varlen_layout(
    cu_seqlens: Tensor, max_seqlen: int, prompt_ids: Tensor | None, prefix_rows: Tensor | None,
    prefix_lengths: Tensor | None,
) -> Any:  # fmt: skip
    from ptengine.kernels.prefix_attention.triton_path import Layout

    return Layout(
        dense=False, rows=cu_seqlens.numel() - 1, q_len=max_seqlen, k_len=max_seqlen,
        bounds=cu_seqlens.contiguous(), ends=None,
        prompts=_contiguous(prompt_ids if prefix_rows is None else prefix_rows), in_rows=prefix_rows is not None,
        lengths=_contiguous(prefix_lengths),
    )  # fmt: skip


def _dense_layout(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, key_starts: Tensor | None, prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
) -> Any:  # fmt: skip
    from ptengine.kernels.prefix_attention.triton_path import Layout

    return Layout(
        dense=True, rows=q.shape[0], q_len=q.shape[1], k_len=k.shape[2],
        bounds=_contiguous(key_starts), ends=_contiguous(key_lengths),
        prompts=_contiguous(prompt_ids), in_rows=False, lengths=_contiguous(prefix_lengths),
    )  # fmt: skip


def _contiguous(x: Tensor | None) -> Tensor | None:
    """The kernels step through index tensors by one."""
    return None if x is None else x.contiguous()


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    cu_seqlens: Tensor, prompt_ids: Tensor | None, prefix_rows: Tensor | None, prefix_lengths: Tensor | None,
    causal: bool, scale: float, window: int | None, window_includes_prefix: bool, softcap: float | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, relative_bias: Tensor | None,
    max_seqlen: int, kernel: bool, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_packed_values(q.shape[0], cu_seqlens, max_seqlen, prefix_k, prompt_ids, prefix_rows, prefix_lengths)
    rules = ScoreRules(causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias)
    if kernel:
        from ptengine.kernels.prefix_attention import triton_path

        layout = _varlen_layout(cu_seqlens, max_seqlen, prompt_ids, prefix_rows, prefix_lengths)
        with torch.cuda.device_of(q):
            return triton_path.forward(q, k, v, prefix_k, prefix_v, layout, rules)
    plan = _varlen_plan(q, prefix_k, cu_seqlens, prompt_ids, prefix_rows, prefix_lengths, causal)
    return torch_path.forward(q, k, v, prefix_k, prefix_v, plan, rules)


_varlen = torch.library.custom_op("ptengine::prefix_attention_varlen", mutates_args=())(_attend_varlen)


@_varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])  # [total, H, D_v]
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))


def _differentiate_varlen(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, prompt_ids: Tensor | None, prefix_rows: Tensor | None, prefix_lengths: Tensor | None,
    causal: bool, scale: float, window: int | None, window_includes_prefix: bool, softcap: float | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, relative_bias: Tensor | None,
    max_seqlen: int, kernel: bool, deterministic: bool, rows_need_grad: bool,
) -> list[Tensor]:  # fmt: skip
    rules = ScoreRules(causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias)
    if kernel:
        from ptengine.kernels.prefix_attention import triton_path

        layout = _varlen_layout(cu_seqlens, max_seqlen, prompt_ids, prefix_rows, prefix_lengths)
        with torch.cuda.device_of(q):
            return triton_path.backward(
                grad, q, k, v, prefix_k, prefix_v, out, lse, layout, rules, rows_need_grad, deterministic
            )
    plan = _varlen_plan(q, prefix_k, cu_seqlens, prompt_ids, prefix_rows, prefix_lengths, causal)
    return torch_path.backward(grad, q, k, v, prefix_k, prefix_v, out, lse, plan, rules, rows_need_grad)


_varlen_backward = torch.library.custom_op("ptengine::prefix_attention_varlen_backward", mutates_args=())(
    _differentiate_varlen
)


@_varlen_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _fake_gradients(q, k, v, prefix_k, prefix_v, rest[-1])


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    key_lengths: Tensor | None, key_starts: Tensor | None, prompt_ids: Tensor | None, prefix_lengths: Tensor | None,
    causal: bool, scale: float, window: int | None, window_includes_prefix: bool, softcap: float | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, relative_bias: Tensor | None,
    kernel: bool, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_dense_values(k, key_lengths, key_starts, prefix_k, prompt_ids, prefix_lengths)
    rules = ScoreRules(causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias)
    if kernel:
        from ptengine.kernels.prefix_attention import triton_path

        layout = _dense_layout(q, k, key_lengths, key_starts, prompt_ids, prefix_lengths)
        with torch.cuda.device_of(q):
            out, lse = triton_path.forward(q, k, v, prefix_k, prefix_v, layout, rules)
    else:
        plan = _dense_plan(q, k, prefix_k, key_lengths, key_starts, prompt_ids, prefix_lengths, causal)
        out, lse = torch_path.forward(q.flatten(0, 1), k, v, prefix_k, prefix_v, plan, rules)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2])


_dense = torch.library.custom_op("ptengine::prefix_attention", mutates_args=())(_attend_dense)


@_dense.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])  # [B, Tq, H, D_v]
    return out, q.new_empty(q.shape[2], *q.shape[:2], dtype=_lse_dtype(q))  # [H, B, Tq]


def _differentiate_dense(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    out: Tensor, lse: Tensor,
    key_lengths: Tensor | None, key_starts: Tensor | None, prompt_ids: Tensor | None, prefix_lengths: Tensor | None,
    causal: bool, scale: float, window: int | None, window_includes_prefix: bool, softcap: float | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, relative_bias: Tensor | None,
    kernel: bool, deterministic: bool, rows_need_grad: bool,
) -> list[Tensor]:  # fmt: skip
    rules = ScoreRules(causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias)
    if kernel:
        from ptengine.kernels.prefix_attention import triton_path

        layout = _dense_layout(q, k, key_lengths, key_starts, prompt_ids, prefix_lengths)
        with torch.cuda.device_of(q):
            return triton_path.backward(
                grad.flatten(0, 1), q, k, v, prefix_k, prefix_v, out.flatten(0, 1), lse.flatten(1),
                layout, rules, rows_need_grad, deterministic,
            )  # fmt: skip
    plan = _dense_plan(q, k, prefix_k, key_lengths, key_starts, prompt_ids, prefix_lengths, causal)
    gradients = torch_path.backward(
        grad.flatten(0, 1), q.flatten(0, 1), k, v, prefix_k, prefix_v, out.flatten(0, 1), lse.flatten(1),
        plan, rules, rows_need_grad,
    )  # fmt: skip
    if rows_need_grad:
        gradients[0] = gradients[0].unflatten(0, q.shape[:2])
    return gradients


_dense_backward = torch.library.custom_op("ptengine::prefix_attention_backward", mutates_args=())(_differentiate_dense)


@_dense_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _fake_gradients(q, k, v, prefix_k, prefix_v, rest[-1])


def _dense_plan(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, H_kv, Tk, D]
    prefix_k: Tensor | None,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    causal: bool,
) -> Plan:
    batch, q_len, k_len = q.shape[0], q.shape[1], k.shape[2]
    prompts = _values(prompt_ids)
    if prompts is None and prefix_k is not None:
        prompts = (0,) * batch
    return plan_dense(
        q_len, k_len, _values(key_starts) or (0,) * batch, _values(key_lengths) or (k_len,) * batch,
        prompts, _prompt_lengths(prefix_k, prefix_lengths), causal, q.device,
    )  # fmt: skip


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, rows_need_grad: bool
) -> list[Tensor]:
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)] if rows_need_grad else []
    return rows + [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (prefix_k, prefix_v) if x is not None
    ]


_TENSORS = 5  # q, k, v, prefix_k, prefix_v come first in every operator
_INDEX = 4  # then four index tensors
_RULES = 8  # then the rules, of which the last three are tensors; then how to compute


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, rest = inputs[:_TENSORS], inputs[_TENSORS:]
    index, rules, ctx.how = rest[:_INDEX], rest[_INDEX : _INDEX + _RULES], rest[_INDEX + _RULES :]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, *index, *rules[5:])
    ctx.scalars = rules[:5]


def _make_backward(operator: Any) -> Any:
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        rows_need_grad = any(ctx.needs_input_grad[:3])
        given = operator(
            grad, *tensors[: _TENSORS + 2 + _INDEX], *ctx.scalars, *tensors[_TENSORS + 2 + _INDEX :], *ctx.how,
            rows_need_grad,
        )  # fmt: skip
        rows = given[:3] if rows_need_grad else [None] * 3
        prefix = given[-2:] if tensors[3] is not None else [None, None]
        return (*rows, *prefix, *[None] * (_INDEX + _RULES + len(ctx.how)))

    return backward


_of_varlen = _make_backward(shortcut(_varlen_backward, _differentiate_varlen))
_of_dense = _make_backward(shortcut(_dense_backward, _differentiate_dense))
_varlen.register_autograd(_of_varlen, setup_context=_setup_context)
_dense.register_autograd(_of_dense, setup_context=_setup_context)
_call_varlen = shortcut(_varlen, _attend_varlen, _setup_context, _of_varlen)
_call_dense = shortcut(_dense, _attend_dense, _setup_context, _of_dense)


def _run_varlen(
    kernel: bool, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    cu_seqlens: Tensor, max_seqlen: int, *, prompt_ids: Tensor | None, prefix_rows: Tensor | None,
    prefix_lengths: Tensor | None, rules: ScoreRules, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _call_varlen(
        q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prefix_rows, prefix_lengths, *rules,
        max_seqlen, kernel, deterministic,
    )  # fmt: skip
    return out, lse


def _run_dense(
    kernel: bool, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *,
    key_lengths: Tensor | None, key_starts: Tensor | None, prompt_ids: Tensor | None, prefix_lengths: Tensor | None,
    rules: ScoreRules, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Token-major inside: the projections of a transformer leave q so, and the result is wanted so.
    out, lse = _call_dense(
        q.transpose(1, 2), k, v, prefix_k, prefix_v, key_lengths, key_starts, prompt_ids, prefix_lengths,
        *rules, kernel, deterministic,
    )  # fmt: skip
    return out.transpose(1, 2), lse.transpose(0, 1)  # [B, H, Tq, D_v], [B, H, Tq]


for _op, _run, _reference in (
    ("prefix_attention_varlen", _run_varlen, reference.prefix_attention_varlen),
    ("prefix_attention", _run_dense, reference.prefix_attention),
):
    register(_op, "reference", _reference)
    register(_op, "torch", partial(_run, False))
    register_kernel(_op, partial(_run, True))
