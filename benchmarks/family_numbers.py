"""How far two computations of the family matrix are apart, and what that, or a model that fails, makes of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ptengine
from ptengine.errors import UnsupportedModelError

BOUND = 1e-4


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def errors_of(
    computations: tuple[Callable[[], Tensor], Callable[[], Tensor]], trained: list[Tensor]
) -> tuple[float, float]:
    """Relative errors of logits and of the gradients of a weighted sum of log probabilities."""
    logits, grads = [], []
    for run in computations:
        out = run()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads.append(torch.autograd.grad((out.log_softmax(-1) * weights).sum(), trained))
        logits.append(out.detach())
    return relative(logits[0], logits[1]), max(relative(a, b) for a, b in zip(*grads, strict=True))


def require_finite(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise RuntimeError("the stock numbers of random weights are not finite")


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """`result`, failed where a number of it is beyond the bound."""
    bad = {name: value for name, value in result.items() if isinstance(value, float) and not value <= BOUND}
    if bad:
        result |= {"status": "failed", "reason": f"beyond {BOUND}: {', '.join(bad)}"}
    return result


def without_stock(model: Any, error: Exception) -> dict[str, Any]:
    """The row of a model whose stock computation fails on input embeddings: patching must refuse it."""
    try:
        ptengine.patch(model)
    except UnsupportedModelError as refusal:
        return {"status": "refused", "reason": str(refusal)}
    return {"status": "failed", "reason": f"it was patched, but its stock computation fails: {brief(error)}"}
