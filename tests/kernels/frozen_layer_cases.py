"""What the tests of gated_activation and rotary share: running a function and judging its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ptengine.kernels.launch import DTYPES as KERNEL_DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [dtype for dtype in KERNEL_DTYPES if dtype != torch.float32]
PAIRS = [  # a backend and a dtype that it takes
    *(("triton", dtype) for dtype in KERNEL_DTYPES),
    *((name, dtype) for name in ("reference", "torch") for dtype in (torch.float16, torch.bfloat16, torch.float32)),
    ("torch", torch.float64),
]


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def run(function: Callable[..., Any], inputs: Sequence[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    """Outputs, then the gradients of `inputs`, which are given first and may be strided."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *args, **options)
    outs = out if isinstance(out, tuple) else (out,)
    of_outs = [noise(*x.shape, seed=90 + i, dtype=inputs[0].dtype).to(x.dtype) for i, x in enumerate(outs)]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, of_outs)]


def check(got: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Tensor], outputs: int = 1) -> None:
    """Errors against fp64 of at most 1.5 times those of PyTorch in the same dtype, 3 times for gradients, plus an ulp.

    `stock` computes in the dtype of its inputs. In fp64, where all round alike, the floor is some ulps more.
    """
    assert len(got) == len(exact)
    for i, (mine, theirs, truth) in enumerate(zip(got, stock, exact, strict=True)):
        assert mine.shape == truth.shape
        assert mine.dtype == theirs.dtype
        if not truth.numel():
            continue
        assert mine.isfinite().all()
        ulps = 16 if mine.dtype == torch.float64 else 1
        floor = ulps * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        error, allowed = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
        factor = 1.5 if i < outputs else 3.0
        assert error <= factor * allowed + floor, f"{i}: error {error:.3g}, stock {allowed:.3g}, floor {floor:.3g}"


def check_rounded_once(got: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """In 16 bits: every value is the nearest to the exact one, or where that is nearly a tie, its neighbour."""
    for mine, truth in zip(got, exact, strict=True):
        nearest = truth.to(mine.dtype)
        assert (mine != nearest).double().mean().item() <= 0.01
        error = (mine.double() - truth).abs()
        spacing = torch.finfo(mine.dtype).eps * truth.abs() + torch.finfo(mine.dtype).smallest_normal
        assert (error <= 0.51 * spacing).all()


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forbid_launches(monkeypatch: pytest.MonkeyPatch, triton_path: Any, *names: str) -> None:
    """Any use of the kernels is an error."""

    class Forbidden:
        def __getitem__(self, grid: object) -> None:
            raise AssertionError("expected no launch")

    for name in names:
        monkeypatch.setattr(triton_path, name, Forbidden())
