"""rms_norm: every backend against float64 and the stock modules; the kernels in the interpreter where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ptengine.kernels import dispatch
from ptengine.kernels.dispatch import resolve_backend
from ptengine.kernels.launch import INTERPRETED
from ptengine.kernels.rms_norm import rms_norm, rms_norm_reference
from ptengine.kernels.rms_norm.tiles import MAX_CHANNELS, tile

from .frozen_layer_cases import DEVICE, HALVES, PAIRS, check, check_rounded_once, forbid_launches, noise, poisoned, run

pytest.importorskip("triton")

from ptengine.kernels.rms_norm import triton_path

# The interpreter computes with numpy, which remarks on every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EPS = 1e-5
SHAPES = [(4, 3), (5, 7), (33, 64), (2, 3, 5, 128), (3, 100), (2, 2880), (1, 4096)]
STOCK = {"llama": LlamaRMSNorm, "qwen3": Qwen3RMSNorm, "gemma": GemmaRMSNorm}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x and weight; rows differ in size, so that one row's norm is no use to another."""
    x = noise(*shape, seed=1)
    size = 2.0 ** (torch.arange(x.shape[:-1].numel(), device=DEVICE).view(*x.shape[:-1], 1) % 5 - 2)
    return (x * size).to(dtype), noise(shape[-1], seed=2, dtype=dtype)


