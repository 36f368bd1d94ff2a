"""The calls whose kernels are compiled ahead of time: every shipped tile, and every option that costs registers.

A call is a public function on CPU tensors of representative shape, forward and backward. Shapes choose the tile and
what Triton specialises on, so they are those of real use: strides divisible by 16, lengths that are not. Values are
never looked at, except index tensors, which the checks read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptengine.kernels.gated_activation import gated_activation
from ptengine.kernels.linear_cross_entropy import linear_cross_entropy
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen
from ptengine.kernels.prefix_concat import prefix_concat, prefix_concat_paged, prefix_concat_varlen
from ptengine.kernels.rotary import rotary_embedding

__all__ = ["CALLS", "Call"]

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MAIN = ("sm_90",)  # tiles and kernels are compiled for all targets, variants for the one that tiles are made for first
_TUNED = ("sm_90", "sm_100")  # where the tiles of short rows are others than those of long ones
_PROMPT = 100
_LENGTHS = (_PROMPT, 257, 1, 129)


@dataclass(frozen=True)
class Call:
    name: str
    run: Callable[[], object]
    targets: tuple[str, ...] | None = None  # None for all


def _differentiate(out: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    needed = [x for x in inputs if x.requires_grad]
    outs = out if isinstance(out, tuple) else (out,)
    if needed:
        torch.autograd.grad(outs, needed, [torch.empty_like(x) for x in outs])


def _index(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _bounds(lengths: Iterable[int]) -> Tensor:
    return _index([0, *torch.tensor(list(lengths)).cumsum(0).tolist()])


def _loss(rows: int, dtype: torch.dtype, vocabulary: int, gradient: bool, bias: bool, **options: Any) -> None:
    hidden = torch.zeros(rows, 32, dtype=dtype, requires_grad=gradient)
    weight = torch.zeros(vocabulary, 32, dtype=dtype)
    labels = torch.zeros(rows, dtype=torch.int64)
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=torch.zeros(vocabulary, dtype=dtype) if bias else None, **options
    )
    _differentiate(loss, hidden)


def _losses() -> list[Call]:
    plain: dict[str, Any] = {"gradient": True, "bias": False}
    everything: dict[str, Any] = {"bias": True, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    variants = [
        ("bf16", torch.bfloat16, plain, _MAIN),
        ("bf16 loss only", torch.bfloat16, plain | {"gradient": False}, _MAIN),
        ("bf16 all options", torch.bfloat16, plain | everything, None),
        ("fp32 all options", torch.float32, plain | everything, None),
    ]
    # The vocabulary is wide enough for a second chunk, whose kernel differs from the first's.
    return [
        Call(f"{name} {regime}", partial(_loss, rows, dtype, vocabulary, **options), targets)
        for name, dtype, options, targets in variants
        for regime, rows, vocabulary in (("few", 120, 180007), ("many", 700, 30011))
    ]


def _concat(form: str, dtype: torch.dtype, prompts: int | None, rotary: bool) -> None:
    heads, dim, batch, length = 8, 128, 4, 57
    shape = (_PROMPT, heads, dim) if prompts is None else (prompts, _PROMPT, heads, dim)
    prefix = torch.zeros(shape, requires_grad=form != "paged")  # a prompt is fp32 whatever the backbone is
    ids = None if prompts is None else _index(range(batch))
    tokens = (batch * length,) if form == "packed" else (length,)
    turn = torch.zeros(*tokens, dim, dtype=dtype) if rotary else None
    options: dict[str, Any] = {"prompt_ids": ids, "cos": turn, "sin": turn}
    if form == "packed":
        rows = torch.zeros(batch * length, heads, dim, dtype=dtype, requires_grad=True)
        out, _ = prefix_concat_varlen(prefix, rows, _bounds([length] * batch), length, **options)
        _differentiate(out, prefix, rows)
        return
    rows = torch.zeros(batch, length, heads, dim, dtype=dtype, requires_grad=form != "paged").transpose(1, 2)
    if form == "dense":
        _differentiate(prefix_concat(prefix, rows, **options), prefix, rows)
        return
    cache = torch.zeros(64, 16, heads, dim, dtype=dtype)
    table = torch.arange(64, dtype=torch.int32).view(batch, 16)
    prefix_concat_paged(prefix, rows, cache, table, **options)


def _concats() -> list[Call]:
    half, full = torch.bfloat16, torch.float32
    variants: dict[str, tuple[Callable[[], None], tuple[str, ...] | None]] = {
        "bf16 dense": (partial(_concat, "dense", half, None, False), None),
        "bf16 dense N prompts rotary": (partial(_concat, "dense", half, 4, True), None),
        "bf16 packed N prompts rotary": (partial(_concat, "packed", half, 4, True), None),
        "bf16 paged rotary": (partial(_concat, "paged", half, None, True), None),
        "fp32 dense": (partial(_concat, "dense", full, None, False), None),
        "fp32 dense rotary": (partial(_concat, "dense", full, None, True), None),
        "bf16 dense rotary": (partial(_concat, "dense", half, None, True), _MAIN),
        "bf16 packed": (partial(_concat, "packed", half, None, False), _MAIN),
        "bf16 paged": (partial(_concat, "paged", half, 4, False), _MAIN),
        "fp32 packed rotary": (partial(_concat, "packed", full, None, True), _MAIN),
    }
    return [Call(name, run, targets) for name, (run, targets) in variants.items()]


def _packed(
    dtype: torch.dtype, heads: int, heads_kv: int, dim: int, *, lengths: tuple[int, ...] = _LENGTHS,
    prefix: str = "rows", grad: tuple[str, ...] = ("rows", "prefix"), **options: Any,
) -> None:  # fmt: skip
    total = sum(lengths)
    q, k, v = (
        torch.zeros(total, n, dim, dtype=dtype, requires_grad="rows" in grad) for n in (heads, heads_kv, heads_kv)
    )
    pk = pv = None
    if prefix == "rows":
        options["prefix_rows"] = _index([-1, *[0] * (len(lengths) - 1)])
    else:
        shape = {
            "nothing": (0, heads_kv, dim), "apart": (_PROMPT, heads_kv, dim),
            "N prompts": (len(lengths), _PROMPT, heads_kv, dim),
        }[prefix]  # fmt: skip
        pk, pv = (torch.zeros(shape, dtype=dtype, requires_grad="prefix" in grad) for _ in range(2))
        if prefix == "N prompts":
            options["prompt_ids"] = _index(range(len(lengths)))
            options["prefix_lengths"] = _index([_PROMPT] * len(lengths))
    out = prefix_attention_varlen(q, k, v, pk, pv, _bounds(lengths), max(lengths), **options)
    _differentiate(out, *(x for x in (q, k, v, pk, pv) if x is not None))


def _dense(
    dtype: torch.dtype, heads: int, heads_kv: int, dim: int, *, queries: int, keys: int, grad: bool, **options: Any
) -> None:
    q = torch.zeros(4, queries, heads, dim, dtype=dtype, requires_grad=grad).transpose(1, 2)
    k, v = (torch.zeros(4, heads_kv, keys, dim, dtype=dtype, requires_grad=grad) for _ in range(2))
    pk, pv = (torch.zeros(_PROMPT, heads_kv, dim, dtype=dtype, requires_grad=grad) for _ in range(2))
    options["key_lengths"] = _index([keys] * 4)
    out = prefix_attention(q, k, v, pk, pv, **options)
    _differentiate(out, q, k, v, pk, pv)


def _attentions() -> list[Call]:
    calls = []
    for dtype in (torch.bfloat16, torch.float32):
        for heads, heads_kv, dim in ((12, 12, 64), (32, 8, 128), (16, 16, 256)):
            shape, name = (dtype, heads, heads_kv, dim), f"{_NAMES[dtype]} D{dim}"
            short = (64 * heads_kv // heads - 1,) * 3
            calls += [
                Call(f"{name} long", partial(_packed, *shape)),
                Call(f"{name} short", partial(_packed, *shape, lengths=short, prefix="apart", grad=())),
                Call(f"{name} decode", partial(_dense, *shape, queries=1, keys=300, grad=False)),
            ]
            if dtype == torch.bfloat16:
                few = (57, 64, 1)
                calls += [
                    Call(f"{name} apart", partial(_packed, *shape, prefix="apart"), _MAIN),
                    Call(f"{name} medium", partial(_packed, *shape, lengths=(_PROMPT, 129, 1), grad=()), _TUNED),
                    Call(f"{name} few tokens", partial(_packed, *shape, lengths=few), _TUNED),
                    Call(f"{name} few tokens apart", partial(_packed, *shape, lengths=few, prefix="apart"), _MAIN),
                ]
    shape, name = (torch.bfloat16, 32, 8, 128), "bf16 D128"
    bias = torch.zeros(32, 257)
    everything: dict[str, Any] = {
        "window": 64, "window_includes_prefix": False, "softcap": 30.0, "sinks": torch.zeros(32),
        "alibi_slopes": torch.zeros(32), "deterministic": False,
    }  # fmt: skip
    variants: dict[str, Callable[[], None]] = {
        "nothing before the rows": partial(_packed, *shape, prefix="nothing"),
        "first layer, N prompts": partial(_packed, *shape, prefix="N prompts", grad=("prefix",)),
        "window": partial(_packed, *shape, window=64),
        "all options": partial(_packed, *shape, **everything),
        "dense, relative bias": partial(
            _dense, *shape, queries=300, keys=300, grad=True, causal=False, relative_bias=bias
        ),
    }
    calls += [Call(f"{name} {variant}", run, _MAIN) for variant, run in variants.items()]
    calls.append(Call("bf16 D96 long", partial(_packed, torch.bfloat16, 12, 12, 96), _MAIN))
    return calls


def _gate(dtype: torch.dtype, activation: str) -> None:
    gate, up = (torch.zeros(57, 2752, dtype=dtype, requires_grad=True) for _ in range(2))
    _differentiate(gated_activation(gate, up, activation), gate, up)


def _gates() -> list[Call]:
    return [
        Call(f"{_NAMES[dtype]} {activation}", partial(_gate, dtype, activation))
        for dtype in (torch.bfloat16, torch.float32)
        for activation in ("silu", "gelu", "gelu_tanh")
    ]


def _rotary(dtype: torch.dtype, heads: int, heads_kv: int, dim: int, turned: int) -> None:
    qkv = torch.zeros(57, heads + 2 * heads_kv, dim, dtype=dtype, requires_grad=True)
    q, k, _ = qkv.split((heads, heads_kv, heads_kv), dim=1)
    angle = torch.zeros(57, turned, dtype=dtype)
    _differentiate(rotary_embedding(q, k, angle, angle), q, k)


def _rotaries() -> list[Call]:
    return [
        Call(
            f"{_NAMES[dtype]} H{heads} D{dim}{'' if turned == dim else f' R{turned}'}",
            partial(_rotary, dtype, heads, heads_kv, dim, turned),
            None if dim == 128 else _MAIN,
        )
        for dtype in (torch.bfloat16, torch.float32)
        for heads, heads_kv, dim, turned in ((32, 8, 128, 128), (32, 8, 64, 64), (8, 1, 256, 256), (32, 32, 80, 32))
    ]


CALLS: dict[str, list[Call]] = {
    "gated_activation": _gates(),
    "linear_cross_entropy": _losses(),
    "prefix_attention": _attentions(),
    "prefix_concat": _concats(),
    "rotary": _rotaries(),
}
