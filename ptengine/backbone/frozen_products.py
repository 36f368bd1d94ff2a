"""Runs a frozen model's large linear layers through `ptengine.kernels.onednn` where few rows make that the faster one.

The replacement is each module's own `forward`, and asks at every call: on another device, in another dtype, under
autocast or torch.compile, and with a weight that is trained, the stock one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptengine.kernels import onednn

__all__ = ["ReplacedForward", "fuse_products", "is_fused"]


class ReplacedForward:
    """Puts `forward` in the place of a module's; `remove` puts its class's back."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        module.forward = MethodType(forward, module)  # a bound method, so that a deep copy binds its own

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)


def fuse_products(model: nn.Module) -> list[ReplacedForward]:
    """Replace the forward of every large plain linear layer on the CPU, GPT-2's transposed kind too.

    A module whose forward somebody else has replaced (hooks that move weights do) is left alone, and on a GPU, where
    nothing is gained, so are all: each call would ask in vain.
    """
    replaced = []
    for module in model.modules():
        forward = _FORWARDS.get(type(module))
        if forward is None or "forward" in vars(module):
            continue
        weight: Any = module.weight
        if weight.device.type == "cpu" and weight.numel() >= onednn.LEAST_WEIGHT:
            replaced.append(ReplacedForward(module, forward))
    return replaced


def is_fused(module: nn.Module) -> bool:
    """Whether the module's own forward is one of this file."""
    return getattr(vars(module).get("forward"), "__func__", None) in _FORWARDS.values()


def _linear(self: Any, x: Tensor) -> Tensor:
    """nn.Linear: weight [out, d]."""
    if not _taken(x, self.weight, self.bias):
        return nn.Linear.forward(self, x)
    return _product(x, self.weight, self.bias)


def _conv1d(self: Any, x: Tensor) -> Tensor:
    """Conv1D: weight [d, out]."""
    weight = self.weight.t()
    if not _taken(x, weight, self.bias):
        out: Tensor = Conv1D.forward(self, x)
        return out
    return _product(x, weight, self.bias)


def _taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    return not trained and onednn.takes(x, weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Product.apply(x, weight, bias)
        return out
    return onednn.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    """x [..., d], weight [out, d] and bias [out] or None to [..., out]; x alone has a gradient, and that another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # apart, as torch.func wants it
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t(), None), None, None  # [..., out] @ [out, d]


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}
