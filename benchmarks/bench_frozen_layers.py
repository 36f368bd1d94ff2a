"""gated_activation and rotary_embedding against a stock Llama layer's formulas, forward and backward.

    python benchmarks/bench_frozen_layers.py --json frozen_layers.json
    python benchmarks/bench_frozen_layers.py --graph        what the device alone takes, without launches
    pytest benchmarks/bench_frozen_layers.py --benchmark-only

The peer, `stock`, is what transformers' modules compute. Random data; queries and keys are slices of one projection.
The limit is the bytes that must move (operands read, results written, for the gradients the same again with the
operands they are computed from) at the rate of a large copy on the device, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_timing import arguments, compare, copy_rate
from torch import Tensor

from ptengine.kernels.gated_activation import gated_activation
from ptengine.kernels.rotary import rotary_embedding


@dataclass(frozen=True)
class Case:
    operation: str
    tokens: int
    width: int  # channels of a token; of a head for rotary
    heads: int = 0
    heads_kv: int = 0
    backward: bool = True

    @property
    def name(self) -> str:
        heads = f" H={self.heads}" if self.heads else ""
        heads += f" H_kv={self.heads_kv}" if self.heads_kv else ""
        phase = "forward+backward" if self.backward else "forward"
        return f"{self.operation} N={self.tokens}{heads} d={self.width} {phase}"

    def elements_moved(self) -> int:
        size = self.tokens * self.width * max(self.heads + self.heads_kv, 1)
        # Of that size, read and written: gate g, u, y; then dy, g, u, dg, du.
        forward, backward = {"gated_activation": (3, 5), "rotary": (2, 2)}[self.operation]
        angles = 2 * self.tokens * self.width if self.operation == "rotary" else 0
        return size * forward + angles + (size * backward + angles if self.backward else 0)


CASES = [
    Case("gated_activation", 2645, 14336),
    Case("rotary", 2645, 128, 32, 8),
    Case("gated_activation", 2645, 14336, backward=False),
    Case("rotary", 2645, 128, 32, 8, backward=False),
    Case("gated_activation", 64, 14336),
    Case("rotary", 64, 128, 32, 8),
]
PYTEST_CASES = [Case("gated_activation", 64, 2048), Case("rotary", 64, 64, 8, 2)]

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def stock_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def stock_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return turn(q), turn(k)


CONTENDERS: dict[str, dict[str, Function]] = {
    "stock": {"gated_activation": stock_gate, "rotary": stock_rotary},
    "ptengine": {
        "gated_activation": gated_activation,
        "rotary": rotary_embedding,
    },
}


def prepare(case: Case, contender: str, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    function = CONTENDERS[contender][case.operation]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    constants: list[Tensor] = []
    if case.operation == "gated_activation":
        inputs = [random(case.tokens, case.width) for _ in range(2)]
    else:
        sizes = (case.heads, case.heads_kv, case.heads_kv)
        inputs = list(random(case.tokens, sum(sizes), case.width).split(sizes, dim=1)[:2])
        constants = [random(case.tokens, case.width) for _ in range(2)]
    of_outs = [random(*x.shape) for x in (inputs[:1] if case.operation == "gated_activation" else inputs)]

    def run() -> Any:
        if not case.backward:
            with torch.no_grad():
                return function(*inputs, *constants)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves, *constants)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, of_outs)

    return run


def main() -> None:
    options = arguments(__doc__ or "", repeats=51)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate = copy_rate(device)
    compare(
        options,
        CASES,
        CONTENDERS,
        "stock",
        lambda case, name: prepare(case, name, options.device, dtype),
        lambda case: case.elements_moved() * dtype.itemsize / rate,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_frozen_layers(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, contender, "cpu", torch.float32)
    benchmark.pedantic(run, rounds=50, warmup_rounds=3)


if __name__ == "__main__":
    main()
