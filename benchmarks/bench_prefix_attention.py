"""prefix_attention against expand + cat + SDPA: time, its limit, and peak memory.

    python benchmarks/bench_prefix_attention.py --json prefix_attention.json
    pytest benchmarks/bench_prefix_attention.py --benchmark-only

Peers: `expand+cat+SDPA` is the stock way: rows padded to the longest, the prefix expanded over them and concatenated,
one call of torch's scaled_dot_product_attention with the mask that needs. `dense` is ptengine's twin for the same
padded batch, `packed` its main form, without padding. Random data; gradients of queries, keys, values and prefix, or of
the prefix alone as in the first layer of a frozen backbone.

The limit is the larger of two: the matrix products (4 H D per query and key it must see, causal part halved, prefix
part not, padding not counted; the backward is 2.5 times the forward) at the rate of a large product, and the bytes that
must move (every operand and result once, the prefix once for all rows) at the rate of a large copy; both rates are
measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from op_timing import arguments, compare, copy_rate, matmul_rate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

Phase = Literal["forward", "forward+backward", "first layer"]

# 32 rows distributed like SST-2 behind a GPT-2-like BPE: mean 28, longest 58.
SST2 = (12, 58, 25, 31, 9, 44, 28, 17, 36, 22, 30, 14, 51, 27, 19, 33, 24, 40, 11, 29, 47, 21, 26, 38, 16, 35, 20, 32,
        13, 42, 23, 28)  # fmt: skip


@dataclass(frozen=True)
class Case:
    label: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    virtual: int
    phase: Phase = "forward+backward"

    @property
    def name(self) -> str:
        shape = f"B={len(self.lengths)} H={self.heads}/{self.kv_heads} D={self.dim} P={self.virtual}"
        return f"{shape} {self.label} {self.phase}"

    def limit_seconds(self, flops_per_second: float, bytes_per_second: float, itemsize: int) -> float:
        total = sum(self.lengths)
        of_prefix = total * self.virtual
        of_rows = sum(length**2 for length in self.lengths) / 2
        pairs = {
            "forward": of_prefix + of_rows,
            "forward+backward": 3.5 * (of_prefix + of_rows),
            "first layer": 3.5 * of_prefix + of_rows,
        }[self.phase]
        tensors = total * (2 * self.heads + 2 * self.kv_heads) + 2 * self.virtual * self.kv_heads
        moved = tensors * self.dim * itemsize * (1 if self.phase == "forward" else 2)
        return max(4 * self.heads * self.dim * pairs / flops_per_second, moved / bytes_per_second)


CASES = [
    Case(label, lengths, heads, kv_heads, dim, virtual, phase)
    for label, lengths, heads, kv_heads, dim, virtual in (
        ("T=64", (64,) * 8, 12, 12, 64, 100),
        ("T=32", (32,) * 16, 12, 12, 64, 100),
        ("SST-2", SST2, 12, 12, 64, 100),
        ("T=64", (64,) * 8, 16, 4, 128, 16),
        ("T=256", (256,) * 4, 12, 12, 64, 16),
    )
    for phase in ("forward", "forward+backward", "first layer")
]
PYTEST_CASES = [case for case in CASES if case.virtual == 100 and case.phase != "first layer"]


def stock(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The prefix in front of every row; causality hides padding on the right."""
    batch, longest, size = len(case.lengths), max(case.lengths), case.virtual
    mask = torch.ones(longest, size + longest, dtype=torch.bool, device=device).tril(size)

    def run(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        keys, values = (
            torch.cat([p.transpose(0, 1).expand(batch, -1, -1, -1), x], dim=2)
            for p, x in ((prefix_k, k), (prefix_v, v))
        )
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=case.heads != case.kv_heads)

    return run


def dense(case: Case, device: torch.device) -> Callable[..., Tensor]:
    padded = len(set(case.lengths)) > 1
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device) if padded else None
    return lambda *operands: prefix_attention(*operands, key_lengths=lengths)  # type: ignore[return-value]


def packed(case: Case, device: torch.device) -> Callable[..., Tensor]:
    bounds = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(case.lengths)
    return lambda *operands: prefix_attention_varlen(*operands, bounds, longest)  # type: ignore[return-value]


CONTENDERS = {"expand+cat+SDPA": stock, "ptengine dense": dense, "ptengine packed": packed}


def prepare(case: Case, contender: str, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own, in the layout it takes."""
    generator = torch.Generator().manual_seed(0)
    total, longest = sum(case.lengths), max(case.lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, case.dim, generator=generator).to(device, dtype)

    if contender == "ptengine packed":
        rows = [random(total, case.heads), random(total, case.kv_heads), random(total, case.kv_heads)]
        of_out = random(total, case.heads)
    else:
        batch = len(case.lengths)
        rows = [random(batch, longest, heads).transpose(1, 2) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        of_out = random(batch, longest, case.heads).transpose(1, 2)
        for row, length in enumerate(case.lengths):
            of_out[row, :, length:] = 0  # no loss reads padding
    prefix = [random(case.virtual, case.kv_heads) for _ in range(2)]
    function = CONTENDERS[contender](case, device)

    def run() -> Any:
        if case.phase == "forward":
            with torch.no_grad():
                return function(*rows, *prefix)
        leaves = [x.detach().requires_grad_() for x in prefix]
        own = [x.detach().requires_grad_(case.phase != "first layer") for x in rows]
        wanted = leaves if case.phase == "first layer" else own + leaves
        return torch.autograd.grad(function(*own, *leaves), wanted, of_out)

    return run


def main() -> None:
    options = arguments(__doc__ or "", repeats=21)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    flops, copied = matmul_rate(device, dtype), copy_rate(device)
    compare(
        options,
        CASES,
        CONTENDERS,
        "expand+cat+SDPA",
        lambda case, name: prepare(case, name, device, dtype),
        lambda case: case.limit_seconds(flops, copied, dtype.itemsize),
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_prefix_attention(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, contender, torch.device("cpu"), torch.float32)
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)


if __name__ == "__main__":
    main()
