"""The public functions: the specification in words, the checks, and the choice of an implementation.

Everything is checked here, once, but for the values of index tensors (`values.py`); implementations trust their
arguments. Knows tensors only, no model and no prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptengine.kernels.arguments import check_flags, check_numbers, check_optional_tensors, check_tensors, check_whole
from ptengine.kernels.dispatch import implementation, resolve_backend
from ptengine.kernels.prefix_attention import operators as _operators  # noqa: F401 (registers the implementations)
from ptengine.kernels.prefix_attention.scores import ScoreRules

__all__ = ["prefix_attention", "prefix_attention_varlen"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_WIDEST_HEAD = 256  # of the Triton kernels: a whole head is one side of a tile


def prefix_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prompt_ids: Tensor | None = None,
    prefix_rows: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    window_includes_prefix: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed rows, each over a shared prefix and its own tokens.

    The result equals attention over ``[prefix; row]`` with the prefix copied in front of every row::

                 prefix (P_n)   own tokens (causal)
        token 0  1 1 1 1 1      1 . . .
        token 1  1 1 1 1 1      1 1 . .
        token 2  1 1 1 1 1      1 1 1 .
        token 3  1 1 1 1 1      1 1 1 1

    but the prefix is read from where it lies, once for all its readers, and its gradient is summed over them in a fixed
    order. Token t of a row whose prefix has P_n tokens has position P_n + t; prefix key i has position i.

    Args:
        q: [total, H, D], rows one after another, after rotary embedding where the model has it. fp16, bf16, fp32, fp64.
        k: [total, H_kv, D], H a multiple of H_kv (grouped-query attention), dtype of q.
        v: [total, H_kv, D_v].
        prefix_k: [P, H_kv, D], one prompt that every row reads, or [N, P, H_kv, D], N prompts chosen by `prompt_ids`;
            None for no prefix or with `prefix_rows`. P may be 0.
        prefix_v: [P, H_kv, D_v] or [N, P, H_kv, D_v]; None exactly when `prefix_k` is.
        cu_seqlens: int32 [rows + 1], ascending from 0 to total; rows of length 0 are allowed.
        max_seqlen: at least the longest row.
        prompt_ids: int32 [rows], the prompt each row reads, -1 for none. Required when N > 1.
        prefix_rows: int32 [rows], instead of `prefix_k` and `prefix_v`: the row of this batch whose keys and values are
            the prefix, -1 for none. A row that is read must itself read none. The gradient of that row's k and v
            includes that of all its readers.
        prefix_lengths: int32 [N], P_n of each prompt, at most P; keys beyond it are not read. None means P.
        causal: a token sees the whole prefix and its row's tokens up to itself; otherwise its whole row.
        scale: of the scores, default ``D ** -0.5``.
        window: a key is seen only if ``|position of q - position of k| < window``.
        window_includes_prefix: True applies the window to prefix keys too, as in the stock computation; False keeps the
            whole prefix in view.
        softcap: c in ``c * tanh(score / c)``, applied after `scale` and before any bias.
        sinks: [H], one more logit per head that takes part in the softmax and has no value. Treated as a constant.
        alibi_slopes: [H]; adds ``-slope * |position of q - position of k|`` to a score. Treated as a constant.
        relative_bias: [H, 2 R + 1]; adds ``relative_bias[h, clamp(position of k - position of q, -R, R) + R]``, which
            represents T5's buckets exactly for R at least T5's maximal distance. Treated as a constant.
        deterministic: gradients are bitwise repeatable. False lets the Triton kernels add up the parts of a prefix's
            gradient in any order; the PyTorch implementations are always deterministic.
        backend: "reference", "torch" or "triton"; None chooses by device, see `ptengine.kernels.dispatch`. The Triton
            kernels take fp16, bf16 and fp32 (whose products are exact, never tf32) and heads of up to 256.
        return_lse: also return the log-sum-exp of every query's scores.

    Returns:
        out [total, H, D_v] in q's dtype; with `return_lse` also lse [H, total], fp32 (fp64 for fp64), natural
        logarithm, without gradient. A query that sees no key gives zeros and -inf.

    Raises:
        ValueError, TypeError: an argument is not as described; the message says what was expected and what came. The
            values of index tensors are looked at on a CPU only. Elsewhere wrong ones give undefined results.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    check_optional_tensors(prefix_rows=prefix_rows)
    _check_qkv(q, k, v, dims=3)
    total, num_heads, _ = q.shape
    if k.shape[0] != total or v.shape[0] != total:
        raise ValueError(f"expected as many keys and values as queries ({total}), got {k.shape[0]} and {v.shape[0]}")
    _check_index("cu_seqlens", cu_seqlens, q.device)
    rows = cu_seqlens.numel() - 1
    if rows < 0:
        raise ValueError("expected cu_seqlens of at least one entry, got none")
    check_whole(max_seqlen=max_seqlen)
    if prefix_rows is not None:
        _check_prefix_rows(prefix_rows, prefix_k, prefix_v, prompt_ids, prefix_lengths, rows, q.device)
    prefix_k, prefix_v = _check_prefix(q, k, v, prefix_k, prefix_v, prompt_ids, prefix_lengths, rows)
    rules = _check_rules(
        q, num_heads, causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias
    )
    run = _implementation("prefix_attention_varlen", backend, q, v)
    out, lse = run(
        q, k, v, prefix_k, prefix_v, cu_seqlens, max_seqlen,
        prompt_ids=prompt_ids, prefix_rows=prefix_rows, prefix_lengths=prefix_lengths, rules=rules,
        deterministic=deterministic,
    )  # fmt: skip
    return (out, lse.detach()) if return_lse else out


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    *,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    window_includes_prefix: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The dense twin of `prefix_attention_varlen`: a stock batch, with or without a cache.

    Row b's tokens are its keys in slots ``key_starts[b]`` to ``key_lengths[b]``; its queries are the last Tq of the Tk
    slots, so Tq < Tk is a step of generation and left or right padding is any slot outside the bounds. The first token
    has position P_n, whatever its slot.

    Args:
        q: [B, H, Tq, D].
        k: [B, H_kv, Tk, D], Tk at least Tq.
        v: [B, H_kv, Tk, D_v].
        prefix_k: [P, H_kv, D], or [N, P, H_kv, D] for N prompts, or None.
        prefix_v: [P, H_kv, D_v], or [N, P, H_kv, D_v], or None.
        key_lengths: int32 [B], one past the last slot that holds a token (right padding); None means Tk.
        key_starts: int32 [B], the first slot that holds a token (left padding); None means 0.

    All other keywords are those of `prefix_attention_varlen`, which see.

    Returns:
        out [B, H, Tq, D_v]; with `return_lse` also lse [B, H, Tq]. Queries at padding give zeros and -inf, and receive
        and pass on no gradient.

    Raises:
        ValueError, TypeError: as `prefix_attention_varlen`.
    """
    check_optional_tensors(key_lengths=key_lengths, key_starts=key_starts)
    _check_qkv(q, k, v, dims=4)
    batch, num_heads, q_len, _ = q.shape
    if k.shape[0] != batch or v.shape[0] != batch or k.shape[2] != v.shape[2] or k.shape[2] < q_len:
        raise ValueError(
            f"expected keys and values [B = {batch}, H_kv, Tk >= {q_len}, D], got {list(k.shape)} and {list(v.shape)}"
        )
    for name, bound in (("key_lengths", key_lengths), ("key_starts", key_starts)):
        if bound is not None:
            _check_index(name, bound, q.device, batch)
    prefix_k, prefix_v = _check_prefix(q, k, v, prefix_k, prefix_v, prompt_ids, prefix_lengths, batch)
    rules = _check_rules(
        q, num_heads, causal, scale, window, window_includes_prefix, softcap, sinks, alibi_slopes, relative_bias
    )
    run = _implementation("prefix_attention", backend, q, v)
    out, lse = run(
        q, k, v, prefix_k, prefix_v,
        key_lengths=key_lengths, key_starts=key_starts, prompt_ids=prompt_ids, prefix_lengths=prefix_lengths,
        rules=rules, deterministic=deterministic,
    )  # fmt: skip
    return (out, lse.detach()) if return_lse else out


