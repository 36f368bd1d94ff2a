"""linear_cross_entropy against F.linear + F.cross_entropy: time, its limit, and peak memory.

    python benchmarks/bench_linear_cross_entropy.py --json linear_cross_entropy.json
    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only

The head is frozen on both sides; only hidden's gradient is taken. Random data. The limit is the matrix work (2 n d V
operations forward, as many for the gradient) at the rate a large square product reaches on the device, measured in the
same run. Peak memory is above the operands, the gradient included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_timing import arguments, compare, matmul_rate

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


# GPT-2 small's head: a step with every token labelled, one with a label or two a row; then a Llama-like one.
CASES = [
    Case(512, 768, 50257),
    Case(512, 768, 50257, backward=False),
    Case(2048, 768, 50257),
    Case(32, 768, 50257),
    Case(8, 768, 50257),
    Case(128, 2048, 32000),
]
PYTEST_CASES = [Case(512, 768, 50257), Case(32, 768, 50257)]


def peer(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The stock computation: logits in the backbone's dtype, loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {
    "F.linear+F.cross_entropy": peer,
    "ptengine": linear_cross_entropy,
}


def prepare(case: Case, function: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, case.width, generator=generator).to(device, dtype)
    weight = (0.02 * torch.randn(case.vocabulary, case.width, generator=generator)).to(device, dtype)
    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator).to(device)

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
    rate = matmul_rate(device, dtype)
    compare(
        options,
        CASES,
        CONTENDERS,
        "F.linear+F.cross_entropy",
        lambda case, name: prepare(case, CONTENDERS[name], options.device, dtype),
        lambda case: case.operations / rate,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_linear_cross_entropy(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, CONTENDERS[contender], "cpu", torch.float32)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
