"""Eager calls skip the registered operators; whatever traces, transforms or watches operators still meets them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from ptengine.kernels.eager import shortcut
from ptengine.kernels.linear_cross_entropy import linear_cross_entropy
from ptengine.kernels.prefix_attention import prefix_attention, prefix_attention_varlen
from ptengine.kernels.prefix_concat import prefix_concat, prefix_concat_paged, prefix_concat_varlen

from .prefix_attention_cases import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, dtype=torch.float32, seed=seed).to(DEVICE)


CU = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
KEYS, TOKENS = tensor(2, 2, 3, 16), tensor(5, 2, 16)  # [B, H_kv, T, D], [total, H_kv, D]
HEAD, LABELS = tensor(9, 16, seed=3), torch.tensor([1, 8, 3], device=DEVICE)
ANGLES = {"cos": tensor(3, 6, seed=4), "sin": tensor(3, 6, seed=5)}
PREFIX, QUERIES, HIDDEN = tensor(4, 2, 16, seed=1), tensor(2, 4, 3, 16, seed=2), tensor(3, 16, seed=6)

# One differentiable tensor in, the result out; and the operator in between.
CALLS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "prefix_attention": (lambda q, **how: prefix_attention(q, KEYS, KEYS, PREFIX, PREFIX, **how), QUERIES),
    "prefix_attention_varlen": (
        lambda prefix, **how: prefix_attention_varlen(
            TOKENS.repeat(1, 2, 1), TOKENS, TOKENS, prefix, PREFIX, CU, 3, window=4, **how
        ),
        PREFIX,
    ),
    "prefix_concat": (lambda prefix, **how: prefix_concat(prefix, KEYS, **ANGLES, **how), PREFIX),
    "prefix_concat_varlen": (lambda rows, **how: prefix_concat_varlen(PREFIX, rows, CU, 3, **how)[0], TOKENS),
    "linear_cross_entropy_rows": (lambda x, **how: linear_cross_entropy(x, HEAD, LABELS, **how), HIDDEN),
}  # type: ignore[dict-item]
BACKENDS = ["torch", "triton"]


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are called while the test runs, by name."""
    names: list[str] = []
    call = CustomOpDef.__call__

    def record(operator: CustomOpDef, *args: Any) -> Any:
        names.append(operator._name)
        return call(operator, *args)

    monkeypatch.setattr(CustomOpDef, "__call__", record)
    return names


def given(name: str) -> tuple[Callable[..., Tensor], Tensor]:
    function, x = CALLS[name]
    return function, x.clone().requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.clone, torch.nn.Parameter])
def test_an_eager_call_meets_no_operator(name: str, backend: str, kind: Any, met: list[str]) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    function, x = CALLS[name]
    x = kind(x).requires_grad_()
    out = function(x, backend=backend)
    torch.autograd.grad(out, x, torch.ones_like(out))
    with torch.no_grad():
        assert torch.equal(function(x, backend=backend), out)
    with torch.inference_mode():
        assert torch.equal(function(x, backend=backend), out)
    assert torch.equal(function(x.detach(), backend=backend), out)
    assert met == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_into_a_cache_meets_no_operator(backend: str, met: list[str]) -> None:
    """And counts as a change of it."""
    if backend == "triton":
        pytest.importorskip("triton")
    cache, table = torch.zeros(4, 4, 2, 16, device=DEVICE), torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    needed = (torch.ones_like(cache, requires_grad=True) * cache).sum()
    prefix_concat_paged(PREFIX, KEYS, cache, table, backend=backend)
    assert met == []
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.backward()


