"""prefix_attention against the stock ways: time, its limit, and peak memory.

    python benchmarks/bench_prefix_attention.py --json prefix_attention.json --csv rows.csv --png plots.png
    python benchmarks/bench_prefix_attention.py --device cuda --seconds 120 --heads 32/8/128 --graph
    pytest benchmarks/bench_prefix_attention.py --benchmark-only

Stock ways: rows padded to the longest, the prefix expanded over them and concatenated, then torch's
scaled_dot_product_attention with the mask that needs; on CUDA through each of its backends by name, through compiled
FlexAttention and through plain products; and, as prompt tuning runs it, causal attention of rows that hold the virtual
tokens themselves (`in every row`), which needs neither expansion nor mask but also computes those tokens in every row.
A ratio is against the fastest of them. `dense` is ptengine's twin for the same padded batch, `packed` its main form,
without padding; in `rows` the prompt is a row of the packed batch, its own queries computed once. Random data;
gradients of queries, keys, values and prefix, or of the prefix alone as in the first layer of a frozen backbone.

The limit is the larger of two: the matrix products (4 H D per query and key it must see, causal part halved, prefix
part not, padding not counted; the backward is 2.5 times the forward) at the rate of a large product, and the bytes that
must move (every operand and result once, the prefix once for all rows) at the rate of a large copy; both rates are
measured in the same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Literal

import bench_plots
import pytest
import torch
from op_timing import Refused, arguments, compare, copy_rate, first_line, matmul_rate, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen

Phase = Literal["forward", "backward", "forward+backward", "first layer"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

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
    def shape(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.dim}"

    @property
    def name(self) -> str:
        shape = f"B={len(self.lengths)} H={self.heads}/{self.kv_heads} D={self.dim} P={self.virtual}"
        return f"{shape} {self.label} {self.phase}"

    @property
    def flops(self) -> float:
        """Of the two matrix products of every query and key it must see."""
        of_prefix = sum(self.lengths) * self.virtual
        of_rows = sum(length**2 for length in self.lengths) / 2
        pairs = {
            "forward": of_prefix + of_rows,
            "backward": 2.5 * (of_prefix + of_rows),
            "forward+backward": 3.5 * (of_prefix + of_rows),
            "first layer": 3.5 * of_prefix + of_rows,
        }[self.phase]
        return 4 * self.heads * self.dim * pairs

    def limit_seconds(self, flops_per_second: float, bytes_per_second: float, itemsize: int) -> float:
        total, prefix = sum(self.lengths), 2 * self.virtual * self.kv_heads
        once = total * (2 * self.heads + 2 * self.kv_heads) + prefix
        moved = {"forward": once, "backward": 2 * once - total * self.heads}.get(self.phase, 2 * once)
        return max(self.flops / flops_per_second, moved * self.dim * itemsize / bytes_per_second)

    def describe(self) -> dict[str, Any]:
        return {
            "B": len(self.lengths), "T": max(self.lengths), "P": self.virtual, "heads": self.shape,
            "phase": self.phase, "flops": self.flops,
        }  # fmt: skip


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

_SHAPES = ("32/8/128", "12/12/64", "16/16/256")
_VIRTUAL = (128, 16, 512, 64, 256)  # the most telling first
_LENGTHS = (64, 512, 2048, 128, 256, 1024, 32, 4096)
_TELLING = 3  # so many of each come before all others
_TOKENS = 16384
_SWEEP_PHASES: tuple[Phase, ...] = ("forward+backward", "forward", "backward")
_LARGEST_SCORES = 4 * 2**30  # bytes of the scores that the plain products may hold


def sweep() -> list[Case]:
    """The cases on CUDA, of about as many tokens each; phase by phase, of each the telling ones of all shapes first."""

    def rank(case: Case) -> tuple[int, bool]:
        return _SWEEP_PHASES.index(case.phase), not telling(case)

    cases = []
    for shape, virtual, length, phase in product(_SHAPES, _VIRTUAL, _LENGTHS, _SWEEP_PHASES):
        heads, kv_heads, dim = map(int, shape.split("/"))
        cases.append(Case(f"T={length}", (length,) * (_TOKENS // length), heads, kv_heads, dim, virtual, phase))
    return sorted(cases, key=rank)


def telling(case: Case) -> bool:
    return case.virtual in _VIRTUAL[:_TELLING] and max(case.lengths) in _LENGTHS[:_TELLING]


def lower_right(case: Case, device: torch.device) -> Tensor:
    """bool [T, P + T]; causality hides padding on the right."""
    size, longest = case.virtual, max(case.lengths)
    return torch.ones(longest, size + longest, dtype=torch.bool, device=device).tril(size)


def repeated(case: Case, x: Tensor) -> Tensor:
    """Keys or values of a group's heads side by side, as stock models make them where a backend knows no groups."""
    return x.repeat_interleave(case.heads // case.kv_heads, dim=1)


def chosen_by_torch(case: Case, device: torch.device) -> list[Attention]:
    mask, grouped = lower_right(case, device), case.heads != case.kv_heads
    return [lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)]


