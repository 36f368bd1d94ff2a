"""gated_activation: every backend against float64 and stock formulas; the kernels in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from ptengine.kernels import dispatch
from ptengine.kernels.dispatch import resolve_backend
from ptengine.kernels.gated_activation import gated_activation, gated_activation_reference
from ptengine.kernels.gated_activation.api import ACTIVATIONS
from ptengine.kernels.gated_activation.tiles import tile

from .frozen_layer_cases import DEVICE, HALVES, PAIRS, check, check_rounded_once, forbid_launches, noise, poisoned, run

pytest.importorskip("triton")

from ptengine.kernels.gated_activation import triton_path

# The interpreter computes with numpy, which remarks on every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 64), (5, 1000), (2, 2752)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, size: float = 3.0) -> list[Tensor]:
    return [size * noise(*shape, seed=1, dtype=dtype), noise(*shape, seed=2, dtype=dtype)]


def stock(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def exact(gate: Tensor, up: Tensor, activation: str) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (gate, up)]
    out = gated_activation_reference(*leaves, activation)
    of_out = noise(*gate.shape, seed=90, dtype=gate.dtype).double()
    return [out.detach(), *torch.autograd.grad(out, leaves, of_out)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
def test_against_float64(backend: str, dtype: torch.dtype, activation: str) -> None:
    for shape in SHAPES:
        x = inputs(*shape, dtype=dtype)
        with poisoned():
            got = run(gated_activation, x, activation, backend=backend)
        check(got, run(stock, x, activation), exact(*x, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounded_once(backend: str, dtype: torch.dtype, activation: str) -> None:
    # Not far below 0, where 1 + erf and PyTorch's 1 + tanh cancel.
    gate, up = inputs(40, 100, dtype=dtype, size=0.7)
    x = [gate.clamp(min=-2.0), up]
    check_rounded_once(run(gated_activation, x, activation, backend=backend), exact(*x, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str) -> None:
    """Both ends, where exp overflows and 1 - sigmoid cancels; each value to its own ulps, or to nothing against 1."""
    ends = [4.0, 5.5, 9.0, 12.0, 17.3, 20.0, 40.0, 87.0, 89.0, 104.0, 1000.0, 60000.0]
    gate = torch.tensor([*ends, *(-x for x in ends), 0.0, -0.0], device=DEVICE)
    x = [gate, torch.ones_like(gate)]
    got, truth = run(gated_activation, x, activation, backend="triton"), exact(*x, activation)
    eps = torch.finfo(torch.float32).eps
    for mine, theirs in zip(got, truth, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=4 * eps, atol=16 * eps)
    # The slope is 1 to the last place long before sigmoid is: x * (1 - sigmoid) must not be left of the cancellation.
    if activation == "silu":
        torch.testing.assert_close(got[1][:8].double(), truth[1][:8], rtol=3 * eps, atol=0.0)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_equals_the_stock_activations(backend: str) -> None:
    """What LlamaMLP, GPT-like and GemmaMLP compute between their products."""
    gate, up = inputs(4, 6, 40)
    for name, stock_name in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")):
        got = run(gated_activation, [gate, up], name, backend=backend)
        expected = run(lambda g, u, act=ACT2FN[stock_name]: act(g) * u, [gate, up])
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def strided() -> dict[str, tuple[Tensor, Tensor]]:
    both = noise(6, 200, seed=3)
    cube = noise(2, 3, 5, 14, seed=4)
    return {
        "halves": both.chunk(2, dim=-1),
        "halves of a batch": both.view(2, 3, 200).chunk(2, dim=-1),
        "one of them strided": (both[:, :100], both[:, 100:].clone()),
        "interleaved": (both[:, ::2], both[:, 1::2]),
        "transposed": (cube[0, 0].T, cube[1, 0].T),
        "no one stride": (cube[:, :2, :, :7], cube[:, 1:, :, 7:]),
        "one stride": (cube[:, :, 1, :], cube[:, :, 2, :]),
        "expanded": (cube[:1, 0, :, :7].expand(4, 5, 7), cube[0, 0, :1, :7].expand(4, 5, 7)),
        "one row": (both[2, ::2], both[3, :100]),
        "dimensions of one": (both[:, None, :100, None].mT, both[:, None, 100:, None].mT),
    }


@pytest.mark.parametrize("name", strided())
def test_strided(name: str) -> None:
    x = strided()[name]
    leaves = [part.detach().requires_grad_() for part in x]
    dense = [part.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for part in x]
    with poisoned():
        got = gated_activation(*leaves, backend="triton")
        expected = gated_activation(*dense, backend="triton")
    assert got.is_contiguous()
    assert torch.equal(got, expected)
    shape = got.shape
    gradients = [
        noise(*reversed(shape), seed=5).permute(*reversed(range(len(shape)))),
        noise(*shape[:-1], 2 * shape[-1], seed=6)[..., : shape[-1]],
        torch.ones((), device=DEVICE).expand(shape),
    ]
    for gradient in gradients:
        with poisoned():
            mine = torch.autograd.grad(got, leaves, gradient, retain_graph=True)
            theirs = torch.autograd.grad(expected, dense, gradient.contiguous(), retain_graph=True)
        for one, two in zip(mine, theirs, strict=True):
            assert torch.equal(one, two)


def test_halves_are_not_copied() -> None:
    for name in ("halves", "halves of a batch", "one of them strided", "one stride"):
        x = strided()[name]
        _, rows = triton_path._rows_of(*x)
        assert all(row is part for (row, _), part in zip(rows, x, strict=True)), name


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_launches(monkeypatch, triton_path, "forward_kernel", "backward_kernel")
    for backend in ("reference", "torch", "triton"):
        assert all(x.shape == shape for x in run(gated_activation, inputs(*shape), backend=backend))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_where_it_is(backend: str, activation: str) -> None:
    gate, up = inputs(40, 48)
    gate[3, 5], gate[17, 47], up[39, 0] = torch.nan, torch.nan, torch.nan
    for i, result in enumerate(run(gated_activation, [gate, up], activation, backend=backend)):
        expected = [[3, 5], [17, 47]] + ([[39, 0]] if i < 2 else [])
        assert result.isnan().nonzero().tolist() == expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits(activation: str) -> None:
    x = inputs(30, 200)
    first = run(gated_activation, x, activation, backend="triton")
    for one, two in zip(first, run(gated_activation, x, activation, backend="triton"), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(gated_activation(*x, activation, backend="triton"), first[0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(gated_activation(*x, activation, backend="triton"), first[0])


def test_keeps_its_inputs_alone() -> None:
    gate, up = inputs(30, 200)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gated_activation(gate.requires_grad_(), up, backend="triton")
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("one", [0, 1])
def test_gradient_of_one_alone(one: int) -> None:
    x = inputs(4, 9)
    expected = run(gated_activation, x, backend="triton")[1 + one]
    x[one].requires_grad_()
    out = gated_activation(*x, backend="triton")
    assert torch.equal(torch.autograd.grad(out, x[one], noise(4, 9, seed=90))[0], expected)


def test_second_derivative_is_an_error() -> None:
    gate, up = inputs(3, 16)
    out = gated_activation(gate.requires_grad_(), up, backend="triton")
    of_out = torch.ones_like(out, requires_grad=True)
    (gradient,) = torch.autograd.grad(out, gate, of_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = inputs(3, 16)
    with pytest.raises(ValueError, match=r"expected gate in float64, .* got torch.int64"):
        gated_activation(gate.long(), up.long())
    for wrong in (up[:1], up.half(), up.to("meta")):
        with pytest.raises(ValueError, match=r"expected up as gate, \[3, 16\] in torch.float32 on .* got \["):
            gated_activation(gate, wrong)
    with pytest.raises(ValueError, match="expected an activation of 'silu', 'gelu', 'gelu_tanh', got 'relu'"):
        gated_activation(gate, up, "relu")
    with pytest.raises(ValueError, match="expected a backend of"):
        gated_activation(gate, up, backend="cuda")
    with pytest.raises(ValueError, match=r"triton implementation of gated_activation takes .* not float64"):
        gated_activation(gate.double(), up.double(), backend="triton")
    assert resolve_backend(None, torch.device("cuda"), "gated_activation", dtype=torch.float16) == "triton"
    monkeypatch.setattr(dispatch, "_WARNED", set())
    with pytest.warns(UserWarning, match="gated_activation takes the slower PyTorch path: .* not float64"):
        assert resolve_backend(None, torch.device("cuda"), "gated_activation", dtype=torch.float64) == "torch"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_as_one_graph_without_the_kernel(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    x = inputs(9, 40)
    expected = run(gated_activation, x, activation, backend="torch")
    forbid_launches(monkeypatch, triton_path, "forward_kernel", "backward_kernel")
    compiled = torch.compile(gated_activation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, activation, backend="triton"), expected)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942", "interpreter"])
def test_tiles(name: str) -> None:
    for columns in (1, 100, 2048, 14336, 2**33):
        chosen = tile(name, columns)
        assert chosen.columns & (chosen.columns - 1) == 0
        assert chosen.columns == 2048 or columns <= chosen.columns < 2 * columns
        assert 1 <= chosen.warps <= 4
