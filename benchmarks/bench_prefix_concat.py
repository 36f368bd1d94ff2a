"""prefix_concat against expand + cat: time, its limit, and peak memory.

    python benchmarks/bench_prefix_concat.py --json prefix_concat.json
    pytest benchmarks/bench_prefix_concat.py --benchmark-only

Peers: `expand+cat` hands torch.cat a view of the shared prefix; `repeat+cat` copies it into every row first, as stock
prefix tuning does. Random data. The limit is the bytes that must move (prefix and rows read, result written; for the
gradients the same the other way round) at the rate of a large copy on the device, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from op_timing import arguments, compare, copy_rate

from ptengine.kernels.prefix_concat import prefix_concat


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    virtual: int
    length: int
    dim: int
    prompts: int | None = None
    backward: bool = True

    @property
    def name(self) -> str:
        many = "" if self.prompts is None else f" N={self.prompts}"
        phase = "forward+backward" if self.backward else "forward"
        return f"B={self.batch} H={self.heads} P={self.virtual} T={self.length} D={self.dim}{many} {phase}"

    def bytes_moved(self, itemsize: int) -> int:
        token = self.heads * self.dim * itemsize
        read = token * (self.virtual * (self.prompts or 1) + self.batch * self.length)
        written = token * self.batch * (self.virtual + self.length)
        return (2 if self.backward else 1) * (read + written)


CASES = [
    Case(32, 12, 100, 58, 64, backward=False),
    Case(32, 12, 100, 58, 64),
    Case(32, 12, 100, 58, 64, prompts=32),
    Case(8, 12, 100, 64, 64),
    Case(8, 8, 16, 512, 128),
]
PYTEST_CASES = [Case(32, 12, 100, 58, 64), Case(8, 12, 100, 64, 64)]


def expand_cat(prefix: torch.Tensor, rows: torch.Tensor, *, prompt_ids: torch.Tensor | None) -> torch.Tensor:
    shared = prefix.transpose(0, 1).expand(rows.shape[0], -1, -1, -1) if prompt_ids is None else None
    return torch.cat([prefix[prompt_ids].transpose(1, 2) if shared is None else shared, rows], dim=2)


def repeat_cat(prefix: torch.Tensor, rows: torch.Tensor, *, prompt_ids: torch.Tensor | None) -> torch.Tensor:
    copied = prefix.repeat(rows.shape[0], 1, 1, 1) if prompt_ids is None else prefix[prompt_ids]
    return torch.cat([copied.transpose(1, 2), rows], dim=2)


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {
    "expand+cat": expand_cat,
    "repeat+cat": repeat_cat,
    "ptengine": prefix_concat,
}


def prepare(case: Case, function: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.virtual, case.heads, case.dim)
    ids = None if case.prompts is None else torch.randint(case.prompts, (case.batch,), generator=generator).to(device)
    prefix = torch.randn(shape if case.prompts is None else (case.prompts, *shape), generator=generator)
    rows = torch.randn(case.batch, case.length, case.heads, case.dim, generator=generator).to(device, dtype)
    of_out = torch.randn(case.batch, case.heads, case.virtual + case.length, case.dim, generator=generator)
    prefix, of_out, rows = prefix.to(device, dtype), of_out.to(device, dtype), rows.transpose(1, 2)

    def run() -> Any:
        if not case.backward:
            with torch.no_grad():
                return function(prefix, rows, prompt_ids=ids)
        leaves = prefix.detach().requires_grad_(), rows.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves, prompt_ids=ids), leaves, of_out)

    return run


def main() -> None:
    options = arguments(__doc__ or "", repeats=51)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate = copy_rate(device)
    compare(
        options,
        CASES,
        CONTENDERS,
        "expand+cat",
        lambda case, name: prepare(case, CONTENDERS[name], options.device, dtype),
        lambda case: case.bytes_moved(dtype.itemsize) / rate,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_prefix_concat(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, CONTENDERS[contender], "cpu", torch.float32)
    benchmark.pedantic(run, rounds=50, warmup_rounds=3)


if __name__ == "__main__":
    main()