def through(backend: SDPBackend) -> Callable[[Case, torch.device], list[Attention]]:
    """One backend of torch's attention, in the ways it may take this mask and these heads, the best first."""

    def ways(case: Case, device: torch.device) -> list[Attention]:
        mask, grouped = lower_right(case, device), case.heads != case.kv_heads
        bias: Any = causal_lower_right(*mask.shape)
        biases = [mask] if backend == SDPBackend.CUDNN_ATTENTION else [bias, mask]

        def way(mask: Any, repeat: bool) -> Attention:
            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if repeat:
                    k, v = repeated(case, k), repeated(case, v)
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped and not repeat)

            return run

        return [way(mask, repeat) for mask in biases for repeat in ((False, True) if grouped else (False,))]

    return ways


def flex(case: Case, device: torch.device) -> list[Attention]:
    if device.type == "cuda" and not (telling(case) and case.virtual == _VIRTUAL[0]):
        raise Refused(f"compiled, half a minute each, at P={_VIRTUAL[0]} and T in {_LENGTHS[:_TELLING]} only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, longest = case.virtual, max(case.lengths)
    mask = create_block_mask(
        lambda b, h, q, k: k <= q + size, B=None, H=None, Q_LEN=longest, KV_LEN=size + longest, device=device
    )
    run = compiled_flex() if device.type == "cuda" else flex_attention
    return [lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)]


@lru_cache
def compiled_flex() -> Any:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 1000  # each shape is compiled for itself
    return torch.compile(flex_attention, dynamic=False)


def plain_products(case: Case, device: torch.device) -> list[Attention]:
    """As transformers' eager attention."""
    longest = max(case.lengths)
    if len(case.lengths) * case.heads * longest * (case.virtual + longest) * 4 > _LARGEST_SCORES:
        raise Refused("its scores would not fit")
    mask = lower_right(case, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, repeated(case, k).transpose(2, 3)) * case.dim**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, repeated(case, v))

    return [run]


def square(backend: SDPBackend) -> Callable[[Case, torch.device], list[Attention]]:
    """Causal attention of rows that hold the virtual tokens themselves."""

    def ways(case: Case, device: torch.device) -> list[Attention]:
        def run(q: Tensor, k: Tensor, v: Tensor, repeat: bool = False) -> Tensor:
            if repeat:
                k, v = repeated(case, k), repeated(case, v)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads and not repeat
                )

        return [run, lambda q, k, v: run(q, k, v, True)]

    return ways


STOCK: dict[str, Callable[[Case, torch.device], list[Attention]]] = {
    "expand+cat+SDPA": chosen_by_torch,
    "expand+cat cuDNN": through(SDPBackend.CUDNN_ATTENTION),
    "expand+cat flash": through(SDPBackend.FLASH_ATTENTION),
    "expand+cat efficient": through(SDPBackend.EFFICIENT_ATTENTION),
    "expand+cat Flex": flex,
    "expand+cat eager": plain_products,
    "in every row, cuDNN": square(SDPBackend.CUDNN_ATTENTION),
    "in every row, flash": square(SDPBackend.FLASH_ATTENTION),
}
OURS = ("ptengine dense", "ptengine packed", "ptengine rows")
# On CUDA, where a case is not telling, only these run: no other stock way is ever the fastest there.
_EVERYWHERE = ("expand+cat cuDNN", "expand+cat flash", "in every row, cuDNN", "in every row, flash", *OURS[1:])
CPU_CONTENDERS = ("expand+cat+SDPA", *OURS)
CONTENDERS = (*STOCK, *OURS)


