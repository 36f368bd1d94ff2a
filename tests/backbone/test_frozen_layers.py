"""The faster forwards of a frozen model's own modules: equal to the stock ones, and in place only where they may be.

The kernels are forced by PTENGINE_BACKEND and run in Triton's interpreter.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptengine.backbone import frozen_layers, pack_rows, packed_loss, patch, patched, unpatch
from ptengine.backbone.frozen_layers import fuse_layers
from ptengine.kernels.dispatch import ENVIRONMENT

from .stock import make, parameters, random_rows, relative, stock_loss, virtual

pytest.importorskip("triton", reason="needs Triton (Linux)")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's run; the stock side is on the CPU")
OURS = ("rms_norm", "gated_activation", "rotary_embedding", "packed_attention")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Force the kernels, and note which operations the replaced forwards call."""
    monkeypatch.setenv(ENVIRONMENT, "triton")
    names: list[str] = []
    for name in OURS:
        original = getattr(frozen_layers, name)

        def noted(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            names.append(_name)
            return _original(*args, **more)

        monkeypatch.setattr(frozen_layers, name, noted)
    return names


def loss_of(model: Any, prompt: Any, rows: list[list[int]]) -> Tensor:
    return packed_loss(model, prompt, pack_rows(rows, rows)).loss


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradient_equal_the_stock_model(family: str, options: dict[str, Any], calls: list[str]) -> None:
    if family == "qwen3":
        options.pop("mlp_bias", None)  # it has none
    model, rows, prompt = make(family, **options), random_rows(9, 3, 14), virtual(6)
    with patched(model):
        calls.clear()
        loss = loss_of(model, prompt, rows)
    layers, norms = model.config.num_hidden_layers, 4 if family == "qwen3" else 2
    assert [calls.count(name) for name in OURS] == [norms * layers + 1, layers, layers, layers]
    exact = stock_loss(model, [prompt] * 3, rows, rows)
    assert abs(loss.item() - exact.item()) < 1e-5
    ours, theirs = (torch.autograd.grad(x, parameters(prompt)) for x in (loss, exact))
    for got, expected in zip(ours, theirs, strict=True):
        assert relative(got, expected) < 1e-5


def test_unpatch_puts_the_stock_forwards_back(calls: list[str]) -> None:
    model = make("llama")
    patch(model)
    replaced = [module for module in model.modules() if "forward" in vars(module)]
    assert {type(module).__name__ for module in replaced} == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
    unpatch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    calls.clear()
    model(torch.zeros(1, 2, dtype=torch.int64))
    assert calls == []


def test_an_ordinary_call_of_a_patched_model_is_the_stock_one(calls: list[str]) -> None:
    model, ids = make("llama"), torch.arange(10)[None]
    expected = model(ids).logits
    with patched(model):
        calls.clear()
        got = model(ids).logits
    assert "packed_attention" not in calls  # no packed batch: transformers' own attention forward
    assert relative(got, expected) < 1e-5


def test_the_stock_forwards_run_on_the_pytorch_path(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "torch")
    model = make("llama")
    with patched(model):
        loss_of(model, virtual(4), random_rows(3, 5))
    assert calls == []


@pytest.mark.parametrize("trained", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight",
                                     "model.layers.1.self_attn.v_proj.weight"])  # fmt: skip
def test_a_weight_that_is_trained_gets_its_gradient(trained: str, calls: list[str]) -> None:
    """The kernels know no gradient of weights: a module with one that asks for it runs as it was."""
    model, rows, prompt = make("llama"), random_rows(5, 8), virtual(4)
    weight = model.get_parameter(trained).requires_grad_()
    with patched(model):
        calls.clear()
        loss = loss_of(model, prompt, rows)
    exact = stock_loss(model, [prompt] * 2, rows, rows)
    assert calls  # all others run on the kernels
    got, expected = (torch.autograd.grad(x, weight)[0] for x in (loss, exact))
    assert relative(got, expected) < 1e-5


def test_hooks_of_a_projection_run(calls: list[str]) -> None:
    """As those of adapters and of tools that look into a model."""
    model = make("llama")
    seen: list[torch.Size] = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with patched(model):
        seen.clear()
        loss_of(model, virtual(4), random_rows(3, 5))
    assert seen == [torch.Size([10, 24])]  # 4 virtual tokens and the texts but for their last tokens


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model = make("llama")
    norm = model.model.norm
    norm.forward = lambda x: x
    handles = fuse_layers(model)
    assert all(handle.module is not norm for handle in handles)
    for handle in handles:
        handle.remove()
    assert "forward" in vars(norm)


def test_a_copy_of_a_patched_model_computes_with_its_own_weights(calls: list[str]) -> None:
    model, rows, prompt = patch(make("llama")), random_rows(5, 8), virtual(4)
    before = loss_of(model, prompt, rows)
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module) is nn.Linear:
            module.weight.data.zero_()
        elif type(module).__name__ == "LlamaRMSNorm":
            module.weight.data.mul_(2)
    calls.clear()
    assert torch.equal(loss_of(model, prompt, rows), before)
    assert "rms_norm" in calls
    hidden = torch.randn(3, other.config.hidden_size)
    assert relative(other.model.norm(hidden), 2 * model.model.norm(hidden)) < 1e-6
    assert torch.count_nonzero(other.model.layers[0].mlp(hidden)) == 0


def test_mixed_dtypes_and_autocast_run_the_stock_forwards(calls: list[str]) -> None:
    model = make("llama")
    with patched(model):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            model.model.norm(torch.randn(2, model.config.hidden_size))
        model.model.norm.weight.data = model.model.norm.weight.data.double()
        model.model.norm(torch.randn(2, model.config.hidden_size))
    assert calls == []


def test_projections_without_all_gradients() -> None:
    """The gradient of an input whose layers are not all used, and of none."""
    layers = [nn.Linear(5, size).requires_grad_(False) for size in (3, 4, 2)]
    x = torch.randn(7, 5, requires_grad=True)
    outs = frozen_layers._project(x, *layers)
    for got, layer in zip(outs, layers, strict=True):
        assert torch.equal(got, layer(x))
    (got,) = torch.autograd.grad((outs[1] ** 2).sum() + outs[2].sum(), x)
    (expected,) = torch.autograd.grad((layers[1](x) ** 2).sum() + layers[2](x).sum(), x)
    assert relative(got, expected) < 1e-6
