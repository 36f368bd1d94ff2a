"""Every kernel once, forward and backward, on tiny ragged shapes: what runs under compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_case.py
    TRITON_INTERPRET=1 python benchmarks/sanitize_case.py --device cpu

Checks nothing but that results are finite; the tests do. A first run without the sanitizer fills Triton's cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ptengine.kernels.linear_cross_entropy import linear_cross_entropy
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen
from ptengine.kernels.prefix_concat import prefix_concat, prefix_concat_paged, prefix_concat_varlen

LENGTHS = (17, 0, 33, 1)


class Maker:
    """Random tensors, from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.noise(*shape).requires_grad_()

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def bounds(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)


def _backward(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def attention_apart(make: Maker) -> list[Tensor]:
    leaves = [make.leaf(sum(LENGTHS), heads, 64) for heads in (4, 2, 2)] + [make.leaf(2, 19, 2, 64) for _ in range(2)]
    out = prefix_attention_varlen(
        *leaves, make.bounds(LENGTHS), max(LENGTHS), prompt_ids=make.index(0, 1, -1, 1),
        prefix_lengths=make.index(19, 5), backend="triton",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return _backward(out, leaves)


def attention_rows(make: Maker) -> list[Tensor]:
    lengths = (9, *LENGTHS)
    leaves = [make.leaf(sum(lengths), heads, 64) for heads in (4, 2, 2)]
    out = prefix_attention_varlen(
        *leaves, None, None, make.bounds(lengths), max(lengths), prefix_rows=make.index(-1, 0, 0, 0, 0),
        window=11, backend="triton",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return _backward(out, leaves)


def attention_dense(make: Maker) -> list[Tensor]:
    leaves = [make.leaf(3, heads, 21, 80) for heads in (4, 2, 2)] + [make.leaf(7, 2, 80) for _ in range(2)]
    bounds = {"key_starts": make.index(0, 3, 20), "key_lengths": make.index(21, 18, 21)}
    out = prefix_attention(*leaves, backend="triton", **bounds)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return _backward(out, leaves)


def attention_decode(make: Maker) -> list[Tensor]:
    q, k, v = make.noise(3, 4, 1, 64), make.noise(3, 2, 90, 64), make.noise(3, 2, 90, 64)
    out = prefix_attention(q, k, v, make.noise(33, 2, 64), make.noise(33, 2, 64), backend="triton")
    assert isinstance(out, Tensor)
    return [out]


def cross_entropy(make: Maker) -> list[Tensor]:
    hidden, weight = make.leaf(19, 48), make.noise(301, 48)
    labels = torch.arange(19, device=make.device) * 7
    return _backward(linear_cross_entropy(hidden, weight, labels, backend="triton"), [hidden])


def concat_dense(make: Maker) -> list[Tensor]:
    prefix, rows = make.leaf(2, 5, 2, 16), make.leaf(3, 2, 7, 16)
    cos, sin = make.noise(7, 8), make.noise(7, 8)
    ids = make.index(1, 0, 1)
    return _backward(prefix_concat(prefix, rows, prompt_ids=ids, cos=cos, sin=sin, backend="triton"), [prefix, rows])


def concat_varlen(make: Maker) -> list[Tensor]:
    prefix, rows = make.leaf(2, 5, 2, 16), make.leaf(sum(LENGTHS), 2, 16)
    ids, sizes = make.index(1, 0, -1, 1), make.index(5, 2)
    out, _ = prefix_concat_varlen(
        prefix, rows, make.bounds(LENGTHS), max(LENGTHS), prompt_ids=ids, prefix_lengths=sizes,
        out_tokens=sum(LENGTHS) + 2 + 5 + 2, backend="triton",
    )  # fmt: skip
    return _backward(out, [prefix, rows])


def concat_paged(make: Maker) -> list[Tensor]:
    cache = make.noise(7, 4, 2, 16)
    table = torch.arange(6, dtype=torch.int32, device=make.device).view(2, 3)
    prefix_concat_paged(make.noise(3, 2, 16), make.noise(2, 2, 8, 16), cache, table, backend="triton")
    return [cache]


CASES: tuple[Callable[[Maker], list[Tensor]], ...] = (
    attention_apart, attention_rows, attention_dense, attention_decode, cross_entropy, concat_dense, concat_varlen,
    concat_paged,
)  # fmt: skip


def main() -> None:
    names = [case.__name__ for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: bfloat16 on CUDA")
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    for case in CASES:
        if options.only is None or case.__name__ in options.only:
            results = case(Maker(device, dtype))
            bad = [i for i, x in enumerate(results) if not bool(x.isfinite().all())]
            if bad:
                raise SystemExit(f"{case.__name__}: expected finite results, got others in {bad} of {len(results)}")
            print(f"{case.__name__}: ran", flush=True)


if __name__ == "__main__":
    main()