@dataclass(frozen=True)
class Operands:
    """A function, its arguments, and the gradient that comes to its result."""

    tensors: list[Tensor]
    rows: int  # how many of them, the first ones, belong to rows
    of_out: Tensor
    function: Callable[..., Tensor]


def operands(case: Case, contender: str, device: torch.device, dtype: torch.dtype) -> Operands:
    """Random operands of a contender's own, in the layout it takes."""
    generator = torch.Generator(device).manual_seed(0)
    longest, batch, size = max(case.lengths), len(case.lengths), case.virtual
    heads = (case.heads, case.kv_heads, case.kv_heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, case.dim, generator=generator, device=device).to(dtype)

    if contender in ("ptengine packed", "ptengine rows"):
        in_rows = contender == "ptengine rows"
        lengths = ((size,) if in_rows else ()) + case.lengths
        rows = [random(sum(lengths), x) for x in heads]
        prefix = [] if in_rows else [random(size, case.kv_heads) for _ in range(2)]
        of_out = random(sum(lengths), case.heads)
        if in_rows:
            of_out[:size] = 0  # no loss reads the prompt's own results, in this layer
        function = packed(lengths, in_rows, device)
    else:
        in_rows = contender.startswith("in every row")
        span = longest + size if in_rows else longest
        rows = [random(batch, span, x).transpose(1, 2) for x in heads]
        prefix = [] if in_rows else [random(size, case.kv_heads) for _ in range(2)]
        of_out = random(batch, span, case.heads).transpose(1, 2)
        for row, length in enumerate(case.lengths):
            of_out[row, :, span - longest + length :] = 0  # no loss reads padding
        of_out[:, :, : span - longest] = 0
        function = dense(case, device) if contender == "ptengine dense" else stock(case, contender, device)
    if case.phase == "first layer" and not prefix:
        raise Refused("the prompt's keys and values are not apart from the rows'")
    return Operands([*rows, *prefix], len(rows), of_out, function)


def stock(case: Case, contender: str, device: torch.device) -> Callable[..., Tensor]:
    """The first way of a contender that takes the case; which one, a run in advance finds out."""
    ways, batch = STOCK[contender](case, device), len(case.lengths)
    chosen: list[Attention] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if chosen:
            return chosen[0](q, k, v)
        for way in ways:
            try:
                out = way(q, k, v)
            except RuntimeError as error:
                reason = first_line(error)
                continue
            chosen.append(way)
            return out
        raise Refused(reason)

    def run(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
        if prefix:
            k, v = (
                torch.cat([p.transpose(0, 1).expand(batch, -1, -1, -1), x], dim=2)
                for p, x in zip(prefix, (k, v), strict=True)
            )
        return attend(q, k, v)

    return run


def dense(case: Case, device: torch.device) -> Callable[..., Tensor]:
    padded = len(set(case.lengths)) > 1
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device) if padded else None
    return lambda *operands: prefix_attention(*operands, key_lengths=lengths)  # type: ignore[return-value]


