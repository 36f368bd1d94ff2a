"""Products by oneDNN against float64, and which ones it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptengine.kernels import onednn

from .frozen_layer_cases import poisoned

NEEDS_ONEDNN = pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN: {onednn.missing()}")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


@NEEDS_ONEDNN
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", [Tensor.contiguous, transposed])
@pytest.mark.parametrize("shape", [(1, 1024, 512), (3, 513, 1025), (31, 2304, 768), (32, 768, 3072)], ids=str)
def test_rounding_is_that_of_float32(shape: tuple[int, int, int], layout: Any, with_bias: bool) -> None:
    """Each of d roundings is at most eps / 2 of a partial sum that is in the mean of squares no larger than the
    result, so the error's mean square is at most d * (eps / 2 * result)^2. TF32's eps is 4096 times float32's.
    """
    rows, out, d = shape
    x, weight, bias = noise(rows, d, seed=1), layout(noise(out, d, seed=2)), noise(out, seed=3) if with_bias else None
    assert onednn.takes(x, weight)
    with poisoned():
        got = onednn.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error, size = ((e.square().mean().sqrt().item()) for e in (got.double() - exact, exact))
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert error <= torch.finfo(torch.float32).eps / 2 * d**0.5 * size


@NEEDS_ONEDNN
def test_strides_and_leading_dimensions() -> None:
    weight = noise(1024, 512)
    x = noise(2, 512, 5, 3, seed=1).permute(0, 2, 3, 1)  # [2, 5, 3, 512], not contiguous
    got = onednn.linear(x, weight)
    assert got.shape == (2, 5, 3, 1024)
    assert torch.equal(got.view(30, 1024), onednn.linear(x.reshape(30, 512), weight))


@NEEDS_ONEDNN
def test_same_bits_every_time() -> None:
    x, weight = noise(32, 768), noise(1024, 768, seed=1)
    first = onednn.linear(x, weight)
    assert all(torch.equal(onednn.linear(x, weight), first) for _ in range(20))


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (noise(3, 512).double(), noise(1024, 512).double()),
        (noise(3, 512).bfloat16(), noise(1024, 512).bfloat16()),
        (noise(3, 512).bfloat16(), noise(1024, 512)),
        (noise(3, 512), noise(1024, 512).bfloat16()),
        (noise(3, 512), noise(1023, 512)),  # smaller than LEAST_WEIGHT
        (noise(0, 512), noise(1024, 512)),
        (noise(3, 512), noise(1024, 1024)[:, ::2]),
        (noise(3, 512).to("meta"), noise(1024, 512).to("meta")),
        (noise(11, 3, 512), noise(1024, 512)),  # 33 rows
        (noise(3, 100), noise(1024, 512)),
        (noise(), noise(1024, 512)),
    ],
    ids=["fp64", "bf16", "bf16 x", "bf16 weight", "small", "empty", "strided", "meta", "many rows", "width", "scalar"],
)
def test_what_it_does_not_take(x: Tensor, weight: Tensor) -> None:
    assert onednn.takes(noise(3, 512), noise(1024, 512))
    assert not onednn.takes(x, weight)


@NEEDS_ONEDNN
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_switched_off_with_torch_s_own_switch() -> None:
    x, weight = noise(3, 512), noise(1024, 512)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.takes(x, weight)
        assert "switched off" in (onednn.missing() or "")
    assert onednn.takes(x, weight)


def test_other_instructions_are_left_to_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    onednn._missing_for_good.cache_clear()
    try:
        assert onednn.missing() is not None
        assert not onednn.takes(noise(3, 512), noise(1024, 512))
    finally:
        onednn._missing_for_good.cache_clear()