def stock(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """LlamaRMSNorm, or with offset 1 GemmaRMSNorm."""
    norm = (LlamaRMSNorm if offset == 0.0 else GemmaRMSNorm)(len(weight), eps).to(x.device).requires_grad_(False)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


def exact(x: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    leaf = x.detach().double().requires_grad_()
    out = rms_norm_reference(leaf, weight.double(), EPS, **options)
    of_out = noise(*x.shape, seed=90, dtype=x.dtype).double()
    return [out.detach(), *torch.autograd.grad(out, [leaf], of_out)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
def test_against_float64(backend: str, dtype: torch.dtype, offset: float) -> None:
    for shape in SHAPES:
        x, weight = inputs(*shape, dtype=dtype)
        with poisoned():
            got = run(rms_norm, [x], weight, EPS, offset=offset, backend=backend)
        check(got, run(stock, [x], weight, EPS, offset=offset), exact(x, weight, offset=offset))


@pytest.mark.parametrize("channels", [8192, 10000, MAX_CHANNELS])
def test_wide_rows(channels: int) -> None:
    x, weight = inputs(3, channels)
    with poisoned():
        got = run(rms_norm, [x], weight, EPS, backend="triton")
    check(got, run(stock, [x], weight, EPS), exact(x, weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounded_once(backend: str, dtype: torch.dtype) -> None:
    x, weight = inputs(40, 200, dtype=dtype)
    check_rounded_once(run(rms_norm, [x], weight, EPS, backend=backend), exact(x, weight))


@pytest.mark.parametrize("eps", [0.5, 1e-6])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("name", STOCK)
def test_equals_the_stock_modules(name: str, backend: str, eps: float) -> None:
    x, weight = inputs(2, 6, 4, 64)
    norm = STOCK[name](64, eps=eps).to(DEVICE)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    got = run(rms_norm, [x], weight, eps, offset=float(name == "gemma"), backend=backend)
    torch.testing.assert_close(got, run(norm, [x]), rtol=2e-6, atol=2e-6)


def test_weight_of_another_dtype() -> None:
    x, _ = inputs(5, 96, dtype=torch.float16)
    wide = noise(96, seed=2)
    assert not torch.equal(wide.half().float(), wide)
    for backend in ("torch", "triton"):
        got = run(rms_norm, [x], wide, EPS, backend=backend)
        assert got[0].dtype == torch.float16
        check_rounded_once(got, exact(x, wide))


def strided() -> dict[str, Tensor]:
    """Views of the same kind as a model's: of one projection's heads, of other orders, of every other element."""
    qkv = noise(6, 12, 32, seed=3)
    return {
        "rows apart": qkv[:, 3],
        "heads of a projection": qkv[:, 2:10],
        "batch of heads": qkv.unflatten(0, (2, 3))[:, :, 1:5],
        "heads before tokens": qkv.transpose(0, 1),
        "three strides": qkv.unflatten(0, (2, 3)).transpose(1, 2)[:, 2:9],
        "channels apart": qkv[..., ::2],
        "channels first": qkv.transpose(1, 2),
        "expanded": qkv[:1].expand(5, 12, 32),
        "a row": qkv[0, 0],
        "one channel": qkv[..., :1],
    }


@pytest.mark.parametrize("name", strided())
def test_strided(name: str) -> None:
    x = strided()[name]
    weight = noise(2 * x.shape[-1], seed=4)[::2]
    leaf, dense = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    with poisoned():
        got = rms_norm(leaf, weight, EPS, backend="triton")
        expected = rms_norm(dense, weight.contiguous(), EPS, backend="triton")
    assert got.is_contiguous()
    # On a GPU other strides may sum in another order.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    gradients = [
        noise(*reversed(x.shape), seed=5).permute(*reversed(range(x.dim()))),  # channels apart
        noise(*x.shape[:-1], 2 * x.shape[-1], seed=6)[..., : x.shape[-1]],
        noise(*reversed(x.shape[:-1]), x.shape[-1], seed=7).permute(*reversed(range(x.dim() - 1)), -1),
        torch.ones((), device=DEVICE).expand(x.shape),
    ]
    for gradient in gradients:
        with poisoned():
            (mine,) = torch.autograd.grad(got, leaf, gradient, retain_graph=True)
            (theirs,) = torch.autograd.grad(expected, dense, gradient.contiguous(), retain_graph=True)
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_heads_of_a_projection_are_not_copied() -> None:
    qkv = noise(6, 12, 32, seed=3)
    for x, inner in ((qkv[:, 2:10], 8), (qkv[:, 3], 1), (qkv, 1), (qkv.unflatten(0, (2, 3))[:, :, 1:5], 4)):
        found = triton_path._rows_of(x)
        assert found.tensor is x
        assert found.inner == inner


def test_gradient_of_heads_beside_heads_in_another_order() -> None:
    """x has two strides and so has the gradient, of other sizes: one of them has to be copied."""
    x, weight = noise(6, 5, 16, seed=1)[:, 1:4].requires_grad_(), noise(16, seed=2)
    of_out = noise(3, 6, 16, seed=3).transpose(0, 1)
    by_pairs = noise(2, 9, 20, seed=4)[..., :16].reshape(2, 9, 16).as_strided((6, 3, 16), (48, 16, 1))
    for gradient in (of_out, by_pairs, noise(3, 6, 20, seed=5)[..., :16].transpose(0, 1)):
        (got,) = torch.autograd.grad(rms_norm(x, weight, EPS, backend="triton"), x, gradient)
        (expected,) = torch.autograd.grad(rms_norm(x, weight, EPS, backend="reference"), x, gradient)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0,)])
def test_empty(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_launches(monkeypatch, triton_path, "forward_kernel", "backward_kernel")
    for backend in ("reference", "torch", "triton"):
        out, gradient = run(rms_norm, [noise(*shape, seed=1)], noise(shape[-1], seed=2), EPS, backend=backend)
        assert out.shape == gradient.shape == shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_and_infinity_stay_in_their_row(backend: str) -> None:
    x, weight = inputs(40, 48)
    x[3, 5], x[17, 47], x[39, 0] = torch.nan, torch.inf, torch.nan
    for result in run(rms_norm, [x], weight, EPS, backend=backend):
        assert result.isnan().any(1).nonzero().flatten().tolist() == [3, 17, 39]


def test_zero_rows() -> None:
    x, weight = torch.zeros(3, 40, device=DEVICE), noise(40, seed=2)
    out, gradient = run(rms_norm, [x], weight, EPS, backend="triton")
    assert not out.any()
    torch.testing.assert_close(gradient, noise(3, 40, seed=90) * weight * EPS**-0.5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits(backend: str) -> None:
    x, weight = inputs(30, 200)
    first = run(rms_norm, [x], weight, EPS, backend=backend)
    for one, two in zip(first, run(rms_norm, [x], weight, EPS, backend=backend), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS, backend=backend), first[0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, EPS, backend=backend), first[0])


def test_keeps_x_alone() -> None:
    x, weight = inputs(30, 200)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm(x.requires_grad_(), weight, EPS, backend="triton")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_second_derivative_is_an_error() -> None:
    x, weight = inputs(3, 16)
    out = rms_norm(x.requires_grad_(), weight, EPS, backend="triton")
    of_out = torch.ones_like(out, requires_grad=True)
    (gradient,) = torch.autograd.grad(out, x, of_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_frozen_weight(backend: str) -> None:
    x, weight = inputs(3, 16)
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"expected a frozen weight .* got a weight that requires grad"):
        rms_norm(x, weight, EPS, backend=backend)
    with torch.no_grad():
        assert rms_norm(x, weight, EPS, backend=backend).shape == x.shape


def test_errors() -> None:
    x, weight = inputs(3, 16)
    with pytest.raises(ValueError, match=r"expected x \[..., D\] .* got \[\] in torch.float32"):
        rms_norm(x[0, 0], weight, EPS)
    with pytest.raises(ValueError, match=r"expected x \[..., D\] .* got \[3, 16\] in torch.int64"):
        rms_norm(x.long(), weight, EPS)
    for wrong in (weight[:8], weight[None], weight.long()):
        with pytest.raises(ValueError, match=r"expected weight \[D = 16\] in float64, .* got \["):
            rms_norm(x, wrong, EPS)
    with pytest.raises(ValueError, match="expected weight on x's device"):
        rms_norm(x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match="expected a backend of"):
        rms_norm(x, weight, EPS, backend="cuda")


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(1, MAX_CHANNELS + 1)
    with pytest.raises(ValueError, match=rf"takes D up to {MAX_CHANNELS}, not {MAX_CHANNELS + 1}"):
        rms_norm(x, weight, EPS, backend="triton")
    with pytest.raises(ValueError, match=r"triton implementation of rms_norm takes .* not float64"):
        rms_norm(x.double(), weight, EPS, backend="triton")
    with pytest.raises(ValueError, match="takes no weight in float64 here"):
        rms_norm(x[:, :4], weight[:4].double(), EPS, backend="triton")
    if INTERPRETED:  # which would compute nonsense from it
        with pytest.raises(ValueError, match="takes no weight in bfloat16 here"):
            rms_norm(x[:, :4], weight[:4].bfloat16(), EPS, backend="triton")
    assert resolve_backend(None, torch.device("cuda"), "rms_norm", dtype=torch.float16) == "triton"
    monkeypatch.setattr(dispatch, "_WARNED", set())
    with pytest.warns(UserWarning, match="rms_norm takes the slower PyTorch path: .* not float64"):
        assert resolve_backend(None, torch.device("cuda"), "rms_norm", dtype=torch.float64) == "torch"


@pytest.mark.parametrize("backend", [None, "triton"])
def test_compiles_as_one_graph_without_the_kernel(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    x, weight = inputs(9, 40)
    expected = run(rms_norm, [x], weight, EPS, offset=1.0, backend="torch")
    forbid_launches(monkeypatch, triton_path, "forward_kernel", "backward_kernel")
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    got = run(compiled, [x], weight, EPS, offset=1.0, backend=backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942", "interpreter"])
def test_tiles(name: str) -> None:
    for channels in (1, 64, 128, 1000, 2048, 4096, 5000, MAX_CHANNELS):
        chosen = tile(name, channels)
        assert chosen.columns >= channels
        assert chosen.columns < 2 * channels or channels == 1
        assert chosen.rows & (chosen.rows - 1) == chosen.columns & (chosen.columns - 1) == 0
        threads = chosen.warps * (64 if name == "gfx942" else 32)
        assert threads <= 1024
        assert chosen.rows * chosen.columns <= 16 * threads or threads == 64