def _implementation(op: str, backend: str | None, q: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    wide = max(q.shape[-1], v.shape[-1]) > _WIDEST_HEAD
    reason = f"the kernels take heads of up to {_WIDEST_HEAD}, not {q.shape[-1]} and {v.shape[-1]}" if wide else None
    return implementation(op, resolve_backend(backend, q.device, op, dtype=q.dtype, no_kernel_because=reason))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            layout = "[total, H, D]" if dims == 3 else "[B, H, T, D]"
            raise ValueError(f"expected {name} of shape {layout}, got {list(x.shape)}")
        if x.dtype not in _FLOATS or x.dtype != q.dtype:
            raise TypeError(f"expected q, k and v of one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"expected {name} on {q.device}, got {x.device}")
    heads = -2 if dims == 3 else 1
    if k.shape[heads] != v.shape[heads] or k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"expected H a multiple of H_kv, the same for k and v, got H = {q.shape[heads]} with {k.shape[heads]} key "
            f"heads and {v.shape[heads]} value heads"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"expected q and k of one head dimension, got {q.shape[-1]} and {k.shape[-1]}")


def _check_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    rows: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Check the prefix and give it the prompt axis: [N, P, H_kv, D]."""
    check_optional_tensors(
        prefix_k=prefix_k, prefix_v=prefix_v, prompt_ids=prompt_ids, prefix_lengths=prefix_lengths
    )  # fmt: skip
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("expected both prefix_k and prefix_v or neither, got one")
    if prefix_k is None or prefix_v is None:
        if prompt_ids is not None or prefix_lengths is not None:
            raise ValueError("expected prefix_k and prefix_v with prompt_ids or prefix_lengths, got None")
        return None, None
    heads = 1 if k.dim() == 4 else -2
    for name, x, width in (("prefix_k", prefix_k, k.shape[-1]), ("prefix_v", prefix_v, v.shape[-1])):
        if x.dim() not in (3, 4) or x.shape[-2] != k.shape[heads] or x.shape[-1] != width:
            raise ValueError(
                f"expected {name} of shape [P, {k.shape[heads]}, {width}] or [N, P, {k.shape[heads]}, {width}], "
                f"got {list(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"expected {name} as q, {q.dtype} on {q.device}, got {x.dtype} on {x.device}")
    if prefix_k.shape[:-1] != prefix_v.shape[:-1]:
        raise ValueError(f"expected prefixes of one length, got {list(prefix_k.shape)} and {list(prefix_v.shape)}")
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    num_prompts = prefix_k.shape[0]
    if prompt_ids is None and num_prompts != 1:
        raise ValueError(f"expected prompt_ids to choose among {num_prompts} prompts, got None")
    if prompt_ids is not None:
        _check_index("prompt_ids", prompt_ids, q.device, rows)
    if prefix_lengths is not None:
        _check_index("prefix_lengths", prefix_lengths, q.device, num_prompts)
    return prefix_k, prefix_v


def _check_prefix_rows(
    prefix_rows: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prompt_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    rows: int,
    device: torch.device,
) -> None:
    if any(x is not None for x in (prefix_k, prefix_v, prompt_ids, prefix_lengths)):
        raise ValueError(
            "expected prefix_rows alone, got prefix_k, prefix_v, prompt_ids or prefix_lengths with it: the prefix is "
            "either a row of the batch or given apart"
        )
    _check_index("prefix_rows", prefix_rows, device, rows)


def _check_rules(
    q: Tensor,
    num_heads: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    window_includes_prefix: bool,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
) -> ScoreRules:
    check_flags(causal=causal, window_includes_prefix=window_includes_prefix)
    check_optional_tensors(sinks=sinks, alibi_slopes=alibi_slopes, relative_bias=relative_bias)
    if window is not None:
        check_whole(window=window)
        if window < 1:
            raise ValueError(f"expected a window of at least 1, got {window}")
    if scale is not None:
        check_numbers(scale=scale)
        if not math.isfinite(scale):
            raise ValueError(f"expected a finite scale, got {scale}")
    if softcap is not None:
        check_numbers(softcap=softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(f"expected a positive softcap, got {softcap}")
    constants: tuple[tuple[str, Any, int], ...] = (
        ("sinks", sinks, 1),
        ("alibi_slopes", alibi_slopes, 1),
        ("relative_bias", relative_bias, 2),
    )
    for name, x, dims in constants:
        if x is None:
            continue
        if x.dim() != dims or x.shape[0] != num_heads or (dims == 2 and x.shape[1] % 2 == 0):
            layout = f"[{num_heads}]" if dims == 1 else f"[{num_heads}, 2 R + 1]"
            raise ValueError(f"expected {name} of shape {layout}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"expected {name} on {q.device}, got {x.device}")
    return ScoreRules(
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        window_includes_prefix=window_includes_prefix,
        softcap=None if softcap is None else float(softcap),
        sinks=None if sinks is None else sinks.detach(),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.detach(),
        relative_bias=None if relative_bias is None else relative_bias.detach(),
    )


def _check_index(name: str, x: Tensor, device: torch.device, count: int | None = None) -> None:
    if x.dim() != 1 or x.dtype not in _INTEGERS or (count is not None and x.numel() != count):
        shape = "[rows + 1]" if count is None else f"[{count}]"
        raise ValueError(f"expected {name} of shape {shape}, int32, got {list(x.shape)}, {x.dtype}")
    if x.device != device:
        raise ValueError(f"expected {name} on {device}, got {x.device}")