class _Watch(TorchDispatchMode):
    """Notes the operators that are called, and calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_see_the_operators(name: str, backend: str) -> None:
    """Forwards and backwards, and they give the same as without: bit for bit."""
    if backend == "triton":
        pytest.importorskip("triton")

    def both() -> tuple[Tensor, Tensor]:
        function, x = given(name)
        out = function(x, backend=backend)
        return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))

    with _Watch() as watch:
        watched = both()
    assert f"ptengine::{name}" in watch.seen
    assert sum(operator.startswith("ptengine::") for operator in watch.seen) == 2
    for x, y in zip(watched, both(), strict=True):
        assert torch.equal(x, y)


def test_fake_tensors_meet_the_operator(name: str, met: list[str]) -> None:
    function, x = CALLS[name]
    expected = function(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = function(mode.from_tensor(x))
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert met == [name]


def test_fake_tensors_outside_their_mode_meet_the_operator(met: list[str]) -> None:
    """Known by their type, then."""
    mode = FakeTensorMode()
    assert isinstance(prefix_concat(mode.from_tensor(PREFIX), mode.from_tensor(KEYS)), FakeTensor)
    assert met == ["prefix_concat"]


def test_tensors_without_values_meet_the_operator(met: list[str]) -> None:
    out = prefix_attention_varlen(*[x.to("meta") for x in (TOKENS, TOKENS, TOKENS, PREFIX, PREFIX, CU)], 3)
    assert isinstance(out, Tensor)
    assert out.is_meta
    assert met == ["prefix_attention_varlen"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator(name: str) -> None:
    function, x = CALLS[name]
    operator = getattr(torch.ops.ptengine, name).default
    for pre_dispatch in (False, True):
        graph = make_fx(lambda x: function(x), pre_dispatch=pre_dispatch)(x).graph
        assert operator in [node.target for node in graph.nodes]
    traced = torch.jit.trace(lambda x: function(x), (x,), check_trace=False)
    assert f"ptengine::{name}" in [node.kind() for node in traced.graph.nodes()]


def test_compiled_graphs_hold_the_operators(name: str) -> None:
    """Forwards and backwards, and no part of the implementation."""
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    function, x = given(name)
    backend = aot_autograd(fw_compiler=keep)
    out = torch.compile(function, fullgraph=True, backend=backend)(x)
    (got,) = torch.autograd.grad(out, x, torch.ones_like(out))
    expected = function(x)
    assert torch.equal(out, expected)
    assert torch.equal(got, torch.autograd.grad(expected, x, torch.ones_like(out))[0])
    assert f"ptengine.{name}.default" in targets
    assert sum(target.startswith("ptengine.") for target in targets) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_meets_the_operator(name: str, met: list[str]) -> None:
    function, x = CALLS[name]
    both = torch.stack([x, 2 * x])
    out = torch.func.vmap(function)(both)
    assert met == [name]
    assert torch.equal(out, torch.stack([function(x), function(2 * x)]))


def test_functional_gradients_are_refused(name: str) -> None:
    """By `torch.library`, whose operators have no rule for them."""
    function, x = CALLS[name]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: function(x).sum())(x)


def test_subclasses_meet_the_operator(name: str, met: list[str]) -> None:
    class Named(Tensor):
        pass

    function, x = CALLS[name]
    assert type(function(x.as_subclass(Named))) is Named
    assert met[0] == name


def test_a_default_device_does_not_reach_inside(met: list[str]) -> None:
    function, x = CALLS["prefix_attention"]
    expected = function(x)
    with torch.device("meta"):
        out = function(x)
    assert torch.equal(out, expected)
    assert met == ["prefix_attention"]


def test_other_types_meet_the_operator(met: list[str]) -> None:
    """It makes floats of ints, which a kernel would be compiled for anew."""
    expected = linear_cross_entropy(HIDDEN, HEAD, LABELS, softcap=2.0, z_loss=1.0)
    assert met == []
    assert torch.equal(linear_cross_entropy(HIDDEN, HEAD, LABELS, softcap=2, z_loss=1), expected)
    assert met == ["linear_cross_entropy_rows"]


@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_are_errors_and_not_left_out(name: str, linear: bool) -> None:
    """Of sums with other terms, too, where a gradient without a history would go unnoticed."""
    function, x = given(name)
    out = function(x)
    (first,) = torch.autograd.grad(out.sum() if linear else out.square().sum(), x, create_graph=True)
    if linear and name.startswith("prefix_concat"):  # which is linear: there is no second derivative
        assert not first.requires_grad
        return
    with pytest.raises(RuntimeError, match=r"ptengine.*no autograd formula was registered"):
        torch.autograd.grad(first.sum() + x.sum(), x)


class _Kept:
    """Holds what autograd saves, so that it can be asked whether it still does."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_what_was_saved_is_let_go(name: str) -> None:
    function, x = given(name)
    kept: list[weakref.ref[_Kept]] = []

    def pack(x: Tensor) -> _Kept:
        holder = _Kept(x)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.x):
        out = function(x)
        assert any(holder() is not None for holder in kept)
        out.sum().backward()
        assert all(holder() is None for holder in kept)
        with pytest.raises(RuntimeError, match="a second time"):
            out.sum().backward()
        kept.clear()
        function(x.detach())
        with torch.no_grad():
            function(x)
    assert kept == []
    inner = x * 1.0
    argument = weakref.ref(inner)
    out = function(inner)
    del inner
    out.sum().backward()
    assert argument() is None


def test_results_may_be_changed_in_place() -> None:
    """Unlike views that were made inside a custom function."""
    for name in ("prefix_attention_varlen", "prefix_concat", "prefix_concat_varlen"):
        function, x = given(name)
        out = function(x)
        assert not out._is_view()
        out.mul_(2.0)


def test_tangents_are_refused(name: str) -> None:
    """They were dropped, and a whole model then had a derivative of its other paths alone."""
    function, x = CALLS[name]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"expected no forward-mode .*ptengine"):
        function(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="expected no forward-mode"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        function(x)  # other tensors may have theirs


class _Ignore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # type: ignore[override]
        return None


def test_a_reader_may_give_no_gradient(name: str) -> None:
    function, x = given(name)
    (_Ignore.apply(function(x)).sum() + x.sum()).backward()
    assert x.grad is not None
    assert x.grad.eq(1.0).all()


def _twice(x: Tensor, factor: float, shift: Tensor | None) -> Tensor:
    return x * factor if shift is None else x * factor + shift


def test_where_a_call_goes() -> None:
    """On a function of its own, with an operator that only says that it was called."""
    call = shortcut(lambda *args: "operator", _twice)
    x = torch.ones(2)
    assert torch.equal(call(x, 2.0, None), 2 * x)
    assert torch.equal(call(x, 2.0, x), 3 * x)
    assert call(x, 2, None) == "operator"
    assert call(x, 2.0, 1.0) == "operator"
    assert call(None, 2.0, None) == "operator"
    assert call(x.clone().requires_grad_(), 2.0, None) == "operator"  # it has no derivative, and says so there
    assert call(x, 2.0, x.clone().requires_grad_()) == "operator"
