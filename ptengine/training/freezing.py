"""The frozen backbone: no gradients, no dropout, and everything as it was when the run is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ptengine.backbone import patched
from ptengine.backbone.heads import task_head
from ptengine.errors import InputError

__all__ = ["frozen", "head_parameters"]

_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of `model` outside its base model, by name: its head.

    Raises:
        InputError: there is none, or it is not in float32 (moments and updates of a half-precision head are lost to
            rounding).
    """
    head = task_head(model)
    if not head:
        raise InputError(
            "expected a model with a classification head (AutoModelForSequenceClassification), "
            f"got {type(model).__name__}"
        )
    for name, parameter in head.items():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"expected the head's {name} in float32, got {parameter.dtype}; "
                "load the model in float32 and set bf16=True for speed"
            )
    return head


@contextmanager
def frozen(
    model: nn.Module, trainable: Mapping[str, nn.Parameter] | None = None, gradient_checkpointing: bool = False
) -> Iterator[None]:
    """Patch `model`, put it in eval mode and freeze it but for `trainable`; on exit everything is as it was before.

    With `gradient_checkpointing` the layers recompute themselves in the backward pass (non-reentrant). transformers
    recomputes only layers in training mode, so the layer modules alone are put in it; dropout and attention inside
    them stay in eval mode.
    """
    trainable = trainable or {}
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [{name: vars(layer)[name] for name in _CHECKPOINTING if name in vars(layer)} for layer in layers]
    try:
        with patched(model):
            model.eval()
            model.requires_grad_(False)
            for parameter in trainable.values():
                parameter.requires_grad_(True)
            for layer in layers:
                layer.gradient_checkpointing = gradient_checkpointing
                if gradient_checkpointing:
                    layer.training = True
                    layer._gradient_checkpointing_func = _recompute  # type: ignore[assignment]
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for parameter in trainable.values():
            parameter.grad = None
        for layer, attributes in zip(layers, before, strict=True):
            for name in _CHECKPOINTING:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)


def _recompute(function: Any, *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)
