"""Linear layers of a frozen model on oneDNN: the stock numbers, and the stock layer wherever it is needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptengine.backbone import frozen_layers, pack_rows, packed_loss, patched
from ptengine.backbone.frozen_products import fuse_products, is_fused
from ptengine.kernels import onednn

from .stock import CAUSAL, make, parameters, prefix, random_rows, relative, stock_loss, virtual

pytestmark = [
    pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN: {onednn.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the models are on the CPU"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let layers of any size and calls of any number of rows be taken, and note the weights oneDNN multiplies with."""
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(onednn, "MOST_ROWS", 1000)
    shapes: list[torch.Size] = []
    original = onednn.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(weight.shape)
        return original(x, weight, bias)

    monkeypatch.setattr(onednn, "linear", noted)
    return shapes


@pytest.mark.parametrize("method", ["virtual", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradient_equal_the_stock_model(family: str, method: str, calls: list[torch.Size]) -> None:
    model, rows = make(family), random_rows(9, 3, 14)
    prompt = virtual(6) if method == "virtual" else prefix(model, 6)
    linear = sum(type(module) in (nn.Linear, Conv1D) for module in model.modules()) - 1  # but for the LM head
    with patched(model):
        calls.clear()
        loss = packed_loss(model, prompt, pack_rows(rows, rows)).loss
        assert len(calls) == linear + 2  # the head's loss brings its gradient along
        ours = torch.autograd.grad(loss, parameters(prompt))
        assert len(calls) > linear * 1.5  # the first layer's may have nothing to differentiate
    exact = stock_loss(model, [prompt] * 3, rows, rows)
    assert abs(loss.item() - exact.item()) < 1e-5
    for got, expected in zip(ours, torch.autograd.grad(exact, parameters(prompt)), strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("family", CAUSAL)
def test_stock_calls_and_generation(family: str, calls: list[torch.Size]) -> None:
    model, ids = make(family), torch.arange(3, 12)[None]
    expected, tokens = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    with patched(model):
        calls.clear()
        assert relative(model(ids).logits, expected) < 1e-5
        assert len(calls) > 0
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)


def layers() -> list[tuple[nn.Module, Any]]:
    """One of each kind, and the same function of x in stock operators."""
    torch.manual_seed(0)
    linear, transposed = nn.Linear(20, 30).requires_grad_(False), Conv1D(30, 20).requires_grad_(False)
    transposed.bias.normal_()
    return [
        (linear, lambda x: x @ linear.weight.t() + linear.bias),
        (transposed, lambda x: x @ transposed.weight + transposed.bias),
    ]


@pytest.mark.parametrize("index", [0, 1], ids=["Linear", "Conv1D"])
def test_two_derivatives(index: int, calls: list[torch.Size]) -> None:
    layer, stock = layers()[index]
    fuse_products(layer)
    x = torch.randn(2, 5, 20)
    found = []
    for function in (layer, stock):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        found.append((first.detach(), second))
    assert len(calls) >= 3
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("index", [0, 1], ids=["Linear", "Conv1D"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(index: int, calls: list[torch.Size]) -> None:
    layer, stock = layers()[index]
    fuse_products(layer)
    x = torch.randn(3, 20)
    got, expected = (
        torch.func.vmap(torch.func.grad(lambda v, f=function: f(v[None]).pow(2).sum()))(x)
        for function in (layer, stock)
    )
    assert calls
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("index", [0, 1], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_trained_gets_its_gradient(index: int, name: str, calls: list[torch.Size]) -> None:
    layer, stock = layers()[index]
    parameter = layer.get_parameter(name).requires_grad_()
    fuse_products(layer)
    x = torch.randn(4, 20)
    got, expected = (torch.autograd.grad(function(x).square().sum(), parameter)[0] for function in (layer, stock))
    assert calls == []
    assert relative(got, expected) < 1e-5
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1  # nothing is to be differentiated


@pytest.mark.parametrize("index", [0, 1], ids=["Linear", "Conv1D"])
def test_the_stock_layer_runs_elsewhere(index: int, calls: list[torch.Size]) -> None:
    """Under autocast and torch.compile, and in another dtype."""
    layer, stock = layers()[index]
    expected = layer(x := torch.randn(4, 20))
    fuse_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    layer.double()
    torch.testing.assert_close(layer(x.double()), stock(x.double()))
    assert calls == []


def test_only_large_plain_layers_that_nobody_replaced(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "large": nn.Linear(20, 30),
            "small": nn.Linear(20, 29),
            "special": Special(20, 30),
            "taken": nn.Linear(20, 30),
            "elsewhere": nn.Linear(20, 30, device="meta"),
        }
    ).requires_grad_(False)
    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 600)
    model["taken"].forward = lambda x: x
    assert [one.module for one in fuse_products(model)] == [model["large"]]
    assert [name for name, module in model.items() if is_fused(module)] == ["large"]


def test_a_deep_copy_multiplies_with_its_own_weights(calls: list[torch.Size]) -> None:
    layer, _ = layers()[0]
    fuse_products(layer)
    other = copy.deepcopy(layer)
    other.weight.zero_()
    other.bias.zero_()
    assert other(torch.ones(1, 20)).count_nonzero() == 0
    assert layer(torch.ones(1, 20)).count_nonzero() == 30


def test_unpatch_puts_the_stock_forwards_back(calls: list[torch.Size]) -> None:
    model = make("gpt2")
    with patched(model):
        assert all(is_fused(module) for module in model.modules() if type(module) in (nn.Linear, Conv1D))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_replaced_forward_is_no_hook_to_the_fused_layers(calls: list[torch.Size]) -> None:
    """On a GPU the projections of one input are one operation, unless somebody else watches them."""
    layer, _ = layers()[0]
    fuse_products(layer)
    assert not frozen_layers._hooked(layer)
    layer.forward = lambda x: x
    assert frozen_layers._hooked(layer)