def packed(lengths: Sequence[int], in_rows: bool, device: torch.device) -> Callable[..., Tensor]:
    """With `in_rows` the first row is the prompt that all others read."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    if not in_rows:
        return lambda *operands: prefix_attention_varlen(*operands, bounds, longest)  # type: ignore[return-value]
    sources = torch.tensor([-1] + [0] * (len(lengths) - 1), dtype=torch.int32, device=device)
    return lambda q, k, v: prefix_attention_varlen(  # type: ignore[return-value]
        q, k, v, None, None, bounds, longest, prefix_rows=sources
    )


def prepare(case: Case, contender: str, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One run of a contender on random operands of its own."""
    if device.type == "cuda" and not telling(case) and contender not in _EVERYWHERE:
        raise Refused(f"measured at P in {_VIRTUAL[:_TELLING]} and T in {_LENGTHS[:_TELLING]} only")
    given = operands(case, contender, device, dtype)
    frozen = given.rows if case.phase == "first layer" else 0

    def leaves() -> list[Tensor]:
        return [x.detach().requires_grad_(i >= frozen) for i, x in enumerate(given.tensors)]

    def forward() -> Any:
        with torch.no_grad():
            return given.function(*given.tensors)

    def both() -> Any:
        own = leaves()
        return torch.autograd.grad(given.function(*own), own[frozen:], given.of_out)

    if case.phase == "forward":
        return forward
    if case.phase != "backward":
        return both
    kept = leaves()
    out = given.function(*kept)
    return lambda: torch.autograd.grad(out, kept, given.of_out, retain_graph=True)


def warm(
    cases: Sequence[Case], contenders: Sequence[str], processes: int, device: torch.device, dtype: str, seconds: float
) -> None:
    """Compile in processes of their own, side by side, what the sweep will run, into the caches on disk."""
    waiting = list(product(sorted({case.shape for case in cases}, key=_SHAPES.index), contenders))
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + seconds
    try:
        while (waiting or running) and time.monotonic() < deadline:
            running = [process for process in running if process.poll() is None]
            while waiting and len(running) < processes:
                shape, contender = waiting.pop(0)
                command = [sys.executable, __file__, "--heads", shape, "--warm-one", contender, "--dtype", dtype]
                running.append(subprocess.Popen([*command, "--device", str(device)], stdout=subprocess.DEVNULL))
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def warm_one(cases: Sequence[Case], contender: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run the most telling cases of one contender once; what fails here fails, and is recorded, in the sweep too."""
    for case in cases:
        if telling(case) and case.phase != "backward":
            try:
                prepare(case, contender, device, dtype)()
                synchronize(device)
            except Exception as error:
                print(f"{case.name}: {first_line(error)}", file=sys.stderr)


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", choices=_SHAPES, help="on CUDA: the cases of this shape alone (H/H_kv/D)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help="these contenders alone")
    parser.add_argument("--warm", type=int, metavar="N", help="on CUDA: compile in N processes before measuring")
    parser.add_argument("--warm-one", choices=CONTENDERS, metavar="NAME", help=argparse.SUPPRESS)


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    bench_plots.prefix_attention(path, rows, title, peers=tuple(STOCK), ours=OURS)


def main() -> None:
    options = arguments(__doc__ or "", repeats=21, extend=extend)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    on_cuda = device.type == "cuda"
    cases = [case for case in sweep() if options.heads in (None, case.shape)] if on_cuda else CASES
    contenders = [
        name for name in (CONTENDERS if on_cuda else CPU_CONTENDERS) if options.only is None or name in options.only
    ]
    if options.warm_one is not None:
        return warm_one(cases, options.warm_one, device, dtype)
    if on_cuda and options.warm:
        limit = float("inf") if options.seconds is None else options.seconds / 3
        warm(cases, contenders, options.warm, device, options.dtype, limit)
    flops, copied = matmul_rate(device, dtype), copy_rate(device)
    return compare(
        options,
        cases,
        contenders,
        [name for name in contenders if name in STOCK],
        lambda case, name: prepare(case, name, device, dtype),
        lambda case: case.limit_seconds(flops, copied, dtype.itemsize),
        describe=Case.describe,
        draw=draw,
    )


@pytest.mark.parametrize("contender", CPU_CONTENDERS)
@pytest.mark.parametrize("case", PYTEST_CASES, ids=lambda case: case.name)
def test_prefix_attention(benchmark: Any, case: Case, contender: str) -> None:
    benchmark.group = case.name
    run = prepare(case, contender, torch.device("cpu"), torch.float32)
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)


if __name__ == "__main__":
    main()
