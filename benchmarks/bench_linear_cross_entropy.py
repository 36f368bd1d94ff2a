"""linear_cross_entropy against F.linear + F.cross_entropy: time, its limit, and peak memory.

    python benchmarks/bench_linear_cross_entropy.py --json linear_cross_entropy.json
    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only

The head is frozen on both sides; only hidden's gradient is taken. Random data. Where they are installed, torch's own
linear_cross_entropy and Liger's fused one run too; a ratio is against the fastest of the peers. The limit is the larger
of the matrix work (2 n d V operations forward, as many for the gradient) at the rate a large square product reaches on
the device, and the weight read once at the rate of a large copy, both measured in the same run. Peak memory is above
the operands, the gradient included.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_timing import arguments, compare, copy_rate, matmul_rate

from ptengine.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    vocabulary: int
    backward: bool = True

    @property
    def name(self) -> str:
        phase = "forward+backward" if self.backward else "forward"
        return f"n={self.rows} d={self.width} V={self.vocabulary} {phase}"

    @property
    def operations(self) -> int:
        return (4 if self.backward else 2) * self.rows * self.width * self.vocabulary

    def limit_seconds(self, flops_per_second: float, bytes_per_second: float, itemsize: int) -> float:
        moved = self.vocabulary * self.width + (2 if self.backward else 1) * self.rows * self.width
        return max(self.operations / flops_per_second, moved * itemsize / bytes_per_second)

    def describe(self) -> dict[str, Any]:
        return {
            "n": self.rows, "d": self.width, "V": self.vocabulary,
            "phase": "forward+backward" if self.backward else "forward", "flops": self.operations,
        }  # fmt: skip


# GPT-2 small's head: a step with every token labelled, one with a label or two a row; then a Llama-like one.
CASES = [
    Case(512, 768, 50257),
    Case(512, 768, 50257, backward=False),
    Case(2048, 768, 50257),
    Case(32, 768, 50257),
    Case(8, 768, 50257),
    Case(128, 2048, 32000),
]
# Llama-3-8B's head with every token of a step labelled, a quarter of them, and one in each of 32 rows.
CUDA_CASES = [
    Case(2048, 4096, 128256),
    Case(2048, 4096, 128256, backward=False),
    Case(32, 4096, 128256),
    Case(512, 4096, 128256),
    Case(8192, 4096, 128256),
    Case(2048, 768, 50257),
    Case(32, 768, 50257),
    Case(8192, 2048, 32000),
]
PYTEST_CASES = [Case(512, 768, 50257), Case(32, 768, 50257)]


def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The stock computation: logits in the backbone's dtype, loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


STOCK = "F.linear+F.cross_entropy"
CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {STOCK: stock, "ptengine": linear_cross_entropy}


def contenders(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Those that are installed and run on the device."""
    found = dict(CONTENDERS)
    if hasattr(F, "linear_cross_entropy"):  # not in every version of torch
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        found["Liger"] = liger
    return found


def prepare(case: Case, function: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(case.rows, case.width, generator=generator, device=device).to(dtype)
    weight = (0.02 * torch.randn(case.vocabulary, case.width, generator=generator, device=device)).to(dtype)
    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=device)

    def run() -> Any:
        if not case.backward:
            with torch.no_grad():
                return function(hidden, weight, labels)
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, weight, labels), leaf)

    return run


def main() -> None:
    options = arguments(__doc__ or "", repeats=9)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate, copied = matmul_rate(device, dtype), copy_rate(device)
    found = contenders(device)
    compare(
        options,
        CUDA_CASES if device.type == "cuda" else CASES,
        found,
        [name for name in found if name != "ptengine"],
        lambda case, name: prepare(case, found[name], options.device, dtype),
        lambda case: case.limit_seconds(rate, copied, dtype.itemsize),
        describe=Case.describe,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_linear_cross_entropy(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, CONTENDERS[contender], "cpu", torch.float32)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
