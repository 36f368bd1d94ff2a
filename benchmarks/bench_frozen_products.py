"""A frozen linear layer on a CPU: `ptengine.backbone.frozen_products` against the stock module, forward and backward.

    python benchmarks/bench_frozen_products.py --json frozen_products.json
    pytest benchmarks/bench_frozen_products.py --benchmark-only

Layers of GPT-2 small (transposed weights) and of a Llama: as in generation, one token of every row at a time, and as at
the labelled positions of a batch. The peer, `stock`, is the same module on the library PyTorch calls. The limit is the
time to read the weight, and read the input and write the result, at the rate of a large copy measured in the same run;
a weight that stays in the cache can be beyond it. On a GPU, with more rows than `ptengine.kernels.onednn.MOST_ROWS`,
and where `ptengine doctor` names no oneDNN, both contenders are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from op_timing import arguments, compare, copy_rate
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptengine.backbone.frozen_products import fuse_products


@dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    out: int
    transposed: bool = True
    backward: bool = True

    @property
    def name(self) -> str:
        kind = "Conv1D" if self.transposed else "Linear"
        return f"{kind} N={self.tokens} {self.width}->{self.out} {'forward+backward' if self.backward else 'forward'}"

    def elements_moved(self) -> int:
        once = self.tokens * (self.width + self.out) + self.width * self.out
        return 2 * once if self.backward else once


CASES = [
    Case(1, 768, 3072, backward=False),
    Case(4, 768, 3072, backward=False),
    Case(16, 768, 3072, backward=False),
    Case(32, 768, 3072, backward=False),
    Case(1, 2048, 8192, transposed=False, backward=False),
    Case(4, 2048, 8192, transposed=False, backward=False),
    Case(16, 2048, 8192, transposed=False, backward=False),
    Case(32, 768, 3072),
    Case(32, 3072, 768),
]
PYTEST_CASES = [Case(32, 768, 3072), Case(4, 768, 768, transposed=False, backward=False)]
CONTENDERS = ("stock", "ptengine")


def prepare(case: Case, contender: str, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    torch.manual_seed(0)
    layer = Conv1D(case.out, case.width) if case.transposed else nn.Linear(case.width, case.out)
    layer.requires_grad_(False).to(device, dtype)
    if contender == "ptengine":
        fuse_products(layer)
    x = torch.randn(case.tokens, case.width).to(device, dtype)
    of_out = torch.randn(case.tokens, case.out).to(device, dtype)

    def run() -> Any:
        if not case.backward:
            with torch.no_grad():
                return layer(x)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, of_out)

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
def test_frozen_products(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, contender, "cpu", torch.float32)
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)


if __name__ == "__main__":
    main()
