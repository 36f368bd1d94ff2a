"""prefix_concat and its packed twin against expand + cat: time, its limit, and peak memory.

    python benchmarks/bench_prefix_concat.py --json prefix_concat.json
    pytest benchmarks/bench_prefix_concat.py --benchmark-only

Peers: `expand+cat` hands torch.cat a view of the shared prefix, for packed rows once before each; `repeat+cat` copies
it into every row first, as stock prefix tuning does. Where keys are rotated on the way, the peers do it first, as
transformers does. Random data. The limit is the bytes that must move (prefix, rows, cos and sin read, result written;
for the gradients the same the other way round) at the rate of a large copy on the device, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from op_timing import arguments, compare, copy_rate

from ptengine.kernels.prefix_concat import prefix_concat, prefix_concat_varlen


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    virtual: int
    length: int
    dim: int
    prompts: int | None = None
    backward: bool = True
    rotary: bool = False
    packed: bool = False  # rows of evenly spread lengths, T the longest

    @property
    def name(self) -> str:
        many = "" if self.prompts is None else f" N={self.prompts}"
        kind = f"{' packed' if self.packed else ''}{' rotary' if self.rotary else ''}"
        phase = "forward+backward" if self.backward else "forward"
        return f"B={self.batch} H={self.heads} P={self.virtual} T={self.length} D={self.dim}{many}{kind} {phase}"

    @property
    def lengths(self) -> list[int]:
        """Of the rows."""
        return [self.length * (row + 1) // self.batch if self.packed else self.length for row in range(self.batch)]

    def bytes_moved(self, itemsize: int) -> int:
        token, tokens = self.heads * self.dim * itemsize, sum(self.lengths)
        read = token * (self.virtual * (self.prompts or 1) + tokens)
        if self.rotary:
            read += 2 * self.dim * itemsize * (tokens if self.packed else self.length)
        written = token * (self.batch * self.virtual + tokens)
        return (2 if self.backward else 1) * (read + written)


CASES = [
    Case(32, 12, 100, 58, 64, backward=False),
    Case(32, 12, 100, 58, 64),
    Case(32, 12, 100, 58, 64, prompts=32),
    Case(32, 12, 100, 58, 64, rotary=True),
    Case(32, 12, 100, 58, 64, packed=True),
    Case(32, 12, 100, 58, 64, packed=True, prompts=32),
    Case(32, 12, 100, 58, 64, packed=True, rotary=True),
    Case(8, 12, 100, 64, 64),
    Case(8, 8, 16, 512, 128),
]
PYTEST_CASES = [
    Case(32, 12, 100, 58, 64),
    Case(8, 12, 100, 64, 64),
    Case(8, 12, 100, 64, 64, rotary=True),
    Case(8, 12, 100, 64, 64, packed=True),
]


@dataclass(frozen=True)
class Operands:
    """What one run needs beside the prefix and the rows, which may need gradients."""

    case: Case
    prompt_ids: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    cu_seqlens: torch.Tensor

    def turn(self, rows: torch.Tensor) -> torch.Tensor:
        if self.cos is None or self.sin is None:
            return rows
        cos, sin = (x.unsqueeze(-2) if self.case.packed else x for x in (self.cos, self.sin))
        first, second = rows.chunk(2, dim=-1)
        return rows * cos + torch.cat([-second, first], dim=-1) * sin


def expand_cat(prefix: torch.Tensor, rows: torch.Tensor, operands: Operands) -> torch.Tensor:
    ids, rows = operands.prompt_ids, operands.turn(rows)
    if operands.case.packed:
        heads = prefix[ids].unbind() if ids is not None else [prefix] * operands.case.batch
        return _before_each(heads, rows, operands.case)
    shared = prefix.transpose(0, 1).expand(rows.shape[0], -1, -1, -1) if ids is None else None
    return torch.cat([prefix[ids].transpose(1, 2) if shared is None else shared, rows], dim=2)


def repeat_cat(prefix: torch.Tensor, rows: torch.Tensor, operands: Operands) -> torch.Tensor:
    ids, rows = operands.prompt_ids, operands.turn(rows)
    copied = prefix.repeat(operands.case.batch, 1, 1, 1) if ids is None else prefix[ids]
    if operands.case.packed:
        return _before_each(copied.unbind(), rows, operands.case)
    return torch.cat([copied.transpose(1, 2), rows], dim=2)


def ours(prefix: torch.Tensor, rows: torch.Tensor, operands: Operands) -> torch.Tensor:
    options = {"prompt_ids": operands.prompt_ids, "cos": operands.cos, "sin": operands.sin}
    if not operands.case.packed:
        return prefix_concat(prefix, rows, **options)
    tokens = rows.shape[0] + operands.case.batch * operands.case.virtual
    longest = operands.case.length
    return prefix_concat_varlen(prefix, rows, operands.cu_seqlens, longest, out_tokens=tokens, **options)[0]


def _before_each(heads: Sequence[torch.Tensor], rows: torch.Tensor, case: Case) -> torch.Tensor:
    pairs = zip(heads, rows.split(case.lengths), strict=True)
    return torch.cat([piece for pair in pairs for piece in pair])


CONTENDERS: dict[str, Callable[[torch.Tensor, torch.Tensor, Operands], torch.Tensor]] = {
    "expand+cat": expand_cat,
    "repeat+cat": repeat_cat,
    "ptengine": ours,
}


def prepare(case: Case, function: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    many = () if case.prompts is None else (case.prompts,)
    ids = None if case.prompts is None else torch.randint(case.prompts, (case.batch,), generator=generator).to(device)
    prefix = random(*many, case.virtual, case.heads, case.dim)
    total = sum(case.lengths)
    if case.packed:
        rows = random(total, case.heads, case.dim)
        of_out = random(total + case.batch * case.virtual, case.heads, case.dim)
    else:
        rows = random(case.batch, case.length, case.heads, case.dim).transpose(1, 2)
        of_out = random(case.batch, case.heads, case.virtual + case.length, case.dim)
    angles = total if case.packed else case.length
    cos, sin = (random(angles, case.dim) if case.rotary else None for _ in range(2))
    cu_seqlens = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device)
    operands = Operands(case, ids, cos, sin, cu_seqlens)

    def run() -> Any:
        if not case.backward:
            with torch.no_grad():
                return function(prefix, rows, operands)
        leaves = prefix.detach().requires_grad_(), rows.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves, operands), leaves, of_out)

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
