"""Inputs for the tests of prefix_attention, and an oracle of their own: expand, concatenate, mask, softmax.

Nothing here shares code with the operation, so that a mistake in its rules is not repeated in its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LENGTHS = (17, 0, 64, 1, 129)
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Every keyword that changes scores, and some of them together; made for a number of query heads.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda heads: {},
    "bidirectional": lambda heads: {"causal": False},
    "scale": lambda heads: {"scale": 0.7},
    "window": lambda heads: {"window": 9},
    "window of one": lambda heads: {"window": 1},
    "window, prefix in view": lambda heads: {"window": 9, "window_includes_prefix": False},
    "bidirectional window": lambda heads: {"causal": False, "window": 9},
    "softcap": lambda heads: {"softcap": 1.5},
    "sinks": lambda heads: {"sinks": torch.linspace(-1.0, 2.0, heads)},
    "alibi": lambda heads: {"alibi_slopes": 0.5 ** torch.arange(1, heads + 1).float()},
    "bidirectional alibi": lambda heads: {"causal": False, "alibi_slopes": 0.5 ** torch.arange(1, heads + 1).float()},
    "relative bias": lambda heads: {"relative_bias": torch.sin(torch.arange(heads * 41.0)).view(heads, 41)},
    "everything": lambda heads: {
        "causal": False, "window": 20, "softcap": 2.0, "sinks": torch.linspace(0.5, 1.0, heads), "scale": 0.3,
        "alibi_slopes": 0.5 ** torch.arange(1, heads + 1).float(),
        "relative_bias": torch.cos(torch.arange(heads * 41.0)).view(heads, 41),
    },
}  # fmt: skip


def cumulative(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens, int32 [rows + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Reproducible normal numbers that every dtype represents exactly when they are rounded to it first."""
    generator = torch.Generator().manual_seed(seed * 1000003 + sum(n * 31**i for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def packed(
    lengths: Sequence[int] = LENGTHS,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q [total, H, D], k [total, H_kv, D], v [total, H_kv, D_v]."""
    total = sum(lengths)
    return [
        noise(total, heads[0], dim, dtype=dtype, seed=1),
        noise(total, heads[1], dim, dtype=dtype, seed=2),
        noise(total, heads[1], dim_v or dim, dtype=dtype, seed=3),
    ]


def prefixes(
    *shape: int, heads: tuple[int, int] = (4, 2), dim: int = 16, dim_v: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    """prefix_k [*shape, H_kv, D] and prefix_v [*shape, H_kv, D_v]; shape is (P,) or (N, P)."""
    return [
        noise(*shape, heads[1], dim, dtype=dtype, seed=4),
        noise(*shape, heads[1], dim_v or dim, dtype=dtype, seed=5),
    ]


def plain_row(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, first: int = 0, causal: bool = True,
    scale: float | None = None, window: int | None = None, window_includes_prefix: bool = True,
    softcap: float | None = None, sinks: Tensor | None = None, alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One row in the stock way and in the dtype it comes in: q [T, H, D] holds tokens first, first + 1, ... of the
    row's keys [S, H_kv, D]. Returns [T, H, D_v]."""
    num_prefix, num_heads = len(prefix_k), q.shape[1]
    repeat = num_heads // k.shape[1]
    keys = torch.cat([prefix_k, k]).transpose(0, 1).repeat_interleave(repeat, 0)  # [H, P + S, D]
    values = torch.cat([prefix_v, v]).transpose(0, 1).repeat_interleave(repeat, 0)  # [H, P + S, D_v]
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [H, T, P+S]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    row = torch.arange(num_prefix + first, num_prefix + first + len(q)).view(-1, 1)  # where each query stands
    column = torch.arange(keys.shape[1]).view(1, -1)  # where each key stands
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, 1, 1) * (row - column).abs()
    if relative_bias is not None:
        reach = (relative_bias.shape[1] - 1) // 2
        scores = scores + relative_bias.to(scores.dtype)[:, (column - row).clamp(-reach, reach) + reach]
    hide = torch.zeros(len(q), keys.shape[1], dtype=torch.bool)
    if causal:
        hide |= column > row
    if window is not None:
        outside = (column <= row - window) | (column >= row + window)
        hide |= outside if window_includes_prefix else outside & (column >= num_prefix)
    scores = scores.masked_fill(hide, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values).transpose(0, 1)


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, prefix_of_row: Sequence[tuple[Tensor, Tensor] | None], lengths: Sequence[int],
    **options: Any,
) -> Tensor:  # fmt: skip
    """The stock way for packed rows, each with its own (prefix_k [P_n, H_kv, D], prefix_v) or None."""
    outs, start = [], 0
    for length, prefix in zip(lengths, prefix_of_row, strict=True):
        row = slice(start, start + length)
        pk, pv = (k[:0], v[:0]) if prefix is None else prefix
        outs.append(plain_row(q[row], k[row], v[row], pk, pv, **options))
        start += length
    return torch.cat(outs) if outs else q.new_zeros(0, q.shape[1], v.shape[2])


def weights_like(x: Tensor) -> Tensor:
    """A fixed gradient for a result."""
    return noise(*x.shape, dtype=x.dtype, seed=7)


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, weights_like(out), allow_unused=True, materialize_grads=True))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def check_error(
    got: Tensor, stock: Tensor, exact: Tensor, factor: float, what: str = "", size: float | None = None
) -> None:
    """The error against fp64 is at most `factor` times that of plain PyTorch in the same dtype, plus a floor of a few
    roundings of `size`, by default the largest value (more in fp64, where the specification rounds too)."""
    assert got.shape == exact.shape, what
    assert got.isfinite().all(), what
    if not exact.numel():
        return
    error = (got.double() - exact).abs().max().item()
    allowed = (stock.double() - exact).abs().max().item()
    roundings = 64 if got.dtype == torch.float64 else 4
    floor = roundings * torch.finfo(got.dtype).eps * (exact.abs().max().item() if size is None else size)
    assert error <= factor * allowed + floor, f"{what}: error {error:.3g}, stock {allowed:.3g}, floor {floor:.3g}"
